"""What `step.py` measures: a batch of real photos and texts, the models, the variants and parts of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from opencloc.boxes import Letterbox
from opencloc.config import LossConfig, LrFactors, ModelConfig, OptimConfig
from opencloc.data.sources.spec import open_source
from opencloc.loss import cloc_loss
from opencloc.model import towers
from opencloc.model.cloc import ClocConfig, ClocModel, ClocOutput
from opencloc.model.packing import PackedTexts, join
from opencloc.model.processor import ClocProcessor, train_tokenizer
from opencloc.train.build import tower_config
from opencloc.train.optim import make_optimizer, set_trained_parts
from opencloc.vesl.phrases import extract_phrases

TEXT_LENGTH = 77  # CLIP's
FULL, FROZEN = "CLOC cross", "CLOC cross, towers frozen"
Step = Callable[[], None]
Loss = tuple[Callable[[], Tensor], nn.Module]  # (computes the loss of a batch, what is trained by it)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One batch in every form that a variant needs."""

    pixel_values: Tensor  # (B, 3, S, S)
    boxes: Tensor  # (B, M, 4)
    valid: Tensor  # (B, M)
    text_index: Tensor  # (B, M), into the distinct texts, and the texts' identity for the conflict filter
    captions: dict[str, Any]  # how they are laid out -> what encode_text takes
    texts: dict[str, Any]  # distinct region texts
    all_texts: dict[str, Any]  # one per region
    tokens: dict[str, int]  # what is encoded in each form, padding included


# -- inputs --------------------------------------------------------------------------------------------------------


def make_inputs(
    data: Path, model: ModelConfig, batch_size: int, num_regions: int, device: torch.device
) -> tuple[Inputs, CLIPConfig]:
    """The batch, and the configuration of the towers for its tokenizer.

    The tokenizer is trained on the captions and has fewer entries than the embedding table, which keeps its size.
    """
    model = replace(model, text_length=TEXT_LENGTH)
    source = open_source(f"coco:{data}/coco740?split=train")
    samples = [source[i] for i in range(source.size or 0)]
    captions = [" ".join(caption.strip() for caption in sample.captions[:4]) for sample in samples]
    tokenizer = train_tokenizer(captions, model.vocab_size, TEXT_LENGTH)
    config = tower_config(model, tokenizer)
    processor = ClocProcessor.for_towers(config, tokenizer)
    config.text_config.vocab_size = model.vocab_size
    rng = np.random.default_rng(0)
    images, boxes, texts, chosen_captions = [], [], [], []
    for i in rng.permutation(len(samples)):
        sample, image = samples[i], samples[i].image
        phrases = list(dict.fromkeys(p for caption in sample.captions for p in extract_phrases(caption)))
        if len(sample.boxes) == 0 or len(phrases) < num_regions:
            continue
        letterbox = Letterbox(width_px=image.width, height_px=image.height)
        images.append(image)
        boxes.append(letterbox.to_square(sample.boxes[np.arange(num_regions) % len(sample.boxes)]))
        texts += [phrases[k] for k in rng.choice(len(phrases), num_regions, replace=False)]
        chosen_captions.append(captions[i])
        if len(images) == batch_size:
            break
    if len(images) < batch_size:
        raise SystemExit(f"only {len(images)} photos have boxes and {num_regions} phrases; lower --batch-size")
    distinct = list(dict.fromkeys(texts))
    forms: dict[str, Any] = {"pixel_values": processor.letterbox(images)[0]}
    tokens = {}
    for name, strings in (("captions", chosen_captions), ("texts", distinct), ("all_texts", texts)):
        longest = processor.tokenize(strings)
        packed = processor.pack(strings)
        assert isinstance(packed, PackedTexts)
        full = F.pad(longest, (0, TEXT_LENGTH - longest.shape[1]), value=packed.pad_id)
        tokens |= {
            f"{name}, 77 each": full.numel(),
            f"{name}, as long as the longest": longest.numel(),
            f"{name}, packed": packed.input_ids.numel(),
            f"{name}, without padding": int((packed.position_ids.flatten()[packed.end] + 1).sum()),
        }
        forms[name] = {"77": full.to(device), "longest": longest.to(device), "packed": packed.to(device)}
    shape = (batch_size, num_regions)
    return Inputs(
        pixel_values=forms["pixel_values"].to(device),
        boxes=torch.from_numpy(np.stack(boxes)).float().to(device),
        valid=torch.ones(shape, dtype=torch.bool, device=device),
        text_index=torch.tensor([distinct.index(text) for text in texts]).reshape(shape).to(device),
        captions=forms["captions"],
        texts=forms["texts"],
        all_texts=forms["all_texts"],
        tokens=tokens,
    ), config


# -- variants ------------------------------------------------------------------------------------------------------


def make_models(config: CLIPConfig, device: torch.device) -> tuple[dict[str, ClocModel], torch.optim.Optimizer]:
    """A model per Prompter, all on the same towers; one more on frozen towers; and one optimizer of everything."""
    with device:
        clip = CLIPModel(config)
        models = {
            prompter: ClocModel(ClocConfig(clip_config=config, prompter=prompter), towers_model=clip)
            for prompter in ("cross", "encoder", "roi")
        }
        models["frozen"] = ClocModel(ClocConfig(clip_config=config), towers_model=copy.deepcopy(clip))
    everything = nn.ModuleDict(models).train()
    set_trained_parts(models["frozen"], LrFactors(towers=0))
    return models, make_optimizer(everything, OptimConfig(name="adamw", lr=1e-6))


