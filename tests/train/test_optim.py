"""The schedule, the groups of parameters, and parts of the model with learning rates of their own or none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from opencloc.config import LossConfig, LrFactors, ModelConfig, OptimConfig, TrainConfig
from opencloc.data.batch import Batch
from opencloc.data.sources.spec import open_source
from opencloc.data.stream import TrainingExamples, training_batches
from opencloc.model.cloc import ClocModel
from opencloc.train.build import build_model
from opencloc.train.checkpoint import save_model
from opencloc.train.loop import backward, train
from opencloc.train.optim import learning_rate, make_optimizer, set_learning_rate, set_trained_parts
from tests.train.runs import MakeConfig, cut_off, log, on_two_ranks, tree

FROZEN = LrFactors(towers=0)
PARTS = {
    "vision": ("clip.vision_model.", "clip.visual_projection."),
    "text": ("clip.text_model.", "clip.text_projection."),
    "prompter": ("prompter.", "prompt_encoder.", "region_logit_scale"),
    "heads": ("box_head.",),
}


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10)
    rates = [learning_rate(step, 110, optim) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(rates[10:]))


# -- groups ----------------------------------------------------------------------------------------------------------


def test_weight_decay_spares_vectors_scales_and_positions(config: MakeConfig, tmp_path: Path) -> None:
    model, _ = build_model(config(tmp_path))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = make_optimizer(model, OptimConfig(name="adamw")).param_groups
    decayed, spared = ([g for g in groups if bool(g["weight_decay"]) is wanted] for wanted in (True, False))
    assert all(p.ndim >= 2 and "position" not in names[id(p)] for group in decayed for p in group["params"])
    assert {names[id(p)] for g in spared for p in g["params"]} >= {"clip.logit_scale", "region_logit_scale"}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_muon_takes_the_matrices_of_the_layers_of_both_towers(config: MakeConfig, tmp_path: Path) -> None:
    model, _ = build_model(config(tmp_path))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = make_optimizer(model, OptimConfig()).param_groups
    own = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    assert own == {f"clip.{t}_model.encoder.layers.0.{m}.weight" for t in ("vision", "text") for m in linear}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert not any(group["muon"] for group in make_optimizer(model, OptimConfig(name="adamw")).param_groups)


def test_every_parameter_has_the_learning_rate_of_its_part(config: MakeConfig, tmp_path: Path) -> None:
    model, _ = build_model(config(tmp_path))
    factors = LrFactors(towers=0.5, vision=0.25, text=0.5, prompter=3, heads=2)
    optimizer = make_optimizer(model, OptimConfig(lr_factors=factors))
    set_learning_rate(optimizer, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_part = {"vision": 0.0125, "text": 0.025, "prompter": 0.3, "heads": 0.2}
    for name, parameter in model.named_parameters():
        (part,) = [part for part, starts in PARTS.items() if name.startswith(starts)] or ["text"]  # the temperature
        assert rates[id(parameter)] == pytest.approx(by_part[part]), name


# -- frozen parts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLOC checkpoint to start from, its temperature above the bound."""
    folder = tmp_path_factory.mktemp("start")
    model, processor = build_model(config(folder))
    with torch.no_grad():
        model.clip.logit_scale.fill_(4.7)
    save_model(folder / "cloc", model, processor)
    return str(folder / "cloc")


def frozen(config: MakeConfig, out: Path, start: str, factors: LrFactors = FROZEN, **changes: Any) -> TrainConfig:
    optim = OptimConfig(lr=1e-3, warmup_steps=2, eps=1e-3, lr_factors=factors)
    return config(out, model=ModelConfig(init_from=start), **{"optim": optim} | changes)


def a_batch(run: TrainConfig) -> tuple[ClocModel, Batch]:
    """The model, its parts frozen as the run has it, and a batch."""
    model, processor = build_model(run)
    set_trained_parts(model, run.optim.lr_factors)
    examples = TrainingExamples([open_source("scenes:easy", image_px=32)], (), num_regions=3, image_size=32, seed=0)
    (batch,) = training_batches(examples, processor, batch_size=6, start=0, stop=1, num_workers=0)
    return model, replace(batch, skipped=Counter())


@pytest.mark.parametrize("parts", [{"vision"}, {"text"}, {"vision", "text"}, {"prompter"}, {"heads"}])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_frozen_parts_stay_as_they_are_and_the_others_learn(
    parts: set[str], micro_batch_size: int | None, config: MakeConfig, start: str, tmp_path: Path
) -> None:
    factors = LrFactors(**dict.fromkeys(parts, 0.0))
    run = frozen(config, tmp_path, start, factors, micro_batch_size=micro_batch_size, steps=2)
    before, after = load_file(f"{start}/model.safetensors"), load_file(train(run) / "model.safetensors")
    moments = {
        name.rpartition(".")[0] for name in load_file(tmp_path / "checkpoints/step_0000002/optimizer.safetensors")
    }
    for part, starts in PARTS.items():
        own = {name for name in before if name.startswith(starts) and "position_ids" not in name}
        changed = {name for name in own if not torch.equal(before[name], after[name])}
        assert bool(changed) == bool(moments & own) == (part not in parts), part
    assert ("image_text" in log(tmp_path)[0]) == (not {"vision", "text"} <= parts)
    assert torch.equal(before["clip.logit_scale"], after["clip.logit_scale"]) == ({"vision", "text"} <= parts)


