"""Small checkpoints, labelled images in tars, and features of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from opencloc.data.encode import EncodeConfig, EncodeReport, encode
from opencloc.data.sample import Sample
from opencloc.data.tars.shards import ShardWriter
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.processor import ClocProcessor
from opencloc.train.checkpoint import save_model
from tests.helpers.tars import picture

SIZES_PX = ((40, 30), (30, 50), (36, 36), (64, 20))  # of the images in turn
WORDS = ("dog", "cat", "train", "pizza")


def save_cloc(
    folder: Path, towers: Any, tokenizer: PreTrainedTokenizerFast, prompter: Any = "cross", seed: int = 0
) -> str:
    """A CLOC checkpoint with weights drawn from the seed."""
    torch.manual_seed(seed)
    model = ClocModel(ClocConfig(clip_config=towers, prompter=prompter))
    save_model(folder, model, ClocProcessor.for_towers(towers, tokenizer))
    return str(folder)


def write_labelled(folder: Path, *, count: int = 10, samples_per_shard: int = 4) -> str:
    """A folder of tars of noise with a caption and two regions each."""
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder), samples_per_shard=samples_per_shard, image_format="png") as writer:
        for number in range(count):
            low = rng.uniform(0, 0.5, (2, 2))
            boxes = np.concatenate([low, low + rng.uniform(0.2, 0.5, (2, 2))], axis=1).astype(np.float32)
            texts = (WORDS[number % 4], f"a red {WORDS[(number + 1) % 4]}")
            image = picture(number, *SIZES_PX[number % 4])
            caption = f"a photo of a {texts[0]}"
            writer.write(Sample(key=f"k{number}", image=image, captions=(caption,), boxes=boxes, texts=texts))
    return str(folder)


def features_of(data: str, model: str, out: Path, **more: Any) -> EncodeReport:
    """Encodes in float32 in this process."""
    fields: dict[str, Any] = {"num_workers": 0, "batch_size": 3, "precision": "fp32", "device": "cpu"} | more
    return encode(EncodeConfig(model=model, data=data, out=str(out), **fields))
