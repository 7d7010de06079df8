"""What a labelling run came to, and how it is shown: live progress and the summary at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from opencloc.vesl.engine import NUM_EXAMPLES, Failures
from opencloc.vesl.label import ShardReport

INTERRUPTED = "interrupted"
LINE_EVERY_S = 30.0  # where the output is no terminal


@dataclass(kw_only=True)
class RunReport:
    """What a run came to."""

    finished_before: int = 0  # shards
    reports: list[ShardReport] = field(default_factory=list)  # of the shards finished in this run
    failed_shards: dict[str, str] = field(default_factory=dict)  # which -> why, after all attempts
    not_started: int = 0  # shards left by a run that stopped
    stopped: str | None = None  # why the run ended early
    seconds: float = 0.0
    images: int = 0  # worked on in this run, those of shards that failed later included
    regions: int = 0
    failed: int = 0  # images with an error

    @property
    def complete(self) -> bool:
        """Whether every shard has labels now; single images may have an error instead."""
        return self.stopped is None and not self.failed_shards

    @property
    def exit_code(self) -> int:
        """Exit status of the command: 0 complete, 130 interrupted, 1 if shards are left without labels."""
        return 0 if self.complete else 130 if self.stopped == INTERRUPTED else 1

    def failures(self) -> dict[str, Failures]:
        """What went wrong with single images and members, by reason, over all shards finished in this run."""
        total: dict[str, Failures] = {}
        for report in self.reports:
            for reason, one in [*report.failed.items(), *report.problems.items()]:
                sum_ = total.setdefault(reason, Failures())
                sum_.count += one.count
                examples = [f"{report.source}: {key}" for key in one.examples]
                sum_.examples = [*sum_.examples, *examples][:NUM_EXAMPLES]
        return total


def format_report(report: RunReport) -> str:
    """The summary of a run: figures, then everything that failed with its reason, then what to do about it."""
    speed = report.images / report.seconds if report.seconds else 0.0
    lines = [
        f"{len(report.reports)} shards finished ({report.finished_before} were before), {report.images:,} images, "
        f"{_per_image(report)} regions per image, {report.seconds:.0f} s, {speed:.1f} images/s"
    ]
    if failures := report.failures():
        lines.append("Images without labels:")
        for reason, one in sorted(failures.items(), key=lambda item: -item[1].count):
            lines.append(f"  {one.count:,} {reason}, for example {'; '.join(one.examples)}")
    if report.failed_shards:
        lines.append(f"{len(report.failed_shards)} shards given up:")
        lines += [f"  {shard}: {why}" for shard, why in report.failed_shards.items()]
    if report.stopped is not None:
        lines.append(f"Stopped: {report.stopped}. {report.not_started} shards are left.")
    if not report.complete:
        lines.append("Run the same command again to go on; finished shards are skipped.")
    if failures:
        lines.append("Run it with --retry-failed to redo only the images that failed.")
    return "\n".join(lines)


def _per_image(report: RunReport) -> str:
    return f"{report.regions / report.images:.2f}" if report.images else "no"


class Display:
    """Progress of a run, which it also counts into the report: a live bar on a terminal, else a line now and then."""

    def __init__(self, console: Console, num_shards: int, report: RunReport) -> None:
        self._console, self._report, self._num_shards = console, report, num_shards
        self._start = self._last_line = time.monotonic()
        self._bar = Bar(
            TextColumn("labelling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards  {task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_shards, figures="")

    def progress(self, images: int, regions: int, failed: int) -> None:
        """More images have been worked on."""
        self._report.images += images
        self._report.regions += regions
        self._report.failed += failed
        self._show()

    def shard_done(self) -> None:
        """One more shard is finished."""
        self._bar.advance(self._task)
        self._show()

    def shard_failed(self, shard: str, why: str, attempt: int, max_attempts: int) -> None:
        """An attempt at a shard failed; said at once, since it may take hours until the summary."""
        self._bar.console.print(
            f"{shard}: attempt {attempt} of {max_attempts} failed: {why}", markup=False, soft_wrap=True
        )

    def _show(self) -> None:
        self._bar.update(self._task, figures=self._figures())
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > LINE_EVERY_S:
            self._last_line = now
            line = f"{len(self._report.reports)} of {self._num_shards} shards, {self._figures()}"
            self._console.print(line, soft_wrap=True)

    def _figures(self) -> str:
        report, seconds = self._report, time.monotonic() - self._start
        return (
            f"{report.images:,} images, {report.images / seconds:.1f}/s, {_per_image(report)} regions per image, "
            f"{report.failed:,} failed"
        )

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
