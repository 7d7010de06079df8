"""Two ranks against one process on the same global batches: losses, gradients, whole runs, checkpoints, restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opencloc.config import DataConfig, LossConfig, OptimConfig, TrainConfig, to_json
from opencloc.loss import ClocLoss, cloc_loss
from opencloc.model.cloc import ClocOutput
from opencloc.train.distributed import ALONE, Ranks, process_ranks
from opencloc.train.loop import Interrupted, train
from tests.train.runs import PATIENCE_S, MakeConfig, cut_off, log, on_two_ranks, steps_kept

CPU = torch.device("cpu")


# -- the losses ------------------------------------------------------------------------------------------------------

VALID = {
    "all regions": torch.ones(6, 3, dtype=torch.bool),
    "unequal numbers": torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]).bool(),
    "a rank with none": torch.tensor([[0, 0, 0]] * 3 + [[1, 1, 0]] * 3).bool(),
    "none at all": torch.zeros(6, 3, dtype=torch.bool),
}


def embeddings(texts: int = 7) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Output of a model for 6 images of 3 regions in float64, boxes and text hashes; texts repeat across ranks."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(
            torch.randn(*shape, dtype=torch.float64, generator=generator) + 0.7, dim=-1
        )

    which = torch.randint(texts, (6, 3), generator=generator)
    tensors = {
        "image": unit(6, 8),
        "caption": unit(6, 8),
        "logit_scale": torch.tensor(9.0).double(),
        "region": unit(6, 3, 8),
        "region_text": unit(texts, 8)[which],
        "ground_boxes": torch.rand(6, 3, 4, dtype=torch.float64, generator=generator),
        "region_logit_scale": torch.tensor(11.0).double(),
    }
    boxes = torch.tensor([0.2, 0.3, 0.7, 0.9]).double().expand(6, 3, 4)
    return tensors, boxes, which


def loss_and_gradients(valid: torch.Tensor, ranks: Ranks, gce_q: float) -> tuple[ClocLoss, dict[str, torch.Tensor]]:
    """The loss of the batch and its gradients with respect to this rank's rows."""
    tensors, boxes, text_hash = embeddings()
    rows = slice(6 // ranks.size * ranks.rank, 6 // ranks.size * (ranks.rank + 1))
    own = {name: (t[rows] if t.ndim else t).clone().requires_grad_() for name, t in tensors.items()}
    config = LossConfig(conflict_threshold=0.6, grounding_weight=0.5, gce_q=gce_q)
    loss = cloc_loss(ClocOutput(**own), boxes[rows], valid[rows], text_hash[rows], config, ranks.group)
    loss.total.backward()
    return loss, {name: t.grad for name, t in own.items() if t.grad is not None}


@pytest.mark.parametrize("gce_q", [0.0, 0.5])
@pytest.mark.parametrize("case", VALID)
def test_sharded_loss_equals_single_process_loss(case: str, gce_q: float, tmp_path: Path) -> None:
    """Every value is the whole batch's on both ranks: lambda, the filtered share and the means over regions too."""
    expected, gradients = loss_and_gradients(VALID[case], ALONE, gce_q)
    assert expected.filtered_share is not None
    assert expected.filtered_share > 0 or case == "none at all"

    def body(ranks: Ranks) -> None:
        loss, got = loss_and_gradients(VALID[case], ranks, gce_q)
        torch.testing.assert_close(vars(loss), vars(expected), atol=1e-10, rtol=0)
        for name, whole in gradients.items():
            if whole.ndim:
                torch.testing.assert_close(got[name], whole.chunk(2)[ranks.rank], atol=1e-10, rtol=0, msg=name)
            else:  # held by both ranks, half of the gradient each: DDP sums them, FSDP leaves them alone
                torch.testing.assert_close(got[name], whole / 2, atol=1e-10, rtol=0, msg=name)

    on_two_ranks(body, tmp_path)


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(config: MakeConfig) -> TrainConfig:
    """A run of seconds, most of its scenes with fewer than M regions."""
    return config(
        Path("unused"),
        data=DataConfig(train=("scenes:rich?min_objects=1&missing_region=0.6",), num_workers=0, patch_dropout=0.25),
        optim=OptimConfig(
            name="muon", lr=1e-3, warmup_steps=2, eps=1e-3
        ),  # so that Adam does not blow rounding errors up
        keep_checkpoints=3,
    )


@pytest.fixture(scope="module")
def single(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    train(replace(base, out=str(out)))
    return out


def assert_same_run(run: Path, expected: Path, checkpoint: str = "model") -> None:
    """Equal weights and log, up to the rounding of sums in another order."""
    weights, expected_weights = (load_file(r / checkpoint / "model.safetensors") for r in (run, expected))
    torch.testing.assert_close(weights, expected_weights, atol=2e-6, rtol=1e-4)
    for line, expected_line in zip(log(run), log(expected), strict=True):
        assert line.keys() == expected_line.keys()
        for name in line.keys() - {"images_per_s", "data_wait"}:
            assert line[name] == pytest.approx(expected_line[name], abs=2e-4), name


@pytest.mark.parametrize(("sharding", "micro_batch_size"), [("ddp", None), ("fsdp", None), ("ddp", 2), ("fsdp", 2)])
def test_two_ranks_train_what_one_process_trains(
    sharding: Any, micro_batch_size: int | None, base: TrainConfig, single: Path, tmp_path: Path
) -> None:
    """Losses, gradient norm and logit scales of every step, and all weights and moments at the end."""
    config = replace(base, out=str(tmp_path / "run"), sharding=sharding, micro_batch_size=micro_batch_size)
    on_two_ranks(lambda _: train(config) and None, tmp_path)
    assert_same_run(tmp_path / "run", single)
    moments, expected = (
        load_file(r / "checkpoints/step_0000006/optimizer.safetensors") for r in (tmp_path / "run", single)
    )
    torch.testing.assert_close(moments, expected, atol=2e-6, rtol=1e-3)


def test_adamw_on_two_ranks_trains_what_one_process_trains(base: TrainConfig, tmp_path: Path) -> None:
    """All the other runs here are Muon's."""
    config = replace(base, steps=3, optim=replace(base.optim, name="adamw"))
    train(replace(config, out=str(tmp_path / "single")))
    for sharding in ("ddp", "fsdp"):
        two = replace(config, out=str(tmp_path / sharding), sharding=sharding)
        on_two_ranks(lambda _, two=two: train(two) and None, tmp_path / f"{sharding}_ranks")
        assert_same_run(tmp_path / sharding, tmp_path / "single")


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_clip_baseline_on_two_ranks_leaves_the_region_parts_alone(
    sharding: Any, base: TrainConfig, tmp_path: Path
) -> None:
    config = replace(base, steps=2, loss=LossConfig(region_weight=0))
    train(replace(config, out=str(tmp_path / "single")))
    on_two_ranks(lambda _: train(replace(config, out=str(tmp_path / "run"), sharding=sharding)) and None, tmp_path)
    assert_same_run(tmp_path / "run", tmp_path / "single")


def test_checkpoints_go_from_two_ranks_to_one_to_two(base: TrainConfig, single: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = replace(base, out=str(run))
    on_two_ranks(lambda _: train(replace(config, sharding="fsdp")) and None, tmp_path / "a")
    cut_off(run, after=2)
    train(config)
    cut_off(run, after=4)
    on_two_ranks(lambda _: train(replace(config, sharding="ddp")) and None, tmp_path / "b")
    cut_off(run, after=4)
    on_two_ranks(lambda _: train(replace(config, sharding="fsdp")) and None, tmp_path / "c")
    assert_same_run(run, single)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(base: TrainConfig, tmp_path: Path) -> None:
    config = replace(base, out=str(tmp_path / "run"), steps=100_000, checkpoint_every=100_000)

    def body(ranks: Ranks) -> None:
        if ranks.rank == 1:

            def ask() -> None:
                written = tmp_path / "run" / "log.jsonl"
                while not (written.exists() and written.read_text()):
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGTERM)

            threading.Thread(target=ask, daemon=True).start()
        with pytest.raises(Interrupted) as stop:
            train(config)
        said = ranks.gather_json(str(stop.value))
        assert said[0] == said[1]
        (step,) = steps_kept(tmp_path / "run")
        assert said[0].startswith(f"stopped after step {step} of")

    on_two_ranks(body, tmp_path)


def test_a_killed_rank_comes_back_and_the_run_ends_as_if_nothing_had_happened(
    base: TrainConfig, tmp_path: Path
) -> None:
    config = replace(base, checkpoint_every=2)
    whole, killed = (replace(config, out=str(tmp_path / name)) for name in ("whole", "killed"))
    on_two_ranks(lambda _: train(whole) and None, tmp_path)
    (tmp_path / "config.json").write_text(to_json(killed))
    worker = [str(Path(__file__).with_name("killed_once.py")), str(tmp_path / "config.json")]
    torchrun("--max-restarts", "3", "--monitor-interval", "0.1", *worker)
    assert (tmp_path / "killed" / "killed").exists()
    weights, expected = (load_file(Path(c.out) / "model" / "model.safetensors") for c in (killed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_what_the_first_rank_refuses_all_refuse(base: TrainConfig, single: Path, tmp_path: Path) -> None:
    """None of them is left waiting."""
    config = replace(base, out=str(single), seed=1)

    def body(_: Ranks) -> None:
        with pytest.raises(ValueError, match="another configuration"):
            train(config)

    on_two_ranks(body, tmp_path)


def test_restarts_that_would_wait_in_vain_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(RuntimeError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), process_ranks(CPU):
        pass


def torchrun(*arguments: str) -> str:
    """What two ranks started by torchrun write to stderr; a failure is one of the test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_torchrun_runs_the_command_line(base: TrainConfig, single: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(replace(base, out=str(tmp_path / "run"))))
    said = torchrun("-m", "opencloc", "train", str(tmp_path / "config.json"), "--sharding", "fsdp")
    assert_same_run(tmp_path / "run", single)
    assert said.count("6 steps of 8 images") == 1  # one rank alone reports