def make_variants(models: dict[str, ClocModel], inputs: Inputs) -> tuple[dict[str, Loss], list[str]]:
    """(loss of each variant by name, names of the main ones)."""
    loss_config = LossConfig()

    def clip(captions: str) -> Loss:
        model = models["cross"]

        def forward() -> Tensor:
            output = model(inputs.pixel_values, inputs.captions[captions])
            return cloc_loss(output, inputs.boxes, inputs.valid, inputs.text_index, loss_config).total

        return forward, model

    def cloc(prompter: str, captions: str = "packed", texts: str = "packed", distinct: bool = True) -> Loss:
        model = models[prompter]
        index = inputs.text_index if distinct else torch.arange(inputs.boxes.shape[0] * inputs.boxes.shape[1])
        index = index.reshape(inputs.text_index.shape).to(inputs.pixel_values.device)
        ids = (inputs.texts if distinct else inputs.all_texts)[texts]

        def forward() -> Tensor:
            output = model(inputs.pixel_values, inputs.captions[captions], inputs.boxes, ids, index)
            return cloc_loss(output, inputs.boxes, inputs.valid, inputs.text_index, loss_config).total

        return forward, model

    def frozen() -> Tensor:
        args = inputs.boxes, inputs.texts["packed"], inputs.text_index
        output = models["frozen"](inputs.pixel_values, None, *args)  # frozen towers have nothing to learn from captions
        return cloc_loss(output, inputs.boxes, inputs.valid, inputs.text_index, loss_config).total

    def plain() -> Tensor:
        clip_model: Any = models["cross"].clip
        return clip_model(pixel_values=inputs.pixel_values, input_ids=inputs.captions["77"], return_loss=True).loss

    variants = {
        "CLIP": clip("packed"),
        FULL: cloc("cross"),
        FROZEN: (frozen, models["frozen"]),
        "CLIP, captions of 77 tokens": clip("77"),
        "CLIP, captions as long as the longest": clip("longest"),
        "CLOC encoder": cloc("encoder"),
        "CLOC roi": cloc("roi"),
        "CLOC cross, captions of 77 tokens": cloc("cross", captions="77"),
        "CLOC cross, texts as long as the longest": cloc("cross", texts="longest"),
        "CLOC cross, texts of 77 tokens": cloc("cross", texts="77"),
        "CLOC cross, duplicates encoded too": cloc("cross", distinct=False),
        "CLOC as published: encoder, all texts of 77 tokens": cloc("encoder", "77", "77", False),
        "transformers CLIPModel": (plain, models["cross"].clip),
    }
    return variants, ["CLIP", FULL, FROZEN, "CLIP, captions of 77 tokens"]


def make_step(loss: Loss, optimizer: torch.optim.Optimizer, device: torch.device, bf16: bool) -> Step:
    """A whole training step."""
    forward, model = loss

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = forward()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_parts(model: ClocModel, optimizer: torch.optim.Optimizer, inputs: Inputs, bf16: bool) -> dict[str, Step]:
    """Forward and backward pass of each part of a CLOC step on its own, and clipping with AdamW."""
    loss_config = LossConfig()
    with torch.no_grad():
        features = model.encode_image(inputs.pixel_values)
        together = join(inputs.captions["packed"], inputs.texts["packed"])
        embeddings = model.encode_text(together)

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()

    def vision() -> Tensor:
        output = model.encode_image(inputs.pixel_values)
        return output.embedding.sum() + output.tokens.sum()

    def regions() -> ClocOutput:
        """The model's output from tokens and text embeddings that are already there: neither tower runs."""
        given = features.embedding, leaf(features.tokens)
        with (
            patch.object(towers, "vision_forward", lambda *_: given),
            patch.object(model, "encode_text", lambda _: leaf(embeddings)),
        ):
            return model(
                inputs.pixel_values, inputs.captions["packed"], inputs.boxes, inputs.texts["packed"], inputs.text_index
            )

    output = {name: value.detach() for name, value in vars(regions()).items()}

    def losses(*without: str) -> Tensor:
        leaves = {name: leaf(value) for name, value in output.items() if name not in without}
        return cloc_loss(ClocOutput(**leaves), inputs.boxes, inputs.valid, inputs.text_index, loss_config).total

    def passes(forward: Callable[[], Tensor]) -> Step:
        def run() -> None:
            with torch.autocast(inputs.pixel_values.device.type, torch.bfloat16, enabled=bf16):
                value = forward()
            value.backward()

        return run

    def update(parameters: list[nn.Parameter]) -> Step:
        def run() -> None:
            for parameter in parameters:
                parameter.grad = gradients[parameter]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        gradients = {parameter: torch.zeros_like(parameter) for parameter in parameters}
        return run

    region_fields = tuple(name for name in output if "region" in name or "ground" in name)
    clip = list(model.clip.parameters())
    own = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    return {
        "CLIP: vision tower": passes(vision),
        "CLIP: captions": passes(lambda: model.encode_text(inputs.captions["packed"]).sum()),
        "CLIP: loss": passes(lambda: losses(*region_fields)),
        "CLIP: clipping and AdamW": update(clip),
        "CLOC: captions and region texts": passes(lambda: model.encode_text(together).sum()),
        "CLOC: Prompter and box head": passes(lambda: sum_fields(regions(), region_fields)),
        "CLOC: all losses": passes(losses),
        "CLOC: clipping and AdamW of the region parts": update(own),
    }


def sum_fields(output: ClocOutput, names: tuple[str, ...]) -> Tensor:
    return torch.stack([getattr(output, name).sum() for name in names]).sum()
