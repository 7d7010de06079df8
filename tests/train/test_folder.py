"""The folder of a run: what resumes, what is refused, what a failure leaves, and what is never overwritten."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opencloc.config import DataConfig, LossConfig, ModelConfig, OptimConfig, to_json
from opencloc.model.cloc import ClocConfig
from opencloc.train import loop
from opencloc.train.distributed import ALONE
from opencloc.train.folder import run_folder
from opencloc.train.loop import train
from tests.train.runs import MakeConfig, cut_off, log, steps_kept, tree

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
KILLED_ONCE = Path(__file__).with_name("killed_once.py")


@pytest.mark.parametrize(("optimizer", "patch_dropout"), [("adamw", 0.0), ("muon", 0.5)])
def test_resumed_run_equals_the_uninterrupted_one_byte_for_byte(
    optimizer: Any, patch_dropout: float, config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(
        tmp_path / "run",
        keep_checkpoints=3,
        optim=OptimConfig(name=optimizer, lr=1e-3, warmup_steps=2),
        data=DataConfig(train=("scenes:easy",), num_workers=0, patch_dropout=patch_dropout),
    )
    train(run)
    model, last = tree(tmp_path / "run/model"), tree(tmp_path / "run/checkpoints/step_0000006")
    cut_off(tmp_path / "run", after=2)
    train(run)
    assert tree(tmp_path / "run/model") == model
    assert tree(tmp_path / "run/checkpoints/step_0000006") == last
    assert f"resuming {run.out} from step 2 of 6" in capsys.readouterr().err


def test_killed_run_resumes_to_the_same_model(config: MakeConfig, tmp_path: Path) -> None:
    """kill -9 of a process with a loader worker: nothing of it holds the folder."""
    data = DataConfig(train=("scenes:easy",), num_workers=1)
    killed = config(tmp_path / "killed", data=data)
    (tmp_path / "config.json").write_text(to_json(killed))
    first = subprocess.run([sys.executable, KILLED_ONCE, tmp_path / "config.json"], env=ONE_THREAD, capture_output=True)
    assert first.returncode == -signal.SIGKILL
    assert steps_kept(tmp_path / "killed") == [2]
    partial = tmp_path / "killed/checkpoints/.step_0000004.elsewhere-1.partial"
    partial.mkdir()
    train(killed)
    assert tree(train(config(tmp_path / "whole"))) == tree(tmp_path / "killed/model")
    assert not partial.exists()


def test_a_finished_run_is_left_as_it_is(
    config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(tmp_path / "run", steps=2)
    train(run)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "run").rglob("*")}
    assert train(replace(run, log_every=2)) == tmp_path / "run/model"
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "run").rglob("*")} == before
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ModelConfig(init_from="nothere")},
        {"model": ModelConfig(tokenizer="nothere", image_size=32)},
        {"data": DataConfig(train=("coco:/nowhere",))},
        {"data": DataConfig(train=("scenes:easy", "scenes:rich"), weights=(1.0, 1e-9), num_workers=0)},
        {"device": "cuda:99"},
    ],
)
def test_a_failed_start_does_not_stop_the_corrected_command(
    wrong: dict[str, Any], config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError)):
        train(config(tmp_path / "run", **wrong))
    train(config(tmp_path / "run", steps=1))


def test_a_run_that_came_to_no_checkpoint_leaves_the_folder_free(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(config(tmp_path, seed=7)))
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    train(config(tmp_path, steps=1))
    assert len(log(tmp_path)) == 1


def test_another_configuration_in_the_same_folder_is_refused_by_field(config: MakeConfig, tmp_path: Path) -> None:
    train(config(tmp_path, steps=1))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"another configuration.*\n  optim.lr: 0.001 there, 0.5 asked for$"):
        train(config(tmp_path, steps=1, optim=OptimConfig(lr=0.5, warmup_steps=2)))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["model", "checkpoints/step_0000001", "config.json"])
def test_a_folder_of_something_else_is_refused_and_untouched(name: str, config: MakeConfig, tmp_path: Path) -> None:
    """Such as the folder of a model."""
    if name == "config.json":
        ClocConfig().save_pretrained(tmp_path)
    else:
        (tmp_path / name).mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json of a run|not a valid TrainConfig"):
        train(config(tmp_path))
    assert tree(tmp_path) == before | {".lock": b""}


def test_two_trainings_in_one_folder_are_one_too_many(config: MakeConfig, tmp_path: Path) -> None:
    run = config(tmp_path / "run", steps=1)
    with run_folder(run, ALONE), pytest.raises(ValueError, match=r"run: another training is running in this folder"):
        train(run)
    train(run)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", truncate),
        ("optimizer.safetensors", truncate),
        ("tokenizer.json", truncate),
        ("train_state.json", lambda path: path.write_text("{")),
        ("train_state.json", Path.unlink),
        ("model.safetensors", Path.unlink),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_taken(
    name: str, damage: Callable[[Path], Any], config: MakeConfig, tmp_path: Path
) -> None:
    run = config(tmp_path / "run", keep_checkpoints=2)
    train(run)
    model = tree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/model")
    damage(tmp_path / "run/checkpoints/step_0000006" / name)
    with pytest.warns(UserWarning, match=f"step_0000006/{name} is .*put aside as step_0000006.broken"):
        train(run)
    assert tree(tmp_path / "run/model") == model
    assert steps_kept(tmp_path / "run") == [4, 6]


def test_where_no_checkpoint_can_be_read_nothing_is_started_and_nothing_removed(
    config: MakeConfig, tmp_path: Path
) -> None:
    train(config(tmp_path))
    cut_off(tmp_path, after=6)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        truncate(checkpoint / "model.safetensors")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)no checkpoint can be read.*step_0000006/model.*step_0000004/model"):
        train(config(tmp_path))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("lr", "every"),
    [(1e30, {"checkpoint_every": 1}), (1e30, {"log_every": 3}), (3e38, {"checkpoint_every": 1, "log_every": 9})],
)
def test_nothing_that_is_not_finite_is_saved_or_logged(
    lr: float, every: dict[str, int], config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two good steps with a checkpoint, then a step far too long."""
    monkeypatch.setattr(loop, "learning_rate", lambda step, *_: 1e-3 if step < 2 else lr)
    with pytest.raises(FloatingPointError, match="not finite"):
        train(config(tmp_path, steps=20, **every))
    assert 2 in steps_kept(tmp_path)
    assert not (tmp_path / "model").exists()
    for step in steps_kept(tmp_path):
        saved = load_file(tmp_path / f"checkpoints/step_{step:07d}/model.safetensors")
        assert all(torch.isfinite(value).all() for value in saved.values())
    log(tmp_path)


def test_only_the_newest_checkpoints_stay(config: MakeConfig, tmp_path: Path) -> None:
    train(config(tmp_path, keep_checkpoints=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000006"]


@pytest.mark.parametrize("region_weight", [0.0, 1.0])
def test_a_model_says_whether_its_region_parts_were_trained(
    region_weight: float, config: MakeConfig, tmp_path: Path
) -> None:
    train(config(tmp_path, steps=1, loss=LossConfig(region_weight=region_weight)))
    saved = json.loads((tmp_path / "model/config.json").read_text())
    assert saved["regions_trained"] == (region_weight > 0)


def test_a_full_disk_is_one_sentence_that_names_the_file(config: MakeConfig, tmp_path: Path) -> None:
    """As near as an ordinary user comes to one: no file may grow beyond 200 kB."""
    (tmp_path / "config.json").write_text(to_json(config(tmp_path / "run")))
    done = subprocess.run(
        [sys.executable, "-m", "opencloc", "train", str(tmp_path / "config.json")],
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("opencloc train:")]
    assert "step_0000002" in line
    assert "Traceback" not in done.stderr
    assert not steps_kept(tmp_path / "run")
