"""The loop: gradient caching, baseline, stopping, where a run starts from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opencloc.config import DataConfig, LossConfig, ModelConfig, to_json
from opencloc.data.sources.spec import open_source
from opencloc.data.stream import TrainingExamples, training_batches
from opencloc.model.export import export_clip
from opencloc.train.build import build_model
from opencloc.train.checkpoint import save_model
from opencloc.train.loop import backward, train
from tests.train.runs import MakeConfig, log, steps_kept

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
PATIENCE_S = 300  # for a process to start on a busy machine


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
    assert len(steps_kept(tmp_path / "run")) == 1


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
    assert batch.pixel_values is not None
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
    records = log(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[-1]["total"] < 0.9 * records[0]["total"]
    assert {"image_text", "region_text", "grounding", "logit_scale", "region_logit_scale"} <= set(records[0])
    assert {"grad_norm", "images_per_s", "data_wait", "lr", "skipped"} <= set(records[0])


def test_clip_baseline_trains_no_region_part(config: MakeConfig, tmp_path: Path) -> None:
    run = config(tmp_path, loss=LossConfig(region_weight=0.0), steps=2)
    before, _ = build_model(run)
    after = load_file(train(run) / "model.safetensors")
    for name, value in before.state_dict().items():
        if not name.startswith("clip."):
            assert torch.equal(value, after[name]), name
    assert "region_text" not in log(tmp_path)[0]


def test_a_run_starts_from_a_cloc_and_from_a_clip_checkpoint(config: MakeConfig, tmp_path: Path) -> None:
    """Sizes and tokenizer are the checkpoint's; the temperature of a converged CLIP can come down again."""
    model, processor = build_model(config(tmp_path))
    with torch.no_grad():
        model.clip.logit_scale.fill_(4.6052)
    save_model(tmp_path / "cloc", model, processor)
    export_clip(model, processor, tmp_path / "clip")
    for name in ("cloc", "clip"):
        run = config(tmp_path / "run" / name, steps=3, model=ModelConfig(init_from=str(tmp_path / name)))
        trained = load_file(train(run) / "model.safetensors")
        assert trained["clip.text_model.embeddings.token_embedding.weight"].shape[1] == 32
        assert trained["clip.logit_scale"] < 4.6052


def test_region_parts_that_a_cloc_checkpoint_does_not_have_are_refused(config: MakeConfig, tmp_path: Path) -> None:
    save_model(tmp_path / "cloc", *build_model(config(tmp_path)))
    with pytest.raises(ValueError, match=r"region parts; leave out model\.box_head, model\.prompter$"):
        build_model(
            config(tmp_path, model=ModelConfig(init_from=str(tmp_path / "cloc"), prompter="roi", box_head="mlp"))
        )
