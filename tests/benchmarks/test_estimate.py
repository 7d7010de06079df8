"""The formulas of the estimate against small models: counted, not believed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import estimate
from opencloc.config import DataConfig, LossConfig, ModelConfig, TrainConfig
from opencloc.loss import cloc_loss, image_text_loss, region_text_loss
from opencloc.model.cloc import ClocConfig, ClocModel, ClocOutput
from opencloc.presets import vit_b16
from opencloc.train.build import tower_config
from opencloc.train.muon import orthogonalize

IMAGES, REGIONS = 4, 2
SMALL = ModelConfig(
    image_size=56,
    patch_size=8,
    vision_width=64,
    vision_layers=4,
    vision_heads=2,
    text_width=48,
    text_layers=3,
    text_heads=2,
    text_length=estimate.CAPTION_TOKENS,
    embed_dim=32,
    vocab_size=500,
)


class Vocabulary(SimpleNamespace):
    """The few things that a model asks its tokenizer for."""

    def __len__(self) -> int:
        return SMALL.vocab_size


def config(**changes: Any) -> TrainConfig:
    base = TrainConfig(model=SMALL, data=DataConfig(num_regions=REGIONS), batch_size=IMAGES)
    return replace(base, **changes)


def build(model: ModelConfig = SMALL, attention: str = "eager") -> ClocModel:
    """The model of a configuration, without a tokenizer."""
    torch.manual_seed(0)
    towers = tower_config(model, Vocabulary(pad_token_id=0, bos_token_id=1, eos_token_id=2))
    built = ClocModel(
        ClocConfig(clip_config=towers, prompter_heads=model.prompter_heads, prior_slope=model.prior_slope)
    )
    built.set_attn_implementation(attention)
    return built


def inputs(with_regions: bool) -> dict[str, torch.Tensor]:
    """A batch whose texts are as long as the estimate takes them to be, all different."""
    generator = torch.Generator().manual_seed(0)

    def texts(count: int, length: int) -> torch.Tensor:
        ids = torch.randint(3, SMALL.vocab_size, (count, length), generator=generator)
        ids[:, -1] = 2
        return ids

    batch = {"pixel_values": torch.randn(IMAGES, 3, 56, 56), "input_ids": texts(IMAGES, estimate.CAPTION_TOKENS)}
    if with_regions:
        count = IMAGES * REGIONS
        batch["boxes"] = torch.tensor([0.1, 0.1, 0.8, 0.7]).expand(IMAGES, REGIONS, 4)
        batch["text_ids"] = texts(count, estimate.REGION_TEXT_TOKENS)
        batch["text_index"] = torch.arange(count).reshape(IMAGES, REGIONS)
    return batch


def loss_of(output: ClocOutput, with_regions: bool) -> torch.Tensor:
    valid, text_hash = torch.ones(IMAGES, REGIONS).bool(), torch.arange(IMAGES * REGIONS).reshape(IMAGES, REGIONS)
    boxes = torch.rand(IMAGES, REGIONS, 4)
    return cloc_loss(output, boxes, valid, text_hash, LossConfig(region_weight=float(with_regions))).total


@pytest.mark.parametrize(
    "model", [SMALL, replace(SMALL, prior_slope=None, embed_dim=24, vision_layers=1, text_width=32, text_layers=2)]
)
def test_parameters_are_exact(model: ModelConfig) -> None:
    assert estimate.num_parameters(model) == sum(p.numel() for p in build(model).parameters())


@pytest.mark.parametrize(("with_regions", "tolerance"), [(False, 0.02), (True, 0.15)])
@pytest.mark.parametrize("kept", [None, 33])
def test_arithmetic_is_what_the_counter_counts(kept: int | None, with_regions: bool, tolerance: float) -> None:
    """With regions the Prompter comes on top, which is small only beside towers of a useful size."""
    dropout = 0.0 if kept is None else 1 - kept / 49
    data = DataConfig(num_regions=REGIONS, patch_dropout=dropout)
    run = config(loss=LossConfig(region_weight=float(with_regions)), data=data)
    model = build()
    patches = None if kept is None else torch.stack([torch.randperm(49)[:kept] for _ in range(IMAGES)])
    with FlopCounterMode(display=False) as counter:
        loss_of(model(**inputs(with_regions), kept=patches), with_regions).backward()
    found = estimate.estimate(run, gpus=1)
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=tolerance)
    assert found.flops < 1.02 * counter.get_total_flops()  # the first layer needs no gradient of the pixels


@pytest.mark.parametrize("rows", [16, 40])
def test_arithmetic_of_the_losses_is_exact(rows: int) -> None:
    run = config(batch_size=rows)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1).requires_grad_()

    scale = torch.tensor(10.0)
    valid, text_hash = torch.ones(rows, REGIONS).bool(), torch.arange(rows * REGIONS).reshape(rows, REGIONS)
    with FlopCounterMode(display=False) as counter:
        image_text_loss(leaf(rows, 32), leaf(rows, 32), scale).backward()
        args = leaf(rows, REGIONS, 32), leaf(rows, REGIONS, 32), scale, valid, text_hash, LossConfig()
        region_text_loss(*args)[0].backward()
    assert estimate.loss_flops(run) == counter.get_total_flops()


def kept_bytes(model: ClocModel, batch: dict[str, torch.Tensor], precision: str) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters (and their casts) left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.ndim == 2}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and not (tensor.dtype == torch.bfloat16 and tensor.shape in shapes):
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor stays alive, so no address comes twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model(**batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(precision: str) -> None:
    run = config(loss=LossConfig(region_weight=0))
    measured = kept_bytes(build(attention="sdpa"), inputs(False), precision)
    assert IMAGES * estimate.image_memory(run, precision) == pytest.approx(measured, rel=0.1)


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    run = config(loss=LossConfig(region_weight=0), activation_checkpointing=True)
    plain = replace(run, activation_checkpointing=False)
    assert estimate.image_memory(run, "bf16") < 0.4 * estimate.image_memory(plain, "bf16")
    assert estimate.estimate(run, gpus=1).flops > estimate.estimate(plain, gpus=1).flops


def test_a_smaller_gpu_gets_a_smaller_micro_batch_and_sharding_frees_memory() -> None:
    large, small = (estimate.estimate(vit_b16(), gpus=64, memory_gb=gb) for gb in (80, 24))
    assert large.micro_batch == 512
    assert 0 < small.micro_batch < 512
    assert small.memory < 24e9
    assert small.seconds > large.seconds
    sharded = estimate.estimate(replace(vit_b16(), sharding="fsdp"), gpus=64)
    assert sharded.state_memory < 0.2 * large.state_memory


def test_the_guide_holds_the_table_that_the_formulas_give() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "scale.md").read_text()
    assert estimate.table([8, 64, 512], 80.0, 400.0) in guide
    assert estimate.muon_table([8, 64, 512], 400.0) in guide


def test_arithmetic_of_muon_is_exact() -> None:
    """In the form that GPUs run, in bfloat16."""
    layers = [*build().clip.vision_model.encoder.layers, *build().clip.text_model.encoder.layers]
    with FlopCounterMode(display=False) as counter:
        for layer in layers:
            for matrix in (parameter for parameter in layer.parameters() if parameter.ndim == 2):
                orthogonalize(matrix.detach().bfloat16()[None])
    assert estimate.muon_flops(SMALL) == counter.get_total_flops()
