"""Where shards are worked on: in this process, in local processes, or in Ray actors.

A job is any function of a shard that can be pickled; `attempt` is the labeller's, the index of a photo library has one
of its own (`opencloc.search.index`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, runtime_checkable

import torch

from opencloc.config import Strict
from opencloc.errors import redacted
from opencloc.vesl.captioners import CaptionerError
from opencloc.vesl.config import LabelConfig
from opencloc.vesl.engine import ModelFailure
from opencloc.vesl.label import Progress, Shard, label_shard, load_engine

FAILED_SHARDS_IN_A_ROW = 10  # attempts, with no success between: then it is not the shards' fault
_LEAVE_S = 10.0  # what a worker has to leave by itself
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class WorkersConfig(Strict):
    """Where the shards are worked on.  Nothing here changes what comes out."""

    workers: int = 0
    """Local processes, each with its own models; 0: this process.  With Ray: most workers, 0 for all there is room
    for."""
    ray: str | None = None
    """Address of a Ray cluster, or `local`."""
    cpus_per_worker: float = 1.0
    """CPUs of a Ray worker."""
    gpus_per_worker: float = 0.0
    """GPUs of a Ray worker; may be a fraction, so that several share one."""
    max_attempts: int = 3
    """How often a shard is tried before it is given up."""

    def __post_init__(self) -> None:
        least = {"workers": 0, "max_attempts": 1, "cpus_per_worker": 0, "gpus_per_worker": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one attempt at a shard ended."""

    shard: Any  # what was given to `Workers.submit`; its `label` is its name for people
    report: Any = None  # the job's own, with `images`, their number; None: it failed
    problem: str = ""  # why it failed
    fatal: bool = False  # no shard can succeed: the models cannot be loaded


Job = Callable[[Any, Progress | None], Outcome]
"""One attempt at a shard; what goes wrong is in the outcome, never raised."""


@runtime_checkable
class Workers(Protocol):
    """A fixed number of workers, each busy with at most one shard.  A context manager; leaving it stops them."""

    def idle(self) -> int:
        """How many can take a shard now."""
        ...

    def submit(self, shard: Any) -> None:
        """Gives a shard to an idle worker."""
        ...

    def outcomes(self) -> Iterator[Outcome]:
        """Waits a moment for what has ended since; progress is reported meanwhile."""
        ...

    def __enter__(self) -> Workers: ...

    def __exit__(self, *_: object) -> None: ...


@runtime_checkable
class Tally(Protocol):
    """What `drive` writes of a run."""

    reports: list[Any]  # of the shards that succeeded
    failed_shards: dict[str, str]  # which -> why, after all attempts
    stopped: str | None  # why the run ended early


def start_workers(job: Job, where: WorkersConfig, progress: Progress) -> Workers:
    """The workers that a configuration asks for.  Raises as `RayActors`."""
    if where.ray is not None:
        return RayActors(
            job,
            progress,
            address=where.ray,
            count=where.workers,
            num_cpus=where.cpus_per_worker,
            num_gpus=where.gpus_per_worker,
        )
    return Processes(job, progress, where.workers) if where.workers else InProcess(job, progress)


def drive(workers: Workers, queue: deque[tuple[Any, int]], max_attempts: int, tally: Tally) -> Iterator[None]:
    """Hands out the shards until all are finished or given up, or the run has to stop; yields after each one done.

    `queue`: the shards, each with the number of its attempt.
    """
    attempts: dict[Any, int] = {}
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
                tally.reports.append(outcome.report)
                yield
                continue
            failures_in_a_row += 1
            if outcome.fatal:
                tally.stopped = outcome.problem
                return
            # Said at once, since the summary may be hours away.
            say(f"{outcome.shard.label}: attempt {number} of {max_attempts} failed: {outcome.problem}")
            if number < max_attempts:
                queue.append((outcome.shard, number + 1))
            else:
                tally.failed_shards[outcome.shard.label] = outcome.problem
            if failures_in_a_row == FAILED_SHARDS_IN_A_ROW:
                tally.stopped = f"{FAILED_SHARDS_IN_A_ROW} attempts failed in a row, last: {outcome.problem}"
                return


def say(line: str) -> None:
    """Says a line to whoever runs this, on stderr."""
    print(redacted(line), file=sys.stderr, flush=True)


def attempt(config: LabelConfig, retry: bool, shard: Shard, progress: Progress | None = None) -> Outcome:
    """Labels one shard here; what goes wrong is in the outcome, never raised."""
    try:
        engine = load_engine(config)
    except Exception as error:
        return Outcome(shard=shard, problem=describe(error), fatal=True)
    try:
        return Outcome(shard=shard, report=label_shard(config, shard, engine=engine, progress=progress, retry=retry))
    except ModelFailure as error:
        load_engine.cache_clear()  # the next attempt loads it afresh
        return Outcome(shard=shard, problem=str(error))
    except Exception as error:
        return Outcome(shard=shard, problem=describe(error))


def describe(error: BaseException) -> str:
    """An error as the problem of an outcome: the kind too, unless the message was written for people."""
    return str(error) if isinstance(error, ValueError | CaptionerError) else f"{type(error).__name__}: {error}"