def test_frozen_towers_keep_nothing_for_a_backward_pass(config: MakeConfig, start: str, tmp_path: Path) -> None:
    model, batch = a_batch(frozen(config, tmp_path, start))
    kept: list[torch.Tensor] = []
    assert batch.pixel_values is not None
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        features = model.encode_image(batch.pixel_values)
        model.encode_text(batch.input_ids)
    assert kept == []
    assert not features.tokens.requires_grad
    loss, output = backward(model, batch, LossConfig(), None, captions=False)
    assert loss.image_text is None
    assert output.caption is None
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) or not name.startswith("clip."), name
    assert not model.clip.vision_model.training
    assert not model.clip.text_model.encoder.layers[0].training
    assert model.prompter.training


def test_the_text_tower_reads_no_captions_between_frozen_towers(config: MakeConfig, start: str, tmp_path: Path) -> None:
    model, batch = a_batch(frozen(config, tmp_path, start))
    rows: list[int] = []
    model.clip.text_model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    backward(model, batch, LossConfig(), None, captions=False)
    assert rows == [len(batch.text_ids)]


@pytest.mark.parametrize("factors", [FROZEN, LrFactors(vision=0), LrFactors(text=0, heads=0)])
def test_micro_batches_give_frozen_parts_the_gradients_of_the_whole_batch(
    factors: LrFactors, config: MakeConfig, start: str, tmp_path: Path
) -> None:
    model, batch = a_batch(frozen(config, tmp_path, start, factors))
    model.double()
    assert batch.pixel_values is not None
    batch = replace(batch, pixel_values=batch.pixel_values.double(), boxes=batch.boxes.double())
    gradients = []
    for micro_batch_size in (None, 2):
        model.zero_grad()
        backward(model, batch, LossConfig(), micro_batch_size, captions=factors.towers > 0)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    # embeddings are normalised in float32
    torch.testing.assert_close(gradients[1], gradients[0], atol=2e-5, rtol=1e-4)


def test_frozen_run_resumes_byte_for_byte_and_refuses_other_parts(
    config: MakeConfig, start: str, tmp_path: Path
) -> None:
    run = frozen(config, tmp_path / "run", start, keep_checkpoints=3)
    train(run)
    expected = tree(tmp_path / "run/checkpoints/step_0000006"), tree(tmp_path / "run/model")
    cut_off(tmp_path / "run", after=2)
    other = replace(run, optim=replace(run.optim, lr_factors=LrFactors(vision=0, text=0)))
    with pytest.raises(
        ValueError, match=r"\n  optim.lr_factors.towers: 0.0 there, 1.0 asked for\n  optim.lr_factors.vi"
    ):
        train(other)
    train(run)
    assert (tree(tmp_path / "run/checkpoints/step_0000006"), tree(tmp_path / "run/model")) == expected


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("factors", [FROZEN, LrFactors(text=0, vision=0.1)])
def test_frozen_parts_on_two_ranks_train_as_in_one_process(
    sharding: Any, factors: LrFactors, config: MakeConfig, start: str, tmp_path: Path
) -> None:
    run = frozen(config, tmp_path / "single", start, factors, steps=3)
    expected = load_file(train(run) / "model.safetensors")
    two = replace(run, out=str(tmp_path / "two"), sharding=sharding, micro_batch_size=2)
    on_two_ranks(lambda _: train(two) and None, tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "two/model/model.safetensors"), expected, atol=2e-6, rtol=1e-4)


def test_activation_checkpointing_leaves_frozen_layers_alone(config: MakeConfig, start: str, tmp_path: Path) -> None:
    model, batch = a_batch(frozen(config, tmp_path, start, activation_checkpointing=True))
    calls: list[int] = []
    model.clip.vision_model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    backward(model, batch, LossConfig(), None, captions=False)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("factors", "changes", "message"),
    [
        ({"towers": 0, "prompter": 0, "heads": 0}, {}, "nothing would be trained: .* vision, text, prompter, heads"),
        ({"towers": 0}, {"loss": LossConfig(region_weight=0)}, "nothing would be trained: .* vision, text$"),
        ({"vision": 0}, {"model": ModelConfig()}, "freezes the vision tower, which is random without model.init_from"),
        ({"text": 0}, {"model": ModelConfig()}, "freezes the text tower, which is random"),
    ],
)
def test_runs_in_which_nothing_sensible_would_learn_are_refused(
    factors: dict[str, float], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(
            **{"model": ModelConfig(init_from="x"), "optim": OptimConfig(lr_factors=LrFactors(**factors))} | changes
        )


def test_a_model_whose_only_weights_are_frozen_is_refused(config: MakeConfig, start: str, tmp_path: Path) -> None:
    """The pool Prompter has none of its own."""
    from opencloc.model.export import export_clip
    from opencloc.model.processor import ClocProcessor

    export_clip(ClocModel.from_pretrained(start), ClocProcessor.from_pretrained(start), tmp_path / "clip")
    run = frozen(config, tmp_path / "run", start)
    with pytest.raises(ValueError, match="freezes every part of this model that has weights"):
        train(replace(run, model=ModelConfig(init_from=str(tmp_path / "clip"), prompter="pool")))


def test_negative_and_unknown_factors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LrFactors\.vision: must be greater than or equal to 0, got -1"):
        LrFactors(vision=-1)
    with pytest.raises(TypeError, match="towerz"):
        LrFactors(towerz=0)  # pyright: ignore[reportCallIssue]
