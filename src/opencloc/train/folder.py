"""The folder of a run: one training at a time writes in it, and what an earlier one left there is found."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from opencloc import files
from opencloc.config import MAY_CHANGE, RunConfig, changed_fields, from_json
from opencloc.train.checkpoint import list_checkpoints, problem_of, set_aside
from opencloc.train.distributed import Ranks


@contextmanager
def run_folder(config: RunConfig, ranks: Ranks) -> Iterator[Path | None]:
    """Holds the folder of a run, and gives what is there: the final model, the checkpoint to go on from, or None.

    The first rank holds it, by a lock that falls with its process.  Raises ValueError on all ranks if another training
    holds it, if it is that of another configuration or of something else, or if no checkpoint can be read.
    """
    out = Path(config.out)
    with ExitStack() as stack:
        found = ranks.from_first(lambda: _take(out, config, stack))
        yield None if found is None else out / found


def _take(out: Path, config: RunConfig, stack: ExitStack) -> str | None:
    """Holds the folder until the stack is left; what is there, as a path below it."""
    stack.enter_context(files.held(out, "another training is running in this folder"))
    finished, checkpoints, settings = out / "model", list_checkpoints(out / "checkpoints"), out / "config.json"
    there = from_json(type(config), settings.read_bytes(), settings) if settings.exists() else None
    if not checkpoints and not finished.exists():
        return None  # a start that failed leaves the folder free
    if there is None:
        name = (finished if finished.exists() else checkpoints[0]).relative_to(out)
        raise ValueError(f"{out} holds {name} but no config.json of a run; choose another --out")
    if changed := changed_fields(there, config, but=MAY_CHANGE):
        lines = "\n".join(f"  {name}: {values}" for name, values in changed.items())
        raise ValueError(f"{out} holds a run with another configuration; choose another --out\n{lines}")
    files.sweep(out)
    files.sweep(out / "checkpoints")
    if finished.exists():
        return finished.name
    return str(_newest_sound(checkpoints).relative_to(out))


def _newest_sound(checkpoints: list[Path]) -> Path:
    """The newest checkpoint that can be read.  Newer ones are named in a warning and put aside."""
    problems: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints):
        if (problem := problem_of(checkpoint)) is None:
            for broken, why in problems:
                warnings.warn(f"{why}; put aside as {set_aside(broken).name}", stacklevel=2)
            return checkpoint
        problems.append((checkpoint, problem))
    raise ValueError(
        "no checkpoint can be read; remove them to start from the beginning\n"
        + "\n".join(f"  {problem}" for _, problem in problems)
    )
