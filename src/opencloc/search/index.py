"""`opencloc index`: photos become rows of a library, once; a run again takes what is new, changed, moved or deleted.

The photos that are still to be read are cut into shards.  One function does a shard, in this process, in local ones or
on Ray, and commits as it goes.  What is left to do is always found by comparing what is there with what was listed, so
a killed run needs no state of its own.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field

from opencloc.config import Strict
from opencloc.errors import BadSample, redacted
from opencloc.model.fingerprint import model_id
from opencloc.model.predictor import EVERYDAY, Predictor, load
from opencloc.progress import Meter
from opencloc.search.photos import Entry, Listing, Photo, list_photos, read_photo
from opencloc.search.regions import WHOLE, RegionKind, Regions, encode_regions, grid_boxes
from opencloc.search.store import Known, Settings, make_store, open_store, writing
from opencloc.vesl.detectors import load_detector
from opencloc.vesl.workers import Outcome, Progress, WorkersConfig, describe, drive, say, start_workers

PHOTOS_PER_SHARD = 256
IMAGES_AT_ONCE = 16
COMMIT_EVERY_S = 20.0  # a kill loses no more than this
READERS = 2  # threads that read and decode ahead of the model
READ_AHEAD = 2 * IMAGES_AT_ONCE
INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class IndexConfig(Strict):
    """What is put into a library, by which model."""

    photos: tuple[str, ...]
    """Folders of photos, tars, or any KIND:LOCATION?key=value."""
    out: str
    """The index: a folder, or a URL such as s3://bucket/index.  One that is there is brought up to date."""
    model: str = "tiny"
    """Folder or hub id of a CLOC, CLIP, SigLIP or SigLIP 2 checkpoint; `tiny` comes with the package."""
    regions: RegionKind = "grid"
    """The whole photo and a grid of a few hundred boxes, the whole photo alone, or a detector's boxes."""
    detector: str | None = None
    """For `detector`: as in `opencloc label`, a checkpoint or FILE.py:FACTORY."""
    names: tuple[str, ...] = ()
    """What the detector looks for; none: 80 everyday things."""
    num_images: Annotated[int, Field(ge=1)] | None = None
    """How many images of a source without an end (generated scenes)."""
    device: str = "auto"
    """cpu, cuda, cuda:NUMBER or auto."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.photos:
            raise ValueError("no photos are named")
        if (self.regions == "detector") != (self.detector is not None):
            raise ValueError("--regions detector and --detector go together")
        if self.names and self.detector is None:
            raise ValueError("--names are for --regions detector")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker needs to know."""

    out: str
    settings: Settings
    device: str


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some photos to be read."""

    source: str
    entries: tuple[Entry, ...]

    @property
    def label(self) -> str:
        """How people are told which shard it is."""
        return f"{redacted(self.entries[0].path)} and the next {len(self.entries) - 1}"


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What reading a shard came to."""

    images: int  # with those skipped
    encoded: int  # contents that were new to the library
    skipped: Counter[str]
    unusable: frozenset[str]  # paths of those skipped
    examples: dict[str, str]  # reason -> the first message


@dataclass(kw_only=True)
class IndexReport:
    """What a run came to."""

    photos: int = 0  # in the library now, of all sources
    regions: int = 0  # likewise
    added: int = 0
    changed: int = 0
    removed: int = 0  # deleted, or moved away
    encoded: int = 0  # contents that the model had to see
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    reports: list[ShardReport] = field(default_factory=list)
    failed_shards: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None

    @property
    def exit_code(self) -> int:
        """Exit status of the command: 0 complete, 130 interrupted, 1 if photos that can be read are missing."""
        if self.stopped == INTERRUPTED:
            return 130
        return 1 if self.stopped or self.failed_shards or not self.photos else 0


