"""A labelling run: which shards are still to be done, and what becomes of those that fail.

Owns resume and retries.  `label.py` labels one shard, `workers.py` says where that happens, `run_report.py` holds and
shows what came of it.

Resume needs no state of its own: a shard is finished when its `_stats.json` lies there, which is written last.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console

from opencloc import files
from opencloc.data.sidecar import stats_path
from opencloc.vesl.config import LabelConfig, manifest_path, write_manifests
from opencloc.vesl.label import Progress, Shard, find_shards
from opencloc.vesl.run_report import INTERRUPTED, Display, RunReport, format_report
from opencloc.vesl.workers import InProcess, Processes, RayActors, Workers

FAILED_SHARDS_IN_A_ROW = 10  # attempts, with no success between: then it isn't the shards' fault


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how the shards are labelled.  Nothing here changes what the labels are.

    Raises ValueError, naming the field, for values out of range.
    """

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
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if self.cpus_per_worker < 0 or self.gpus_per_worker < 0:
            raise ValueError(f"needs of a worker can't be negative: {self.cpus_per_worker}, {self.gpus_per_worker}")


def run_label(config: LabelConfig, run: RunConfig | None = None, *, console: Console | None = None) -> RunReport:
    """Labels every shard of the input that isn't finished, and returns what happened after printing it.

    Running again with the same configuration goes on where the last run ended, however it ended.  Ctrl-C ends the run
    between two files and is reported in `stopped`.  A shard that fails, or whose worker dies, is tried again up to
    `max_attempts` times, after the others.

    Raises FileNotFoundError or ValueError for input that isn't there, and ValueError if labels of this name were made
    with another configuration.
    """
    run, console = run or RunConfig(), console or Console(stderr=True)
    start = time.perf_counter()
    shards = find_shards(config)
    pending, finished = _split(config, shards)
    write_manifests(config, sorted({os.path.dirname(shard.sidecar) for shard in shards}))
    if run.retry_failed:
        redo = {shard for shard in finished if _has_failures(shard)}
        pending, finished = [*pending, *redo], [shard for shard in finished if shard not in redo]
    report = RunReport(finished_before=len(finished))
    if pending:
        display = Display(console, len(pending), report)
        try:
            with display, _workers(config, run, display.progress) as workers:
                _drive(workers, deque((shard, 1) for shard in pending), run.max_attempts, report, display)
        except KeyboardInterrupt:
            report.stopped = INTERRUPTED
        report.not_started = len(pending) - len(report.reports) - len(report.failed_shards)
    report.seconds = time.perf_counter() - start
    console.print(format_report(report), markup=False, highlight=False, soft_wrap=True)
    return report


def _drive(
    workers: Workers, queue: deque[tuple[Shard, int]], max_attempts: int, report: RunReport, display: Display
) -> None:
    """Hands out the shards until all are finished or given up, or the run has to stop."""
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
                display.shard_done()
                continue
            failures_in_a_row += 1
            display.shard_failed(outcome.shard.label, outcome.problem, number, max_attempts)
            if outcome.fatal:
                report.stopped = outcome.problem
                return
            if number < max_attempts:
                queue.append((outcome.shard, number + 1))
            else:
                report.failed_shards[outcome.shard.label] = outcome.problem
            if failures_in_a_row == FAILED_SHARDS_IN_A_ROW:
                report.stopped = f"{FAILED_SHARDS_IN_A_ROW} attempts failed in a row, last: {outcome.problem}"
                return


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
    """(unfinished, finished) shards, each in order; half-written files of the unfinished ones are removed.

    Raises ValueError for finished ones without a manifest, as nobody knows how they were made.
    """
    by_folder: dict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        by_folder[os.path.dirname(shard.sidecar)].append(shard)
    finished: set[Shard] = set()
    for folder, own in by_folder.items():
        try:  # one listing per folder: asking for every file would take hours on an object store
            names = {os.path.basename(path) for path in files.children(folder)}
        except FileNotFoundError:
            continue
        done = {shard for shard in own if _outputs(shard) <= names}
        manifest = manifest_path(folder, config.name)
        if done and os.path.basename(manifest) not in names:
            raise ValueError(f"{manifest} is missing, but labels {config.name!r} lie beside it: choose another name")
        finished |= done
        _remove_partial_files(folder, names, set(own) - done)
    ordered = [shard for own in by_folder.values() for shard in own]
    return [one for one in ordered if one not in finished], [one for one in ordered if one in finished]


def _outputs(shard: Shard) -> set[str]:
    """Names of the two files of a finished shard."""
    return {os.path.basename(shard.sidecar), os.path.basename(stats_path(shard.sidecar))}


def _remove_partial_files(folder: str, names: set[str], unfinished: set[Shard]) -> None:
    """Removes what a killed run left under temporary names (`files.write_bytes` makes them) for these shards."""
    if (local := files.local_path(folder)) is None:
        return
    outputs = {name for shard in unfinished for name in _outputs(shard)}
    for name in names:
        if name.startswith(".") and name.endswith(".tmp") and name[1:].rsplit(".", 2)[0] in outputs:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(local, name))


def _has_failures(shard: Shard) -> bool:
    stats = json.loads(files.read_bytes(stats_path(shard.sidecar)))
    return bool(stats["failed"] or stats["problems"])