class InProcess:
    """This process as the only worker."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job, self._progress = job, progress
        self._shard: Any = None

    def idle(self) -> int:
        return int(self._shard is None)

    def submit(self, shard: Any) -> None:
        self._shard = shard

    def outcomes(self) -> Iterator[Outcome]:
        if self._shard is not None:
            yield self._job(self._shard, self._progress)
            self._shard = None

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(kw_only=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    shard: Any = None


class Processes:
    """`count` processes on this machine, each with models of its own and one thread for arithmetic.

    With several GPUs the workers take turns.  A worker is started with its first shard.  When one dies, its shard fails
    and the next shard gets a new worker.  The parent alone hears Ctrl-C.  At the end idle workers leave by themselves,
    busy ones as soon as they come back from the model.
    """

    def __init__(self, job: Job, progress: Progress, count: int) -> None:
        self._job = job
        self._progress = progress
        self._context = multiprocessing.get_context("spawn")  # a fork would share CUDA and thread state
        self._gpus = _visible_gpus()
        self._workers: list[_Worker | None] = [None] * count  # None: not started, or dead

    def idle(self) -> int:
        return sum(worker is None or worker.shard is None for worker in self._workers)

    def submit(self, shard: Any) -> None:
        numbers = [number for number, worker in enumerate(self._workers) if worker is None or worker.shard is None]
        number = min(numbers, key=lambda i: self._workers[i] is None)  # one that has its models already
        worker = self._workers[number] or self._start(number)
        worker.shard, self._workers[number] = shard, worker
        with contextlib.suppress(OSError):  # it has just died: `outcomes` will see
            worker.pipe.send(shard)

    def outcomes(self) -> Iterator[Outcome]:
        by_pipe = {worker.pipe: number for number, worker in enumerate(self._workers) if worker is not None}
        for pipe in wait(by_pipe, timeout=0.5):
            assert isinstance(pipe, Connection)
            number = by_pipe[pipe]
            worker = self._workers[number]
            assert worker is not None
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                pipe.close()
                self._workers[number] = None
                if worker.shard is not None:
                    yield Outcome(shard=worker.shard, problem=_death(worker.process.exitcode))
                continue
            if isinstance(message, Outcome):
                worker.shard = None
                yield message
            else:
                self._progress(message)

    def _start(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        gpu = self._gpus[number % len(self._gpus)] if self._gpus else None
        process = self._context.Process(target=_serve, args=(theirs, self._job, gpu), daemon=True)
        with _environment(dict.fromkeys(_THREAD_VARIABLES, "1")):
            process.start()
        theirs.close()  # so that the pipe ends when the worker does
        return _Worker(process=process, pipe=ours)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        alive = [worker for worker in self._workers if worker is not None]
        for worker in alive:
            worker.pipe.close()
            if worker.shard is not None:
                worker.process.terminate()
        for worker in alive:
            worker.process.join(_LEAVE_S)
            worker.process.kill()
            worker.process.join()


def _serve(pipe: Connection, job: Job, gpu: str | None) -> None:
    """A worker process: works on shards until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # rather than dying, which would leave semaphores behind
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA is not initialised yet
    torch.set_num_threads(1)

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent wants no more
        while True:
            pipe.send(job(pipe.recv(), pipe.send))


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"the worker process was killed by {name}{hint}"
    return f"the worker process ended with exit code {code}"


def _visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one per GPU; none without GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class RayActors:
    """Ray actors, on a cluster (`address`) or a local one (`local`), each with models of its own.

    `count` 0 means as many as the cluster has room for.  An actor that dies is replaced, and its shard fails.  Ray does
    no retries of its own.  Raises ValueError if Ray is not installed, or the cluster does not answer or has no room.
    """

    def __init__(
        self,
        job: Job,
        progress: Progress,
        *,
        address: str,
        count: int,
        num_cpus: float,
        num_gpus: float,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("Ray needs the extra `ray`: pip install 'opencloc[ray]'") from error
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            _start_ray(ray, address)
        room = _room(ray.cluster_resources(), num_cpus, num_gpus)
        if room == 0:
            self.__exit__()
            raise ValueError(f"the Ray cluster has no room for a worker of {num_cpus:g} CPUs and {num_gpus:g} GPUs")
        self._job, self._progress = job, progress
        self._make = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_Actor).remote
        self._free = [self._make() for _ in range(min(count or room, room))]
        self._busy: dict[Any, tuple[Any, Any]] = {}  # future -> (actor, shard)

    def idle(self) -> int:
        return len(self._free)

    def submit(self, shard: Any) -> None:
        actor = self._free.pop()
        self._busy[actor.work.remote(self._job, shard)] = actor, shard

    def outcomes(self) -> Iterator[Outcome]:
        ready, _ = self._ray.wait(list(self._busy), timeout=0.5)
        for future in ready:
            actor, shard = self._busy.pop(future)
            try:
                outcome = self._ray.get(future)
            except self._ray.exceptions.RayError as error:
                outcome = Outcome(shard=shard, problem=f"the Ray worker died: {str(error).splitlines()[0]}")
                actor = self._make()
            self._free.append(actor)
            if outcome.report is not None:
                self._progress(outcome.report.images)
            yield outcome

    def __enter__(self) -> RayActors:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ray.shutdown()  # stops the actors of this driver


def _start_ray(ray: Any, address: str) -> None:
    """Connects to the cluster, with a second try: a busy machine may need longer than Ray waits for itself.

    Raises ValueError with Ray's first line.
    """
    for last in (False, True):
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
            return
        except Exception as error:  # Ray raises a plain Exception where its start takes too long
            ray.shutdown()
            if last:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"Ray at {address!r} did not answer: {reason}  On one machine, --workers does without Ray."
                ) from error


class _Actor:
    """One Ray worker."""

    def work(self, job: Job, shard: Any) -> Outcome:
        return job(shard, None)


def _room(resources: Mapping[str, float], num_cpus: float, num_gpus: float) -> int:
    """How many workers a cluster can hold."""
    rooms = [resources.get(name, 0) // need for name, need in (("CPU", num_cpus), ("GPU", num_gpus)) if need]
    return int(min(rooms)) if rooms else 1