def run_index(config: IndexConfig, where: WorkersConfig | None = None) -> IndexReport:
    """Brings a library up to date with its photos, and returns what happened.

    Ctrl-C and kills leave a library that is whole; the same run again goes on.  Photos under a folder that cannot be
    listed now, and photos that cannot be read now, stay as they were.

    Raises FileNotFoundError, ValueError or OSError for photos, model or index that do not fit, before anything is
    changed; OSError for a full disk.
    """
    where, start = where or WorkersConfig(), time.perf_counter()
    listings = [list_photos(spec, config.num_images) for spec in config.photos]
    report = IndexReport(skipped=sum((listing.skipped for listing in listings), Counter()))
    predictor = load_predictor(config.model, config.device)
    settings = _settings(config, predictor)
    with writing(config.out):
        store = make_store(config.out, settings)
        job = Job(out=config.out, settings=settings, device=config.device)
        known = store.check()
        if known.doubled or known.broken:  # two writers on an object store, or tables damaged from outside
            store.remove_regions(known.doubled)
            known = store.check()
        before = known.versions
        todo = _todo(listings, known, set())
        if before and todo:
            say(f"resuming: {len(before):,} photos are in {redacted(config.out)}, {sum(map(_size, todo)):,} to read")
        try:
            _work(job, where, todo, report)
            for one in report.reports:
                report.encoded += one.encoded
                report.skipped += one.skipped
                report.examples = one.examples | report.examples
            known = store.check()
            gone = _gone(listings, known)
            store.remove_photos(gone)
            report.removed = len(gone)
            if report.stopped is None and not report.failed_shards:
                store.remove_regions(store.check().unused)
            store.tidy()
        except KeyboardInterrupt:
            report.stopped = INTERRUPTED
        known = store.check()
        report.photos, report.regions = len(known.versions), store.regions.count_rows()
        report.added = len(known.versions.keys() - before.keys())
        report.changed = sum(before[path] != known.versions[path] for path in before.keys() & known.versions.keys())
    report.seconds = time.perf_counter() - start
    return report


def format_report(out: str, report: IndexReport) -> str:
    """Where the index lies, the figures, what was skipped and why, what to do about it."""
    lines = [
        redacted(out),
        f"{report.photos:,} photos with {report.regions:,} regions: {report.added:,} added, {report.changed:,} changed,"
        f" {report.removed:,} removed, {report.encoded:,} encoded; {report.seconds:.0f} s",
    ]
    for reason, count in report.skipped.most_common():
        example = f", for example {report.examples[reason]}" if reason in report.examples else ""
        lines.append(f"  skipped: {reason} ({count:,}){example}")
    lines += [f"  given up: {shard}: {why}" for shard, why in report.failed_shards.items()]
    if report.stopped:
        lines.append(f"Stopped: {report.stopped}.")
    if report.stopped or report.failed_shards:
        lines.append("Run the same command again to go on; what is done is kept.")
    return redacted("\n".join(lines))


def _size(shard: Shard) -> int:
    return len(shard.entries)


def _settings(config: IndexConfig, predictor: Predictor) -> Settings:
    names = config.names or (tuple(EVERYDAY.split(", ")) if config.detector else ())
    return Settings(
        model=os.path.abspath(config.model) if os.path.isdir(config.model) else config.model,
        model_id=model_id_of(config.model, config.device),
        width=predictor.model.embed_dim,
        regions=config.regions,
        detector=config.detector,
        names=names,
    )


def _todo(listings: Sequence[Listing], known: Known, unusable: set[str]) -> list[Shard]:
    """What is not in the library, or in another version."""
    shards: list[Shard] = []
    for listing in listings:
        entries = [
            entry
            for entry in listing.entries
            if known.versions.get(entry.path) != (entry.size, entry.mtime) and entry.path not in unusable
        ]
        for start in range(0, len(entries), PHOTOS_PER_SHARD):
            shards.append(Shard(source=listing.source, entries=tuple(entries[start : start + PHOTOS_PER_SHARD])))
    return shards


def _gone(listings: Sequence[Listing], known: Known) -> set[str]:
    """Paths in the library that the sources hold no more."""
    there = {entry.path for listing in listings for entry in listing.entries}
    gone = set(known.broken) - there
    for listing in listings:
        inside = listing.source.rstrip("/") + "/"
        hidden = tuple(folder.rstrip("/") + "/" for folder in listing.unreadable)
        gone |= {
            path
            for path, source in known.sources.items()
            if (source == listing.source or path.startswith(inside))
            and path not in there
            and not path.startswith(hidden)
        }
    return gone


def _work(job: Job, where: WorkersConfig, shards: list[Shard], report: IndexReport) -> None:
    if not shards:
        return
    attempts = deque((shard, 1) for shard in shards)
    meter = Meter("indexing", sum(map(_size, shards)))
    with meter, start_workers(functools.partial(attempt, job), where, meter.advance) as workers:
        for _ in drive(workers, attempts, where.max_attempts, report):
            pass


