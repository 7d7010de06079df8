"""A labelling run: which shards are still to be done, what becomes of those that fail, and the summary.

Resuming needs no state of its own: a shard is finished when its `_stats.json` lies there, which is written last.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from opencloc import files
from opencloc.config import Strict
from opencloc.data.sidecar import stats_path
from opencloc.errors import redacted
from opencloc.progress import Meter
from opencloc.vesl.config import LabelConfig, manifest_path, write_manifests
from opencloc.vesl.engine import NUM_EXAMPLES, Skipped
from opencloc.vesl.label import Progress, Shard, ShardReport, find_shards
from opencloc.vesl.workers import InProcess, Processes, RayActors, Workers

FAILED_SHARDS_IN_A_ROW = 10  # attempts, with no success between: then it is not the shards' fault
INTERRUPTED = "interrupted"
_AT_ONCE = 32  # small files read at the same time


@dataclass(frozen=True, kw_only=True)
class RunConfig(Strict):
    """Where and how the shards are labelled.  Nothing here changes what the labels are."""

    workers: int = 0
    """Local processes, each with its own models; 0: this process.  With Ray: most workers, 0 for all there is room
    for."""
    ray: str | None = None
    """Address of a Ray cluster, or `local`."""
    cpus_per_worker: float = 1.0
    """CPUs of a Ray worker."""
    gpus_per_worker: float = 0.0
    """GPUs of a Ray worker; may be a fraction, so that several share one."""
    retry_failed: bool = False
    """Also redo the images with an error in finished shards."""
    max_attempts: int = 3
    """How often a shard is tried before it is given up."""

    def __post_init__(self) -> None:
        least = {"workers": 0, "max_attempts": 1, "cpus_per_worker": 0, "gpus_per_worker": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")


@dataclass(kw_only=True)
class RunReport:
    """What a run came to."""

    folders: tuple[str, ...] = ()  # where the labels lie
    finished_before: int = 0  # shards
    reports: list[ShardReport] = field(default_factory=list)  # of the shards finished in this run
    failed_shards: dict[str, str] = field(default_factory=dict)  # which -> why, after all attempts
    not_started: int = 0  # shards left by a run that stopped
    stopped: str | None = None  # why the run ended early
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every shard has labels now; single images may have an error instead."""
        return self.stopped is None and not self.failed_shards

    @property
    def exit_code(self) -> int:
        """Exit status of the command: 0 complete, 130 interrupted, 1 if a shard or every image is without labels."""
        if self.stopped == INTERRUPTED:
            return 130
        return 0 if self.complete and (self.labelled or not self.images) else 1

    @property
    def labelled(self) -> int:
        """Images of the shards finished in this run that have labels now, if only none found."""
        return sum(report.labelled for report in self.reports)

    @property
    def images(self) -> int:
        """Images of the shards finished in this run, skipped ones included."""
        return sum(report.images for report in self.reports)

    def skipped(self) -> dict[str, Skipped]:
        """What has no labels in the shards finished in this run, by reason, the most frequent first."""
        total: dict[str, Skipped] = defaultdict(Skipped)
        for report in self.reports:
            for reason, one in report.skipped.items():
                total[reason].count += one.count
                examples = [f"{report.source}: {key}" for key in one.examples]
                total[reason].examples = [*total[reason].examples, *examples][:NUM_EXAMPLES]
        return dict(sorted(total.items(), key=lambda item: -item[1].count))


def format_report(report: RunReport) -> str:
    """The summary of a run: where the labels lie, the figures, what was skipped and why, what to do about it."""
    regions = sum(one.regions for one in report.reports)
    speed = f", {report.images / report.seconds:.1f} images/s" if report.seconds else ""
    skipped = report.skipped()
    before = f" ({report.finished_before} were finished before)" if report.finished_before else ""
    lines = [
        *report.folders,
        f"{report.labelled:,} images labelled with {regions:,} regions, {report.images - report.labelled:,} skipped, "
        f"in {_shards(len(report.reports))}{before}; {report.seconds:.0f} s{speed}",
    ]
    lines += [
        f"  skipped: {reason} ({one.count:,}), for example {'; '.join(one.examples)}" for reason, one in skipped.items()
    ]
    if report.failed_shards:
        lines.append(f"{_shards(len(report.failed_shards))} given up:")
        lines += [f"  {shard}: {why}" for shard, why in report.failed_shards.items()]
    if report.stopped is not None:
        lines.append(f"Stopped: {report.stopped}. {_shards(report.not_started)} left.")
    if not report.complete:
        lines.append("Run the same command again to go on; finished shards are kept.")
    if skipped:
        lines.append("--retry-failed tries only the skipped images again.")
    return redacted("\n".join(lines))


def _shards(count: int) -> str:
    return f"{count} shard{'' if count == 1 else 's'}"


