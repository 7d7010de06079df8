"""The loop: resume, gradient caching, baseline, stopping, folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from opencloc.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig, to_json
from opencloc.data.sources.spec import open_source
from opencloc.data.stream import TrainingExamples, training_batches
from opencloc.train.build import build_model
from opencloc.train.checkpoint import list_checkpoints
from opencloc.train.loop import backward, train
from opencloc.train.optim import Muon, learning_rate, make_optimizer, orthogonalize

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
PATIENCE_S = 300  # for a process to start on a busy machine
MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def config(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """Folder and changed fields -> a run of seconds: 6 steps of 8 scenes at 32 px."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)

    def make(out: Path, **changes: Any) -> TrainConfig:
        base = TrainConfig(
            out=str(out),
            model=ModelConfig(
                image_size=32,
                patch_size=8,
                vision_width=32,
                vision_layers=1,
                vision_heads=2,
                text_width=32,
                text_layers=1,
                text_heads=2,
                text_length=16,
                embed_dim=16,
                tokenizer=str(folder),
            ),
            data=DataConfig(train=("scenes:easy",), num_workers=0),
            optim=OptimConfig(lr=1e-3, warmup_steps=2),
            steps=6,
            batch_size=8,
            checkpoint_every=2,
            log_every=1,
            precision="fp32",
            device="cpu",
        )
        return replace(base, **changes)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("optimizer", "patch_dropout"), [("adamw", 0.0), ("muon", 0.5)])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    optimizer: Any, patch_dropout: float, config: MakeConfig, tmp_path: Path
) -> None:
    changes = {
        "keep_checkpoints": 3,
        "optim": OptimConfig(name=optimizer, lr=1e-3, warmup_steps=2),
        "data": DataConfig(train=("scenes:easy",), num_workers=0, patch_dropout=patch_dropout),
    }
    whole = train(config(tmp_path / "whole", **changes))
    # the same run cut off after step 2: as if killed before it could write anything newer
    cut = tmp_path / "cut"
    train(config(cut, **changes))
    for newer in (cut / "model", *list_checkpoints(cut / "checkpoints")[1:]):
        shutil.rmtree(newer)
    resumed = train(config(cut, **changes))
    assert tree(whole) == tree(resumed)
    assert tree(tmp_path / "whole/checkpoints/step_0000006") == tree(cut / "checkpoints/step_0000006")


def test_killed_run_resumes_to_the_same_model(config: MakeConfig, tmp_path: Path) -> None:
    """kill -9 in mid-run, in a process of its own."""
    whole, killed = config(tmp_path / "whole", steps=30), config(tmp_path / "killed", steps=30)
    (tmp_path / "config.json").write_text(to_json(killed))
    command = [sys.executable, "-m", "opencloc", "train", str(tmp_path / "config.json")]
    process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.DEVNULL)
    deadline = time.time() + PATIENCE_S
    while not list_checkpoints(Path(killed.out) / "checkpoints") and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list_checkpoints(Path(killed.out) / "checkpoints")
    resumed = subprocess.run(command, env=ONE_THREAD, stderr=subprocess.DEVNULL, check=False)
    assert resumed.returncode == 0
    assert equal(weights(train(whole)), weights(Path(killed.out) / "model"))
    assert not list((Path(killed.out) / "checkpoints").glob(".*"))


def test_interrupt_saves_a_checkpoint_and_says_how_to_go_on(config: MakeConfig, tmp_path: Path) -> None:
    long = config(tmp_path / "run", steps=100_000, checkpoint_every=100_000)
    (tmp_path / "config.json").write_text(to_json(long))
    command = [sys.executable, "-m", "opencloc", "train", str(tmp_path / "config.json")]
    process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.time() + PATIENCE_S
    while not (log.exists() and log.read_text()) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "run the same command again to go on" in errors
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert json.loads((checkpoint / "train_state.json").read_text())["step"] > 0


@pytest.mark.parametrize("region_weight", [0.0, 1.0])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
@pytest.mark.parametrize("keep_patches", [None, (5, 16)])
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    config: MakeConfig,
    tmp_path: Path,
    keep_patches: tuple[int, int] | None,
    micro_batch_size: int,
    region_weight: float,
) -> None:
    run = config(tmp_path, data=DataConfig(train=("scenes:rich?min_objects=1&missing_region=0.4",), num_workers=0))
    source = open_source(run.data.train[0], image_px=32)
    model, processor = build_model(run)
    model.double()
    examples = TrainingExamples([source], (), num_regions=3, image_size=32, seed=0, keep_patches=keep_patches)
    (batch,) = training_batches(examples, processor, batch_size=6, start=0, stop=1, num_workers=0)
    batch = replace(batch, pixel_values=batch.pixel_values.double(), boxes=batch.boxes.double(), skipped=Counter())
    loss = LossConfig(region_weight=region_weight)
    whole, _ = backward(model, batch, loss, None)
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cached, _ = backward(model, batch, loss, micro_batch_size)
    torch.testing.assert_close(cached.total, whole.total)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name in expected:
        # embeddings are normalised in float32
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-4, msg=name)