def attempt(job: Job, shard: Shard, progress: Progress | None) -> Outcome:
    """Does one shard here; what goes wrong is in the outcome, never raised."""
    try:
        predictor = load_predictor(job.settings.model, job.device)
        if (found := model_id_of(job.settings.model, job.device)) != job.settings.model_id:
            raise ValueError(f"{job.settings.model} is another model here: {found}, not {job.settings.model_id}")
    except Exception as error:
        return Outcome(shard=shard, problem=describe(error), fatal=True)
    try:
        return Outcome(shard=shard, report=index_shard(job, predictor, shard, progress))
    except OSError as error:  # of the index: no shard can succeed
        return Outcome(shard=shard, problem=str(error), fatal=True)
    except Exception as error:
        return Outcome(shard=shard, problem=describe(error))


def index_shard(job: Job, predictor: Predictor, shard: Shard, progress: Progress | None = None) -> ShardReport:
    """Reads the photos of a shard, encodes those whose content is new, and commits them.

    Doing it again does nothing twice.  Raises OSError if the index cannot be written, ValueError for a model that makes
    nonsense.
    """
    store = open_store(job.out)
    contents = set(store.check().contents)
    skipped, unusable, examples = Counter[str](), set[str](), dict[str, str]()
    encoded = 0
    read: list[Photo] = []
    new: dict[int, Regions] = {}
    last = time.monotonic()
    batch: list[Photo | BadSample] = []
    for number, item in enumerate(_read_ahead(shard), start=1):
        batch.append(item)
        if len(batch) < IMAGES_AT_ONCE and number < len(shard.entries):
            continue
        fresh: dict[int, Photo] = {}
        for one in batch:
            if isinstance(one, BadSample):
                skipped[one.reason] += 1
                unusable.add(one.where)
                examples.setdefault(one.reason, str(one))
            else:
                read.append(one)
                if one.id not in contents:
                    fresh[one.id] = one
        if fresh:
            images = [photo.image for photo in fresh.values()]
            boxes = _boxes(job.settings, job.device, images)
            found = encode_regions(predictor, images, boxes, job.settings.regions)
            new |= dict(zip(fresh, found, strict=True))
            contents |= fresh.keys()
            encoded += len(fresh)
        if number == len(shard.entries) or time.monotonic() - last > COMMIT_EVERY_S:
            store.commit(shard.source, read, new)
            read, new, last = [], {}, time.monotonic()
        if progress:
            progress(len(batch))
        batch = []
    return ShardReport(
        images=len(shard.entries), encoded=encoded, skipped=skipped, unusable=frozenset(unusable), examples=examples
    )


def _read_ahead(shard: Shard) -> Iterator[Photo | BadSample]:
    """The photos of a shard in order, decoded by other threads while the model is busy."""

    def read(entry: Entry) -> Photo | BadSample:
        try:
            return read_photo(shard.source, entry)
        except BadSample as bad:
            return bad

    waiting: deque[Future[Photo | BadSample]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for entry in shard.entries:
                waiting.append(pool.submit(read, entry))
                if len(waiting) > READ_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _boxes(settings: Settings, device: str, images: Sequence[Image.Image]) -> list[np.ndarray]:
    """The boxes (P, 4) of each photo, the whole photo first."""
    if settings.regions == "whole":
        return [WHOLE] * len(images)
    if settings.regions == "grid":
        return [grid_boxes()] * len(images)
    assert settings.detector is not None
    detector = _detector(settings.detector, device)
    boxes = []
    for found in detector(images, [settings.names] * len(images)):
        own = found.boxes[np.argsort(-found.scores, kind="stable")].clip(0, 1)
        boxes.append(np.concatenate([WHOLE, own[(own[:, 2:] > own[:, :2]).all(-1)]]))
    return boxes


@functools.lru_cache(maxsize=1)
def load_predictor(model: str, device: str) -> Predictor:
    """`opencloc.load`, once per process."""
    return load(model, device)


@functools.lru_cache(maxsize=1)
def model_id_of(model: str, device: str) -> str:
    """The id of the model that `load_predictor` returns, once per process."""
    return model_id(load_predictor(model, device).model)


_detector = functools.lru_cache(maxsize=1)(lambda spec, device: load_detector(spec, device=device))