def run_label(config: LabelConfig, run: RunConfig | None = None) -> RunReport:
    """Labels every shard of the input that is not finished, and returns what happened.

    Running again with the same configuration goes on where the last run ended, however it ended.  Ctrl-C ends the run
    between two files and is reported in `stopped`.  A shard that fails, or whose worker dies, is tried again up to
    `max_attempts` times, after the others.

    Raises FileNotFoundError or ValueError for input that is not there, and ValueError if labels of this name were made
    with another configuration, or the run had to stop before it labelled anything.
    """
    run = run or RunConfig()
    start = time.perf_counter()
    shards = find_shards(config)
    folders = sorted({os.path.dirname(shard.sidecar) for shard in shards})
    pending, finished = _split(config, shards)
    new_manifests = write_manifests(config, folders)
    if run.retry_failed:
        redo = _with_skipped(finished)
        pending, finished = [*pending, *redo], [shard for shard in finished if shard not in redo]
    report = RunReport(folders=tuple(folder or "." for folder in folders), finished_before=len(finished))
    if finished and pending:
        _say(f"resuming: {len(finished)} of {len(shards)} shards are finished, the next is {pending[0].label}")
    if pending:
        try:
            meter = Meter("labelling", _expected_images(pending, report))
            with meter, _workers(config, run, meter.advance) as workers:
                for _ in _drive(workers, deque((shard, 1) for shard in pending), run.max_attempts, report):
                    meter.total = _expected_images(pending, report)
        except KeyboardInterrupt:
            report.stopped = INTERRUPTED
        report.not_started = len(pending) - len(report.reports) - len(report.failed_shards)
    if report.stopped and report.stopped != INTERRUPTED and not (report.reports or finished):
        for path in new_manifests:  # or the corrected command would be another configuration
            if local := files.local_path(path):
                os.unlink(local)
        raise ValueError(report.stopped)
    if report.complete:
        _remove_partial_files(config, shards)
    report.seconds = time.perf_counter() - start
    return report


def _drive(workers: Workers, queue: deque[tuple[Shard, int]], max_attempts: int, report: RunReport) -> Iterator[None]:
    """Hands out the shards until all are finished or given up, or the run has to stop; yields after each one done."""
    attempts: dict[Shard, int] = {}
    failures_in_a_row = 0
    while queue or attempts:
        while queue and workers.idle():
            shard, number = queue.popleft()
            attempts[shard] = number
            workers.submit(shard)
        for outcome in workers.outcomes():
            number = attempts.pop(outcome.shard)
            if outcome.report is not None:
                failures_in_a_row = 0
                report.reports.append(outcome.report)
                yield
                continue
            failures_in_a_row += 1
            if outcome.fatal:
                report.stopped = outcome.problem
                return
            # Said at once, since the summary may be hours away.
            _say(f"{outcome.shard.label}: attempt {number} of {max_attempts} failed: {outcome.problem}")
            if number < max_attempts:
                queue.append((outcome.shard, number + 1))
            else:
                report.failed_shards[outcome.shard.label] = outcome.problem
            if failures_in_a_row == FAILED_SHARDS_IN_A_ROW:
                report.stopped = f"{FAILED_SHARDS_IN_A_ROW} attempts failed in a row, last: {outcome.problem}"
                return


def _expected_images(shards: Sequence[Shard], report: RunReport) -> int | None:
    """How many images the shards hold; of tars, as many each as the finished ones on average, None before the first."""
    if all(shard.span is not None for shard in shards):
        return sum(shard.span[1] - shard.span[0] for shard in shards if shard.span is not None)
    return round(report.images / len(report.reports) * len(shards)) if report.reports else None


def _say(line: str) -> None:
    print(redacted(line), file=sys.stderr, flush=True)


def _workers(config: LabelConfig, run: RunConfig, progress: Progress) -> Workers:
    if run.ray is not None:
        return RayActors(
            config,
            run.retry_failed,
            progress,
            address=run.ray,
            count=run.workers,
            num_cpus=run.cpus_per_worker,
            num_gpus=run.gpus_per_worker,
        )
    if run.workers:
        return Processes(config, run.retry_failed, progress, run.workers)
    return InProcess(config, run.retry_failed, progress)


def _split(config: LabelConfig, shards: Iterable[Shard]) -> tuple[list[Shard], list[Shard]]:
    """(unfinished, finished) shards, each in order.

    Raises ValueError for finished ones without a manifest, as nobody knows how they were made.
    """
    by_folder: dict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        by_folder[os.path.dirname(shard.sidecar)].append(shard)
    finished: set[Shard] = set()
    for folder, own in by_folder.items():
        names = _names(folder)
        done = {shard for shard in own if _outputs(shard) <= names}
        manifest = manifest_path(folder, config.name)
        if done and os.path.basename(manifest) not in names:
            raise ValueError(f"{manifest} is missing, but labels {config.name!r} lie beside it: choose another name")
        finished |= done
    ordered = [shard for own in by_folder.values() for shard in own]
    return [one for one in ordered if one not in finished], [one for one in ordered if one in finished]


def _names(folder: str) -> set[str]:
    """What lies in a folder, by one listing: asking for every file would take hours on an object store."""
    try:
        return {os.path.basename(path) for path in files.children(folder)}
    except FileNotFoundError:
        return set()


def _outputs(shard: Shard) -> set[str]:
    """Names of the two files of a finished shard."""
    return {os.path.basename(shard.sidecar), os.path.basename(stats_path(shard.sidecar))}


def _remove_partial_files(config: LabelConfig, shards: Iterable[Shard]) -> None:
    """Removes what killed runs left of these files under hidden names (`files.new_file` makes them).

    Only after a complete run: jobs that share a folder write the manifest when they start.
    """
    by_folder: dict[str, set[str]] = defaultdict(set)
    for shard in shards:
        folder = os.path.dirname(shard.sidecar)
        by_folder[folder] |= {*_outputs(shard), os.path.basename(manifest_path(folder, config.name))}
    for folder, outputs in by_folder.items():
        if (local := files.local_path(folder)) is None:
            continue
        for name in _names(folder):
            if name.startswith(".") and name.endswith(".partial") and name[1:].rsplit(".", 2)[0] in outputs:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(local, name))


def _with_skipped(finished: Sequence[Shard]) -> set[Shard]:
    """The finished shards of which some image was skipped; their stats are read many at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return {shard for shard, has in zip(finished, pool.map(_has_skipped, finished), strict=True) if has}


def _has_skipped(shard: Shard) -> bool:
    return bool(json.loads(files.read_bytes(stats_path(shard.sidecar)))["skipped"])
