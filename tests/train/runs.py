"""What the tests of training ask of a run's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opencloc.config import TrainConfig
from opencloc.train.checkpoint import list_checkpoints, step_of

MakeConfig = Callable[..., TrainConfig]


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def log(run: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl.  Strict: NaN is no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]


def steps_kept(run: Path) -> list[int]:
    """The steps of the checkpoints."""
    return [step_of(checkpoint) for checkpoint in list_checkpoints(run / "checkpoints")]


def cut_off(run: Path, after: int) -> None:
    """Makes a finished run one that was killed after a step, before it wrote anything newer."""
    for checkpoint in list_checkpoints(run / "checkpoints"):
        if step_of(checkpoint) > after:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "model")
    (run / "log.jsonl").write_text("".join((run / "log.jsonl").read_text().splitlines(keepends=True)[:after]))
