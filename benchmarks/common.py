"""What the benchmarks share: the clock, taking turns, the facts of a run, and how tables and figures are written.

Imports torch alone, since `open_clip_step.py` runs where opencloc is not installed.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def timed(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of one call: `busy_s` of the GPU by its events, or of this process's threads on a CPU; and `wall_s`."""
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return {"busy_s": begin.elapsed_time(end) / 1e3, "wall_s": time.perf_counter() - started}
    busy = time.process_time()
    step()
    return {"busy_s": time.process_time() - busy, "wall_s": time.perf_counter() - started}


def take_turns(
    runners: Mapping[str, Callable[[int], Result]], rounds: int, fewer: Mapping[str, int] | None = None
) -> dict[str, list[Result]]:
    """What each runner returned, round by round, so that whatever else the machine does hits all of them alike.

    A runner is called with the number of the round.  Round 0 only warms up and is not kept.  The order turns by one
    place every round.  `fewer` names runners that are not warmed up and take part in so many rounds only.
    """
    found: dict[str, list[Result]] = {name: [] for name in runners}
    names = list(runners)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if fewer is not None and name in fewer and not 0 < number <= fewer[name]:
                continue
            result = runners[name](number)
            if number:
                found[name].append(result)
            print(f"{'warm-up' if number == 0 else f'round {number}':8s} {name}: {result}", file=sys.stderr, flush=True)
    return found


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """The command, the hardware and the versions, as every `figures.json` records them."""
    device = device or torch.device("cpu")
    program = Path(sys.argv[0])
    return {
        "command": shlex.join(["python", "-m", f"{program.parent.name}.{program.stem}", *sys.argv[1:]]),
        "hardware": hardware(device),
        "versions": {"python": platform.python_version()} | versions("torch", "transformers", "numpy", "pillow"),
    }


def hardware(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread(s)"


def processor_name() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """The versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "---") -> str:
    """A Markdown table; floats are shown with three significant digits.  `align`: the rule below all but column one."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + f"{align}|" * (len(head) - 1)]
    for row in rows:
        cells = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save(out: Path, figures: Any, text: str | None = None, page: str = "README.md", data: str = "figures.json") -> None:
    """Writes the figures to OUT/`data`; with a text also writes that to OUT/`page` and prints it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / data).write_text(json.dumps(figures, indent=1) + "\n")
    if text is not None:
        (out / page).write_text(text)
        print(text)
