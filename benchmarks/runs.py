"""Many runs of a study, each a process of its own with one thread: who may start, what has a result, how it goes.

A run is a row of a study with a seed.  It works in OUT/NAME-SEED, logs to OUT/NAME-SEED.log, and leaves result.json
in its folder, which is written last: a run with a result is never done again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Run = tuple[str, int]  # name of a row, seed


def has_result(out: Path, run: Run) -> bool:
    name, seed = run
    return (out / f"{name}-{seed}" / "result.json").exists()


def run_all(
    todo: Sequence[Run],
    out: Path,
    at_once: int,
    *,
    program: Sequence[str],
    needs: Callable[[Run], Iterable[Run]],
) -> int:
    """Does the runs, `at_once` at a time, each when what it needs has a result; returns how many failed.

    `program`: the command that does the run named by `--run NAME SEED` behind it.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running: dict[subprocess.Popen[bytes], str] = {}  # process -> name of its run
    waiting, started, done, failed = list(todo), time.time(), 0, 0
    while waiting or running:
        ready = [run for run in waiting if all(has_result(out, need) for need in needs(run))]
        for run in ready[: at_once - len(running)]:
            waiting.remove(run)
            name = f"{run[0]}-{run[1]}"
            with (out / f"{name}.log").open("ab") as log:
                command = [*program, "--run", run[0], str(run[1])]
                running[subprocess.Popen(command, env=environment, stdout=log, stderr=log)] = name
        if not running:
            raise SystemExit(f"runs wait for runs that failed: {[name for name, _ in waiting]}")
        time.sleep(0.5)
        for process in [p for p in running if p.poll() is not None]:
            name = running.pop(process)
            done += 1
            failed += process.returncode != 0
            state = "done" if process.returncode == 0 else f"FAILED, see {out / name}.log"
            eta = (time.time() - started) / done * (len(todo) - done)
            print(f"{name}: {state}  ({done} of {len(todo)}, ETA {eta / 60:.0f} min)", flush=True)
    return failed


def this_program(module: str, *arguments: str) -> list[str]:
    """The command that runs a benchmark again, in a process of its own."""
    return [sys.executable, "-m", module, *arguments]
