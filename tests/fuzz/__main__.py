"""Broken inputs of every kind, from a seed: `python -m tests.fuzz --inputs 20000 --seed 0 --out results/fuzz`.

Input number n of a kind depends on the seed, the kind and n alone: `--only tars:17` runs one again and raises what it
raises.  What lasts more than ten minutes ends the run with its traceback.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

HANGS_AFTER_S = 600
MEMORY = 24 << 30  # bytes of address space: an input that asks for more fails instead of ending the machine


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where nothing was found; writes figures.json and README.md into the folder `--out`."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="KIND, or KIND:NUMBER of one input", default="")
    options = parser.parse_args(arguments)
    only, _, number = options.only.partition(":")
    figures: dict[str, Any] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        prepare_process(Path(folder))
        from tests.fuzz.kinds import KINDS
        from tests.fuzz.world import World

        world = World(Path(folder))
        if number:
            KINDS[only].attempt(world, _rng(options.seed, only, int(number)))
            return 0
        for name, kind in KINDS.items():
            if only in ("", name):
                figures[name] = _try_kind(world, name, kind, options.inputs * kind.share // 100, options.seed)
    if options.out is not None:
        _write(options.out, options.seed, figures, time.perf_counter() - start)
    return int(any(of_kind["findings"] for of_kind in figures.values()))


def prepare_process(folder: Path) -> None:
    """No network, one thread, a bound on memory, a cache of its own, and libraries that keep quiet."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OPENCLOC_CACHE": str(folder / "cache")}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    warnings.simplefilter("ignore")
    logging.disable()
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()


def _rng(seed: int, kind: str, number: int) -> Random:
    return Random(f"{seed} {kind} {number}")


def _try_kind(world: Any, name: str, kind: Any, count: int, seed: int) -> dict[str, Any]:
    """How many inputs of a kind were tried, fine and refused, and the findings, one line each."""
    from tests.fuzz.world import Refused

    fine, findings = 0, []
    start = time.perf_counter()
    for number in range(count):
        faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
        try:
            kind.attempt(world, _rng(seed, name, number))
            fine += 1
        except Refused:
            pass
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # panics of libraries in Rust are no Exceptions
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error}"[:300].encode("ascii", "backslashreplace").decode()
            findings.append(f"{name}:{number}: {what} ({Path(last.filename).name}:{last.lineno})")
            print(findings[-1], file=sys.stderr, flush=True)
        finally:
            faulthandler.cancel_dump_traceback_later()
    refused = count - fine - len(findings)
    seconds = time.perf_counter() - start
    print(f"{name}: {fine} fine, {refused} refused, {len(findings)} findings in {seconds:.0f} s", flush=True)
    return {"tried": count, "fine": fine, "refused": refused, "findings": findings}


def _write(out: Path, seed: int, kinds: dict[str, Any], seconds: float) -> None:
    from benchmarks.common import facts
    from opencloc import files
    from tests.fuzz.kinds import KINDS

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    of_run = facts() | {"command": f"python -m tests.fuzz {' '.join(sys.argv[1:])}"}
    figures = {"commit": commit, "seed": seed, "seconds": round(seconds), "kinds": kinds} | of_run
    files.write_json(out / "figures.json", figures)
    rows = [(name, *(len(v) if isinstance(v, list) else v for v in one.values())) for name, one in kinds.items()]
    rows.append(("**all**", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    what = {name: (kind.attempt.__doc__ or "").split("\n")[0] for name, kind in KINDS.items()} | {"**all**": ""}
    lines = [
        "# Broken inputs",
        "",
        "Sound inputs with faults drawn from a seed.  `fine`: the result is sound, every part of the input is in it or",
        "counted.  `refused`: an error of a documented type names the file or argument.  Anything else is a finding.",
        "",
        f"    {of_run['command']}",
        "",
        f"Commit {commit[:10]}, {of_run['hardware']}, {seconds:,.0f} s.",
        "",
        "| kind | what is broken | tried | fine | refused | findings |",
        "|---|---|---:|---:|---:|---:|",
        *(f"| {row[0]} | {what[row[0]]} | " + " | ".join(f"{number:,}" for number in row[1:]) + " |" for row in rows),
    ]
    files.write_text(out / "README.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
