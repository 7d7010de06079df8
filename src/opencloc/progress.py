"""Progress of long work on stderr: done, total, rate and time left, from the first seconds on.

A terminal gets a bar; a file or pipe gets a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
QUIET_S = 3.0  # work that takes less says nothing in a file or pipe
LINE_EVERY_S = 30.0  # between lines in a file or pipe


class Meter:
    """A counter that is shown.  A context manager; `advance` counts, `total` may be None for unknown,
    and may be set when it is known better.

    `start` were done before: the rate and the time left are of the rest.  `note` is shown behind the figures.
    """

    def __init__(self, what: str, total: int | None, *, unit: str = "images", start: int = 0) -> None:
        self.what, self.total, self.unit, self.done, self.note = what, total, unit, start, ""
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=total, completed=start, note="")
        self._lines = not console.is_terminal
        self._first = start
        self._start = self._said = time.monotonic()
        self._wait_s = QUIET_S

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Counts, and shows it."""
        self.done += count
        self._bar.update(self._task, completed=self.done, total=self.total, note=self.note)
        now = time.monotonic()
        if self._lines and now - self._said >= self._wait_s:
            self._said, self._wait_s = now, LINE_EVERY_S
            print(self._line(now - self._start), file=sys.stderr, flush=True)

    def _line(self, elapsed_s: float) -> str:
        rate = (self.done - self._first) / elapsed_s
        of = "" if self.total is None else f" of {self.total:,}"
        left = ""
        if self.total is not None and rate > 0:
            left = f", {_duration((self.total - self.done) / rate)} left"
        return f"{self.what}: {self.done:,}{of} {self.unit}, {rate:,.1f}/s{left}" + (
            f"; {self.note}" if self.note else ""
        )


def track(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "images") -> Iterator[T]:
    """The items, counted and shown as they are used; `total` is their number where they do not say it."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Meter(what, total, unit=unit) as meter:
        for item in items:
            yield item
            meter.advance()


class _Rate(ProgressColumn):
    """Items per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.1f} {self._unit}/s")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
