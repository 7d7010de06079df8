"""The training steps that `benchmarks/gpu_parts.py` measures: models, batches of noise, what is timed, and the sizes.

All data are generated: noise for images, and texts whose lengths are the published ones (captions of some 45 tokens,
region texts of 3 to 5, start and end included).  A step is the training loop's own: `backward`, clipping, optimizer.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import take_turns, timed
from benchmarks.step_setup import make_step
from opencloc.config import LossConfig, LrFactors, OptimConfig
from opencloc.data.batch import Batch, text_identity
from opencloc.data.scenes.things import CHARACTERS
from opencloc.loss import cloc_loss
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.processor import ClocProcessor, train_tokenizer
from opencloc.presets import PRESETS
from opencloc.train.build import tower_config
from opencloc.train.distributed import clip_gradients
from opencloc.train.loop import backward
from opencloc.train.optim import make_optimizer, set_trained_parts

CLIP = LossConfig(region_weight=0)
ADAMW = OptimConfig(name="adamw", lr=1e-6)
Found = Callable[[str, Any], None]  # keeps a finding under its name and saves all of them


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    preset: str
    batches: tuple[int, ...]  # until one does not fit
    num_regions: int
    rounds: int
    rows: tuple[int, ...]  # of the loss
    matmul: int
    tiny_steps: int | None  # None: the quickstart's
    tiny_images: int  # scored
    photos: int
    photo_px: int
    workers: tuple[int, ...]
    load_batches: int


GPU = Sizes(
    preset="vit_b16",
    batches=(256, 512, 1024, 2048, 4096),
    num_regions=4,
    rounds=6,
    rows=(16_384, 32_768, 65_536, 131_072),
    matmul=8192,
    tiny_steps=None,
    tiny_images=256,
    photos=256,
    photo_px=480,
    workers=(1, 4, 8, 16),
    load_batches=10,
)
CPU = Sizes(
    preset="tiny",
    batches=(2, 4),
    num_regions=2,
    rounds=1,
    rows=(64, 128),
    matmul=64,
    tiny_steps=2,
    tiny_images=4,
    photos=4,
    photo_px=64,
    workers=(1,),
    load_batches=1,
)


def make_model(sizes: Sizes, device: torch.device) -> tuple[ClocModel, ClocProcessor]:
    """The preset's model with random weights and a table for its whole vocabulary; and its processor."""
    config = PRESETS[sizes.preset]().model
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer((sentence(rng, 30) for _ in range(2000)), config.vocab_size, config.text_length)
    clip = tower_config(config, tokenizer)
    processor = ClocProcessor.for_towers(clip, tokenizer)
    clip.text_config.vocab_size = config.vocab_size  # though the tokenizer has fewer entries
    torch.manual_seed(0)
    with device:
        model = ClocModel(ClocConfig(clip_config=clip)).train()
    return model, processor


def sentence(rng: np.random.Generator, words: int) -> str:
    """Names of things in a row."""
    names = list(CHARACTERS)
    return " ".join(" ".join(names[i] for i in rng.integers(len(names), size=words)).split()[:words])


def make_batch(processor: ClocProcessor, batch_size: int, num_regions: int, device: torch.device) -> Batch:
    """Noise, captions of 28 to 38 words, and a region text of one or two words for every region."""
    rng = np.random.default_rng(1)
    generator = torch.Generator(device).manual_seed(1)
    shape = (batch_size, num_regions)
    corners = np.sort(rng.random((*shape, 2, 2)), axis=2) * 0.9
    boxes = np.concatenate([corners[:, :, 0], corners[:, :, 1] + 0.1], -1).astype(np.float32)
    texts = [sentence(rng, int(rng.integers(1, 3))) for _ in range(batch_size * num_regions)]
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    side = processor.image_size
    captions = [sentence(rng, int(rng.integers(28, 39))) for _ in range(batch_size)]
    hashes = {text: text_identity(text) for text in rows}
    return Batch(
        pixel_values=torch.randn(batch_size, 3, side, side, device=device, generator=generator),
        input_ids=processor.tokenize(captions).to(device),
        boxes=torch.from_numpy(boxes).to(device),
        valid=torch.ones(shape, dtype=torch.bool, device=device),
        text_ids=processor.tokenize(list(rows)).to(device),
        text_index=torch.tensor([rows[text] for text in texts]).reshape(shape).to(device),
        text_hash=torch.tensor([hashes[text] for text in texts]).reshape(shape).to(device),
    )


def training_step(
    model: ClocModel, optimizer: torch.optim.Optimizer, batch: Batch, loss: LossConfig, micro: int | None = None
) -> Callable[[], None]:
    """A whole step of the training loop, in bf16 on a GPU."""
    bf16 = batch.boxes.device.type == "cuda"

    def step() -> None:
        backward(model, batch, loss, micro, bf16=bf16, captions=model.clip.logit_scale.requires_grad)
        clip_gradients(model, 1.0)
        optimizer.step()
        model.bound_scales()
        optimizer.zero_grad(set_to_none=True)

    return step