def test_micro_batches_in_bf16_train_every_weight_that_the_whole_batch_trains(
    config: MakeConfig, tmp_path: Path
) -> None:
    """Autocast keeps its casts of the weights: those made without a graph must not serve the pass with one."""
    run = config(tmp_path)
    model, processor = build_model(run)
    examples = TrainingExamples([open_source("scenes:easy", image_px=32)], (), num_regions=2, image_size=32, seed=0)
    (batch,) = training_batches(examples, processor, batch_size=4, start=0, stop=1, num_workers=0)
    gradients = []
    for micro_batch_size in (None, 2):
        model.zero_grad()
        backward(model, batch, run.loss, micro_batch_size, bf16=True)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    whole, cached = gradients
    assert whole.keys() == cached.keys()
    difference, size = (
        torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for gradients in ([cached[name] - whole[name] for name in whole], list(whole.values()))
    )
    assert difference < 0.05 * size


def test_loss_falls_and_the_log_says_so(config: MakeConfig, tmp_path: Path) -> None:
    train(config(tmp_path, steps=40, batch_size=16, checkpoint_every=40))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(1, 41))
    assert log[-1]["total"] < 0.9 * log[0]["total"]
    assert {"image_text", "region_text", "grounding", "logit_scale", "region_logit_scale", "grad_norm"} <= set(log[0])
    assert {"images_per_s", "data_wait", "lr", "skipped"} <= set(log[0])


def test_clip_baseline_trains_no_region_part(config: MakeConfig, tmp_path: Path) -> None:
    run = config(tmp_path, loss=LossConfig(region_weight=0.0), steps=2)
    before, _ = build_model(run)
    after = weights(train(run))
    for name, value in before.state_dict().items():
        if not name.startswith("clip."):
            assert torch.equal(value, after[name]), name
    assert "region_text" not in json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])


def test_only_the_newest_checkpoints_stay(config: MakeConfig, tmp_path: Path) -> None:
    train(config(tmp_path, keep_checkpoints=1))
    assert [c.name for c in list_checkpoints(tmp_path / "checkpoints")] == ["step_0000006"]


def test_a_run_starts_from_a_cloc_and_from_a_clip_checkpoint(config: MakeConfig, tmp_path: Path) -> None:
    first = train(config(tmp_path / "first", steps=1))
    model = replace(config(tmp_path).model, init_from=str(first))
    assert train(config(tmp_path / "second", steps=1, model=model)).is_dir()


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=10)
    rates = [learning_rate(step, 110, optim) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_weight_decay_spares_vectors_scales_and_positions(config: MakeConfig, tmp_path: Path) -> None:
    run = config(tmp_path)
    model, _ = build_model(run)
    decayed, plain, scalars = make_optimizer(model, run.optim).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert plain["weight_decay"] == scalars["weight_decay"] == 0
    assert all(p.ndim >= 2 and "position" not in names[id(p)] for p in decayed["params"])
    assert {names[id(p)] for p in scalars["params"]} >= {"clip.logit_scale", "region_logit_scale"}
    assert sum(len(group["params"]) for group in (decayed, plain, scalars)) == len(names)


def test_muon_takes_the_matrices_of_the_layers_of_both_towers(config: MakeConfig, tmp_path: Path) -> None:
    run = config(tmp_path, optim=OptimConfig(name="muon"))
    model, _ = build_model(run)
    names = {id(p): n for n, p in model.named_parameters()}
    *others, layers = make_optimizer(model, run.optim).param_groups
    own = {names[id(p)] for p in layers["params"]}
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    assert own == {f"clip.{t}_model.encoder.layers.0.{m}.weight" for t in ("vision", "text") for m in linear}
    assert len(own) + sum(len(group["params"]) for group in others) == len(names)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 2**32 - 1))
def test_orthogonalized_matrix_is_the_plain_iteration_whatever_its_scale(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = matrix / matrix.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    torch.testing.assert_close(orthogonalize(matrix), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(orthogonalize(1000 * matrix), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(orthogonalize(matrix.T), x.T, atol=1e-5, rtol=1e-5)


def test_orthogonalized_matrix_has_singular_values_near_one() -> None:
    left, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    matrix = left * torch.logspace(0, -1, 12, dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert 0.6 < values.min() <= values.max() < 1.3
    assert not orthogonalize(torch.zeros(3, 4)).any()


def test_a_step_of_muon_is_as_long_as_one_of_adamw_and_shrinks_weights_as_much() -> None:
    weight = torch.nn.Parameter(torch.ones(16, 64))
    weight.grad = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    Muon([{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": [weight], "weight_decay": 0.5}], lr=0.01).step()
    step = weight.detach() - (1 - 0.01 * 0.5)
    assert step.square().mean().sqrt() == pytest.approx(0.01 * 0.2, rel=0.2)
    assert (step * weight.grad).sum() < 0
