"""One shard labelled: from its images to `NAME.parquet` and `NAME_stats.json`."""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from opencloc import files
from opencloc.data.sample import Sample
from opencloc.data.sidecar import SidecarRow, read_sidecar, sidecar_path, stats_path, write_sidecar
from opencloc.data.sources.coco import Coco
from opencloc.data.sources.folder import ImageFolder
from opencloc.data.sources.spec import open_source, parse_spec
from opencloc.data.tars.shards import expand_urls, iter_shard
from opencloc.errors import BadSample, redacted
from opencloc.texts import is_text
from opencloc.vesl.captioners import load_captioner
from opencloc.vesl.config import LabelConfig, config_hash, versions
from opencloc.vesl.detectors import load_detector
from opencloc.vesl.engine import Engine, Skipped, Tally, label_samples
from opencloc.vesl.phrases import MAX_PHRASES, NGRAM_MAX_PHRASES, extract_phrases, ngram_phrases, tagger_weights

Progress = Callable[[int], None]
"""Called after every batch with the number of its images."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One unit of work, of resume and of retry."""

    source: str  # URL of a tar, or spec of a source
    sidecar: str  # path of its labels
    span: tuple[int, int] | None = None  # numbers of the source's samples; None: all of a tar

    @property
    def label(self) -> str:
        """How people are told which shard it is."""
        source = redacted(self.source)
        return source if self.span is None else f"{source} images {self.span[0]} to {self.span[1] - 1}"


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What labelling one shard came to; written as its `_stats.json`."""

    source: str
    sidecar: str
    config_hash: str
    images: int  # rows of the sidecar
    labelled: int  # rows without an error
    regions: int
    phrases: int
    images_without_phrases: int
    skipped: dict[str, Skipped]  # images without labels and what has no row (a truncated tar, a key again), by reason
    dropped: dict[str, int]  # detections, by filter
    seconds: dict[str, float]  # by step
    models: dict[str, str]
    versions: dict[str, str]


def find_shards(config: LabelConfig) -> list[Shard]:
    """The shards of the input, in order.

    Raises FileNotFoundError for what is not there, ValueError for a kind of source that cannot be labelled, and if two
    shards would write the same file.
    """
    _source.cache_clear()  # images may have come since
    shards = [shard for spec in config.data for shard in _shards_of(spec, config)]
    owners: dict[str, str] = {}
    for shard in shards:
        if shard.sidecar in owners:
            raise ValueError(f"{shard.label} and {owners[shard.sidecar]} would both be labelled in {shard.sidecar}")
        owners[shard.sidecar] = shard.label
    return shards


def _shards_of(spec: str, config: LabelConfig) -> list[Shard]:
    name = config.name if config.out is None else f"{config.out.rstrip('/')}/{config.name}"
    kind, location, options = parse_spec(spec)
    if kind == "shards":
        if options:
            raise ValueError(f"{spec}: tars to be labelled take no options, got {', '.join(options)}")
        return [Shard(source=url, sidecar=sidecar_path(url, name)) for url in expand_urls(location)]
    if kind not in ("folder", "coco"):
        raise ValueError(f"{spec}: labels can be made for tars, image folders and COCO folders, not for {kind}")
    source = _source(spec, config.image_px)
    place = source.instances_path if isinstance(source, Coco) else source.location
    starts = range(0, source.size, config.shard_size)
    return [
        Shard(
            source=spec,
            sidecar=sidecar_path(place, name, part),
            span=(start, min(start + config.shard_size, source.size)),
        )
        for part, start in enumerate(starts)
    ]


@functools.lru_cache(maxsize=1)  # the shards of one source follow each other
def _source(spec: str, image_px: int) -> Coco | ImageFolder:
    source = open_source(spec, image_px=image_px)
    assert isinstance(source, Coco | ImageFolder)
    return source


def label_shard(
    config: LabelConfig,
    shard: Shard,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
    retry: bool = False,
) -> ShardReport:
    """Labels one shard, writes its sidecar and then its stats, each whole or not at all, and returns the stats.

    `engine` is what `load_engine(config)` returns (the default; one per process is kept).  `retry`: rows without an
    error are taken over from the sidecar that is there, the others and samples that are missing there are redone.

    What one sample causes goes into its row.  Raises OSError if the shard cannot be read or the labels cannot be
    written, `ModelFailure` or `CaptionerError` if the models fail on everything; nothing is written then.
    """
    engine = engine or load_engine(config)
    done, earlier = _earlier(shard) if retry else ({}, None)
    tally = Tally()
    rows: dict[str, SidecarRow] = {}
    order: list[str] = []
    start = time.perf_counter()
    for batch in label_samples(engine, _fresh(shard, config.image_px, done, order, tally), tally):
        rows.update((row.key, row) for row in batch)
        if progress:
            progress(len(batch))
    tally.seconds["total"] = time.perf_counter() - start
    in_order = [rows.get(key) or done[key] for key in order]
    report = _report(config, shard, engine, in_order, tally, earlier)
    write_sidecar(shard.sidecar, in_order, asdict(report))
    return report


def _fresh(
    shard: Shard, image_px: int, done: dict[str, SidecarRow], order: list[str], tally: Tally
) -> Iterator[Sample | BadSample]:
    """The samples that are not `done`.  All keys go into `order`; what has no key of its own is skipped."""
    seen: set[str] = set()
    for item in _samples(shard, image_px, done):
        key = item if isinstance(item, str) else item.key if isinstance(item, Sample) else item.where
        if isinstance(item, BadSample) and key == shard.source:
            tally.skip(item.reason, item.detail or key)
        elif key in seen:
            tally.skip("duplicate key", key)
        elif not is_text(key):
            tally.skip("name is not Unicode", ascii(key))
        else:
            seen.add(key)
            order.append(key)
            if not isinstance(item, str) and key not in done:
                yield item


def _samples(shard: Shard, image_px: int, done: dict[str, SidecarRow]) -> Iterator[Sample | BadSample | str]:
    """The samples of a shard, a `BadSample` (its `where` the key) for broken ones, the bare key where it is `done`.

    A tar is read through anyway, so there also those done come as samples.
    """
    if shard.span is None:
        yield from iter_shard(shard.source, image_px)
        return
    source = _source(shard.source, image_px)
    for number in range(*shard.span):
        key = os.path.splitext(source.identity(number))[0]
        if key in done:
            yield key
            continue
        try:
            yield source[number]
        except BadSample as bad:
            yield BadSample(bad.reason, key, bad.detail)


def _earlier(shard: Shard) -> tuple[dict[str, SidecarRow], dict[str, Any] | None]:
    """(rows without an error, stats) of a finished shard; nothing if it is not finished."""
    if not files.exists(stats_path(shard.sidecar)):
        return {}, None
    rows = {key: row for key, row in read_sidecar(shard.sidecar).items() if row.error is None}
    return rows, json.loads(files.read_bytes(stats_path(shard.sidecar)))


def _report(
    config: LabelConfig,
    shard: Shard,
    engine: Engine,
    rows: list[SidecarRow],
    tally: Tally,
    earlier: dict[str, Any] | None,
) -> ShardReport:
    """The report on the whole sidecar; counts of work done for rows that were taken over are added to."""
    past: dict[str, Any] = earlier or {"phrases": 0, "images_without_phrases": 0, "dropped": {}, "seconds": {}}
    steps = sorted(past["seconds"].keys() | tally.seconds.keys())
    return ShardReport(
        source=shard.label,
        sidecar=shard.sidecar,
        config_hash=config_hash(config),
        images=len(rows),
        labelled=sum(row.error is None for row in rows),
        regions=sum(len(row.texts) for row in rows),
        phrases=past["phrases"] + tally.phrases,
        images_without_phrases=past["images_without_phrases"] + tally.images_without_phrases,
        skipped=tally.skipped,
        dropped=dict(Counter(past["dropped"]) + tally.dropped),
        seconds={step: round(past["seconds"].get(step, 0.0) + tally.seconds.get(step, 0.0), 3) for step in steps},
        models=model_ids(config, engine),
        versions=versions(),
    )


@functools.lru_cache(maxsize=1)
def load_engine(config: LabelConfig) -> Engine:
    """The captioner, phrase extraction, detector and filters that a configuration describes; one is kept per process.

    Raises `CaptionerError`, RuntimeError or ValueError, naming what cannot be loaded.
    """
    if config.phrases == "nouns":
        tagger_weights()  # here rather than at the first caption, if they are missing
    detector = load_detector(
        config.detector,
        resolution=config.resolution,
        precision=config.precision,
        device=config.device,
        score_threshold=config.filters.score,
    )
    return Engine(
        captioner=load_captioner(config.captions),
        phrases=phrase_function(config),
        detector=detector,
        filters=config.filters,
        batch_size=config.batch_size,
    )


def phrase_function(config: LabelConfig) -> Callable[[str], tuple[str, ...]]:
    """Step 2 as configured: the phrases of a caption."""
    if config.phrases == "nouns":
        return functools.partial(extract_phrases, max_phrases=config.max_phrases or MAX_PHRASES)
    return functools.partial(ngram_phrases, max_phrases=config.max_phrases or NGRAM_MAX_PHRASES)


def model_ids(config: LabelConfig, engine: Engine) -> dict[str, str]:
    """What made the labels, by step."""
    return {
        "captioner": engine.captioner.model_id,
        "phrases": tagger_weights() if config.phrases == "nouns" else "n-grams",
        "detector": redacted(getattr(engine.detector, "model_id", config.detector)),
    }
