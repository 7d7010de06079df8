"""What a labelled data set consists of, in figures (`opencloc data stats`): the paper's Table 1, histograms, texts.

Where labels lie beside the images only they are read and no image is opened.  The counts stay small whatever the size
of the data set: distinct texts beyond a limit are pruned, and the report says so.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from opencloc import files
from opencloc.boxes import area
from opencloc.data.inspect.report import NUM_BINS, ORIENTED, Stats, markdown, plot
from opencloc.data.sample import Source
from opencloc.data.sidecar import SidecarRow, read_labels, read_sidecar, sidecar_path
from opencloc.data.sources.coco import Coco
from opencloc.data.sources.folder import ImageFolder
from opencloc.data.sources.labelled import StoredPhotos, labels_of, left_out, open_labelled
from opencloc.data.tars.shards import Shards
from opencloc.errors import BadSample
from opencloc.images import is_oriented
from opencloc.progress import track

MAX_TEXTS = 1_000_000  # distinct region texts counted exactly
_REGIONS_SHOWN, _LENGTHS_SHOWN = 100, 32  # histograms over counts end here; the last bin holds all beyond


@checked(frozen=True, kw_only=True)
class StatsConfig:
    """Figures of a labelled data set."""

    data: str
    """The data: a folder, tars, or any `KIND:LOCATION?key=value`."""
    sidecar: str | None = None
    """Name of the labels; None: the only ones that lie beside the images, else the images' own regions."""
    out: str = "stats"
    """Folder for stats.md, stats.png and stats.json."""
    tokenizer: str | None = None
    """Tokenizer that counts text lengths, as a local folder or hub id; None: words between white space."""
    top: Annotated[int, Field(ge=1)] = 30
    """How many of the most frequent region texts are listed; at least 1."""
    num_images: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many images; at least 1."""


def write_stats(config: StatsConfig) -> Stats:
    """The figures of a data set, after writing them to `config.out` as Markdown, PNG and JSON.

    Raises as `open_labelled`, and `OSError` where something else has the place of the folder or of a file.
    """
    source = open_labelled(config.data, config.sidecar)
    out = Path(config.out)
    with (
        files.new_file(out / "stats.png") as png,
        files.new_file(out / "stats.json") as json_file,
        files.new_file(out / "stats.md") as md,
    ):
        stats = _compute(source, config)
        png.write_bytes(plot(stats))
        json_file.write_bytes(as_json(stats))
        md.write_text(markdown(stats), encoding="utf-8", errors="backslashreplace")  # paths may be any bytes
    return stats


def compute_stats(config: StatsConfig) -> Stats:
    """The figures of a data set, in one pass.  Raises as `open_labelled`."""
    return _compute(open_labelled(config.data, config.sidecar), config)


def _compute(source: Source, config: StatsConfig) -> Stats:
    count_tokens, tokens = token_counter(config.tokenizer)
    labels = labels_of(source)
    tally = Tally(count_tokens)
    total = min((n for n in (source.size, config.num_images) if n is not None), default=None)
    rows = _rows(source, total) if labels is None else itertools.islice(_label_rows(source, labels), config.num_images)
    for row in track(rows, "reading images" if labels is None else "reading labels", total=total):
        tally.add(row)
    if config.num_images is None:
        tally.skipped.update(left_out(source))
        if labels is not None and source.size is not None and source.size > tally.images:
            tally.skipped["not in the sidecar"] += source.size - tally.images
            tally.images = source.size
    noticed = Counter() if labels else Counter(getattr(source, "noticed", None) or {})
    if tally.oriented:
        noticed[ORIENTED] = tally.oriented
    return tally.stats(data=config.data, labels=labels, tokens=tokens, top=config.top, noticed=noticed)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is counted of one image."""

    captions: tuple[str, ...] = ()
    boxes: np.ndarray  # (R, 4)
    texts: tuple[str, ...] = ()
    scores: np.ndarray | None = None
    oriented: bool = False  # EXIF says that the image is to be shown turned
    problem: str | None = None  # why it cannot be used


def _rows(source: Source, total: int | None) -> Iterator[Row]:
    """A row for each image, which is read."""
    if total is None:
        raise ValueError(f"{source!r} has no end: set num_images")
    return (_read(source, index) for index in range(total))


def _label_rows(source: Source, name: str) -> Iterator[Row]:
    """A row for each row of the labels: no image is read, which is hundreds of times faster."""
    for row in _sidecar_rows(source, name):
        captions = (row.caption,) if row.caption is not None else ()
        problem = row.error and reason_of(row.error)
        yield Row(captions=captions, boxes=row.boxes, texts=row.texts, scores=row.scores, problem=problem)


