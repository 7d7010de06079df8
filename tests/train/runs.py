"""What the tests of training ask of a run's folder, and a group of two ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist

from opencloc.config import TrainConfig
from opencloc.train.checkpoint import list_checkpoints, step_of
from opencloc.train.distributed import Ranks, process_ranks

MakeConfig = Callable[..., TrainConfig]
PATIENCE_S = 300  # for processes on a busy machine


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


def on_two_ranks(body: Callable[[Ranks], None], folder: Path) -> None:
    """Runs `body` in two processes that form a group; raises what one of them raised.

    They are forked from a process of their own that has no threads: those of the tests' own process (of databases,
    servers, other libraries) would be cut off in the middle of anything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "opencloc.train.loop", "opencloc.mllm.train"])
    content = cloudpickle.dumps(body)
    processes = [context.Process(target=_be_rank, args=(rank, content, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    errors = [path.read_text() for path in sorted(folder.glob("error_*"))]
    exit_codes = [process.exitcode for process in processes]
    assert not errors, "\n".join([f"exit codes {exit_codes}", *errors])
    assert exit_codes == [0, 0]


def _be_rank(rank: int, content: bytes, folder: Path) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
        with process_ranks(torch.device("cpu")) as (ranks, _):
            cloudpickle.loads(content)(ranks)
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error_{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the other one may be waiting for this one
    os._exit(0)