def count_flops(model: ClocModel, batch: Batch, loss: LossConfig) -> float:
    """GFLOP per image of forward, losses and backward pass."""
    with FlopCounterMode(display=False) as counter:
        backward(model, batch, loss, None, bf16=batch.boxes.device.type == "cuda")
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(batch) / 1e9


def grow(
    model: ClocModel,
    optimizer: torch.optim.Optimizer,
    processor: ClocProcessor,
    sizes: Sizes,
    device: torch.device,
    found: Found,
) -> None:
    """Finds `batches`: for each size the seconds and memory of a CLIP and a CLOC step, until one does not fit."""
    cases: dict[str, Any] = {}
    for batch_size in sizes.batches:
        try:
            batch = make_batch(processor, batch_size, sizes.num_regions, device)
            runners = {
                name: training_step(model, optimizer, batch, loss)
                for name, loss in (("CLIP", CLIP), ("CLOC", LossConfig()))
            }
            memory = {name: peak_gb(step, device) for name, step in runners.items()}
            times = take_turns({n: lambda _, s=s: timed(s, device) for n, s in runners.items()}, sizes.rounds)
            case: dict[str, Any] = summary(times)
            for name, gb in memory.items():
                case[name] |= {"images_per_s": batch_size / case[name]["busy_s"], "peak_gb": gb}
            ratios = [b["busy_s"] / a["busy_s"] for a, b in zip(times["CLIP"], times["CLOC"], strict=True)]
            case["ratio"] = {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
            cases[str(batch_size)] = case
        except torch.OutOfMemoryError as error:
            cases[str(batch_size)] = {"out_of_memory": str(error).split(". ")[0]}
        optimizer.zero_grad(set_to_none=True)
        batch = runners = None  # before the next, larger one
        free(device)
        found("batches", cases)
        if "out_of_memory" in cases[str(batch_size)]:
            break


def variants(
    model: ClocModel,
    optimizer: torch.optim.Optimizer,
    processor: ClocProcessor,
    batch: Batch,
    sizes: Sizes,
    device: torch.device,
) -> dict[str, Any]:
    """Seconds of steps in other forms, all taking turns."""
    steps = {"CLOC": training_step(model, optimizer, batch, LossConfig())}
    ids: list[Any] = [processor.pack(texts.cpu()).to(device) for texts in (batch.input_ids, batch.text_ids)]

    def packed(regions: bool) -> Tensor:
        given = (batch.boxes, ids[1], batch.text_index) if regions else ()
        output = model(batch.pixel_values, ids[0], *given)
        return cloc_loss(output, batch.boxes, batch.valid, batch.text_hash, LossConfig()).total

    def transformers() -> Tensor:
        missing = processor.max_text_length - batch.input_ids.shape[1]
        full = torch.nn.functional.pad(batch.input_ids, (0, missing), value=processor.tokenizer.pad_token_id)
        return model.clip(pixel_values=batch.pixel_values, input_ids=full, return_loss=True).loss

    bf16 = device.type == "cuda"
    steps |= {
        "CLIP, texts packed": make_step((lambda: packed(False), model), optimizer, device, bf16),
        "CLOC, texts packed": make_step((lambda: packed(True), model), optimizer, device, bf16),
        "CLIP by plain transformers, captions padded in full": make_step(
            (transformers, model), optimizer, device, bf16
        ),
    }
    steps["CLOC, micro-batches of a quarter"] = training_step(
        model, optimizer, batch, LossConfig(), max(1, len(batch) // 4)
    )
    for name, factors in (("the vision tower", LrFactors(vision=0)), ("both towers", LrFactors(towers=0))):
        steps[f"CLOC, {name} frozen"] = with_factors(model, factors, optimizer, batch)
    times = take_turns({n: lambda _, s=s: timed(s, device) for n, s in steps.items()}, sizes.rounds)
    return summary(times)


def with_factors(
    model: ClocModel, factors: LrFactors, optimizer: torch.optim.Optimizer, batch: Batch
) -> Callable[[], None]:
    """A step while the parts whose factor is 0 are frozen."""

    def run() -> None:
        set_trained_parts(model, factors)
        training_step(model, optimizer, batch, LossConfig())()
        set_trained_parts(model, LrFactors())

    return run


def optimizers(model: ClocModel, batch: Batch, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Seconds of the optimizer's part of a step alone, gradients being there."""
    backward(model, batch, LossConfig(), None, bf16=device.type == "cuda")
    found = {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(model, OptimConfig(name=name, lr=1e-6))
        found |= summary(take_turns({name: lambda _, o=optimizer: timed(o.step, device)}, sizes.rounds))
        del optimizer
        free(device)
    model.zero_grad(set_to_none=True)
    return found


def summary(times: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians."""
    return {n: {k: statistics.median(row[k] for row in rows) for k in rows[0]} for n, rows in times.items()}


def peak_gb(step: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory that torch had handed out during the step; None on a CPU."""
    if device.type == "cpu":
        step()
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