def _sidecar_rows(source: Source, name: str) -> Iterator[SidecarRow]:
    if isinstance(source, Shards):
        for url in source.urls:
            yield from read_sidecar(sidecar_path(url, name)).values()
    elif isinstance(source, Coco):
        yield from read_labels(source.instances_path, name).values()
    elif isinstance(source, ImageFolder):
        yield from read_labels(source.location, name).values()


def _read(source: Source, index: int) -> Row:
    try:
        sample = source[index]
    except BadSample as bad:
        return Row(boxes=np.zeros((0, 4), dtype=np.float32), problem=bad.reason)
    oriented = isinstance(source, StoredPhotos) and is_oriented(source.image_bytes(index))
    return Row(
        captions=sample.captions, boxes=sample.boxes, texts=sample.texts, scores=sample.scores, oriented=oriented
    )


def reason_of(error: str) -> str:
    """The reason in a sidecar's `error`, which is `reason` or `reason: detail`."""
    return error.partition(": ")[0]


def token_counter(tokenizer: str | None) -> tuple[Callable[[str], int], str]:
    """(tokens in a text, what they are called)."""
    if tokenizer is None:
        return lambda text: len(text.split()), "words between white space"
    from opencloc.model.loading import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return (
        lambda text: len(loaded(text, add_special_tokens=False)["input_ids"]),
        f"tokens of {tokenizer}, without special ones",
    )


class Tally:
    """Running counts over the rows of a data set."""

    def __init__(self, count_tokens: Callable[[str], int]) -> None:
        self._count_tokens = count_tokens
        self._lengths: dict[str, int] = {}  # region texts repeat; pruned together with the texts
        self.images = self._with_regions = self._captions = self._caption_tokens = 0
        self.oriented = 0
        self.skipped: Counter[str] = Counter()
        self._texts: Counter[str] = Counter()
        self._pruned = False
        self._scores = np.zeros(NUM_BINS, dtype=np.int64)
        self._sizes = np.zeros(NUM_BINS, dtype=np.int64)
        self._region_counts = np.zeros(_REGIONS_SHOWN + 1, dtype=np.int64)
        self._text_lengths = np.zeros(_LENGTHS_SHOWN + 1, dtype=np.int64)
        self._regions = self._text_tokens = 0

    def add(self, row: Row) -> None:
        self.images += 1
        if row.problem is not None:
            self.skipped[row.problem] += 1
            return
        self.oriented += row.oriented
        self._captions += len(row.captions)
        self._caption_tokens += sum(map(self._count_tokens, row.captions))
        self._regions += len(row.texts)
        self._with_regions += bool(row.texts)
        self._region_counts[min(len(row.texts), _REGIONS_SHOWN)] += 1
        for text in row.texts:
            self._texts[text] += 1
            if (length := self._lengths.get(text)) is None:
                length = self._lengths[text] = self._count_tokens(text)
            self._text_tokens += length
            self._text_lengths[min(length, _LENGTHS_SHOWN)] += 1
        _count(self._sizes, np.sqrt(area(row.boxes)))
        if row.scores is not None:
            _count(self._scores, row.scores)
        if len(self._texts) > MAX_TEXTS:
            self._pruned = True
            self._texts = Counter(dict(self._texts.most_common(MAX_TEXTS // 2)))
            self._lengths = {text: self._lengths[text] for text in self._texts}

    def stats(self, *, data: str, labels: str | None, tokens: str, top: int, noticed: Counter[str]) -> Stats:
        usable = int(self._region_counts.sum())
        return Stats(
            data=data,
            labels=labels,
            images=self.images,
            images_with_regions=self._with_regions,
            regions=self._regions,
            regions_per_image=_mean(self._regions, usable),
            image_text_tokens=_mean(self._caption_tokens, self._captions),
            region_text_tokens=_mean(self._text_tokens, self._regions),
            tokens=tokens,
            distinct_texts=len(self._texts),
            pruned=self._pruned,
            top_texts=tuple(sorted(self._texts.items(), key=lambda item: (-item[1], item[0]))[:top]),
            skipped=dict(sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))),
            noticed=dict(sorted(noticed.items(), key=lambda item: (-item[1], item[0]))),
            scores=self._scores,
            box_sizes=self._sizes,
            region_counts=self._region_counts,
            region_text_lengths=self._text_lengths,
        )


def _count(histogram: np.ndarray, values: np.ndarray) -> None:
    """Adds values of [0, 1] to a histogram over it; 1 itself belongs to the last bin."""
    bins = np.minimum((np.asarray(values) * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    histogram += np.bincount(bins, minlength=NUM_BINS)


def _mean(total: int, count: int) -> float:
    return total / count if count else float("nan")


def as_json(stats: Stats) -> bytes:
    """The figures as JSON; means of nothing are null."""
    values = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(stats).items()}
    values = {name: None if value != value else value for name, value in values.items()}
    return json.dumps(values, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
