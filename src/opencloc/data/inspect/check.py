"""What one wants to see of a data set before it is trained on for a week (`opencloc data check`).

A random choice of samples is read in full.  The report says what was skipped and why, how long texts are, what is
suspicious about the boxes, and shows some samples with their boxes.  `data stats` counts all labels of a data set,
`data view` browses it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from opencloc import files
from opencloc.data.inspect.picture import NUM_TILES, contact_sheet
from opencloc.data.inspect.report import ORIENTED, Stats, markdown, plot
from opencloc.data.inspect.stats import Row, Tally, as_json, token_counter
from opencloc.data.sample import Sample, Source
from opencloc.data.sources.coco_json import EMPTY_BOX, OUTSIDE
from opencloc.data.sources.labelled import StoredPhotos, labels_of, left_out, open_labelled
from opencloc.data.sources.mosaic import Mosaic
from opencloc.errors import BadSample
from opencloc.images import is_oriented
from opencloc.progress import track

ENOUGH = 30  # regions, or images, from which on a share says something
_EDGE = 1e-4  # as near to a border as this is at it


@checked(frozen=True, kw_only=True)
class CheckConfig:
    """A look at a data set before training: counts, skips, texts, suspicious boxes, a picture of samples."""

    data: str
    """The data: a folder, tars, or any `KIND:LOCATION?key=value`."""
    sidecar: str | None = None
    """Name of the labels; None: the only ones that lie beside the images, else the images' own regions."""
    out: str = "check"
    """Folder for check.md, check.json, samples.png and stats.png."""
    num_images: Annotated[int, Field(ge=1)] = 1000
    """How many images are read, chosen at random; at least 1."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the random choice."""
    tokenizer: str | None = None
    """Folder or hub id whose tokens are counted; None: words between white space."""


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """Something about a data set that is probably not as it should be."""

    what: str  # in a few words, always the same
    share: float  # of the regions or images looked at
    advice: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found."""

    stats: Stats  # of the samples read
    suspicions: tuple[Suspicion, ...]


def write_check(config: CheckConfig) -> Check:
    """What was found, after writing it to `config.out`.

    Raises as `open_labelled`, and `OSError` where something else has the place of the folder or of a file.
    """
    source = open_labelled(config.data, config.sidecar)
    count_tokens, tokens = token_counter(config.tokenizer)
    out = Path(config.out)
    with (
        files.new_file(out / "stats.png") as plot_png,
        files.new_file(out / "samples.png") as samples_png,
        files.new_file(out / "check.json") as json_file,
        files.new_file(out / "check.md") as md,
    ):
        tally, seen, shown = Tally(count_tokens), _Seen(), []
        for sample, row in track(_read(source, config), "reading images", total=_total(source, config)):
            tally.add(row)
            if sample is not None:
                seen.add(sample)
                if len(shown) < NUM_TILES and (len(sample.boxes) or not seen.boxes):
                    shown.append(sample)
        opened, noticed = left_out(source), Counter(getattr(source, "noticed", None) or {})
        if labels_of(source) is not None:  # which replace the boxes that were opened
            noticed.clear()
            del opened[EMPTY_BOX]
        if tally.oriented:
            noticed[ORIENTED] = tally.oriented
        stats = tally.stats(data=config.data, labels=labels_of(source), tokens=tokens, top=30, noticed=noticed)
        found = Check(stats=stats, suspicions=suspicions(source, stats, seen, opened))
        plot_png.write_bytes(plot(stats))
        samples_png.write_bytes(contact_sheet(shown))
        json_file.write_bytes(_json(found, opened))
        md.write_text(_markdown(found, source, opened), encoding="utf-8", errors="backslashreplace")
    return found


def _total(source: Source, config: CheckConfig) -> int:
    return config.num_images if source.size is None else min(source.size, config.num_images)


def _read(source: Source, config: CheckConfig) -> Iterator[tuple[Sample | None, Row]]:
    """Every chosen sample and what is counted of it, in random order; of an endless source the first ones."""
    numbers = np.arange(config.num_images)
    if source.size is not None:
        rng = np.random.default_rng(config.seed)
        numbers = rng.choice(source.size, _total(source, config), replace=False)
    for number in numbers.tolist():
        try:
            sample = source[number]
        except BadSample as bad:
            yield None, Row(boxes=np.zeros((0, 4), dtype=np.float32), problem=_reason(bad))
            continue
        turned = isinstance(source, StoredPhotos) and is_oriented(source.image_bytes(number))
        row = Row(
            captions=sample.captions, boxes=sample.boxes, texts=sample.texts, scores=sample.scores, oriented=turned
        )
        yield sample, row


_PIXELS = "bad box (reaches outside the image)"


def _reason(bad: BadSample) -> str:
    return _PIXELS if bad.reason == "bad box" and "reaches outside" in bad.detail else bad.reason


class _Seen:
    """The boxes read, with the sizes of their images."""

    def __init__(self) -> None:
        self._boxes: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self.captioned = 0

    @property
    def boxes(self) -> bool:
        return bool(self._boxes)

    def add(self, sample: Sample) -> None:
        self.captioned += bool(sample.captions or sample.alt_text)
        if len(sample.boxes):
            self._boxes.append(sample.boxes)
            self._sizes.append(np.broadcast_to(np.asarray(sample.image.size), (len(sample.boxes), 2)))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (A, 4) and the width and height in pixels of the images they belong to (A, 2)."""
        if not self._boxes:
            return np.zeros((0, 4), dtype=np.float32), np.zeros((0, 2), dtype=np.int64)
        return np.concatenate(self._boxes), np.concatenate(self._sizes)


def suspicions(source: Source, stats: Stats, seen: _Seen, opened: Mapping[str, int]) -> tuple[Suspicion, ...]:
    """What is probably wrong, by the shares of boxes, texts and images that are as sound data seldom have them."""
    boxes, sizes_px = seen.arrays()
    found: list[Suspicion] = []

    def suspect(what: str, part: float, whole: float, limit: float, advice: str) -> None:
        if whole >= ENOUGH and part > limit * whole:
            found.append(Suspicion(what=what, share=part / whole, advice=advice))

    count = len(boxes)
    low = boxes[:, :2] <= _EDGE  # (A, 2): at the left and upper border
    high = boxes[:, 2:] >= 1 - _EDGE  # at the right and lower one
    whole = (low & high).all(axis=1)
    ends, begins = int((high & ~low).any(axis=1).sum()), int((low & ~high).any(axis=1).sum())
    noticed = stats.noticed.get(OUTSIDE, 0)
    opened_regions = getattr(source, "num_regions", count)  # of the whole file
    if ends > 3 * begins:
        suspect(
            "boxes end at the right or lower border far more often than they begin at the other two",
            ends, count, 0.5,
            "x0, y0, x1, y1 may have been read as x, y, width, height",
        )  # fmt: skip
    elif not isinstance(source, Mosaic):  # whose tiles lie at borders
        suspect(
            "boxes touch a border", int(((low | high).any(axis=1) & ~whole).sum()), count, 0.8,
            "boxes may have been scaled to another size of the image, and clipped",
        )  # fmt: skip
    suspect(
        _PIXELS, stats.skipped.get(_PIXELS, 0), stats.images, 0.1,
        "boxes in pixels may have been read as shares of the image",
    )  # fmt: skip
    lost = opened.get(EMPTY_BOX, 0)
    suspect(
        "empty boxes, left out at opening", lost, lost + opened_regions, 0.1,
        "boxes in pixels may have been read as shares, or corners in another order",
    )  # fmt: skip
    suspect(
        "boxes reach outside the image, clipped at opening", noticed, opened_regions, 0.1,
        "x0, y0, x1, y1 may have been read as x, y, width, height, or pixels as shares",
    )  # fmt: skip
    sides_px = (boxes[:, 2:] - boxes[:, :2]) * sizes_px
    inside_px = (boxes[:, 2:] * sizes_px <= 1.01).all(axis=1)
    suspect(
        "boxes within the first pixel", int(inside_px.sum()), count, 0.1,
        "shares of the image may have been read as pixels",
    )  # fmt: skip
    suspect(
        "boxes under 2 pixels wide or high", int(((sides_px < 2).any(axis=1) & ~inside_px).sum()), count, 0.1,
        "boxes may be degenerate, or the images smaller than those annotated",
    )  # fmt: skip
    suspect(
        "boxes are the whole image", int(whole.sum()), count, 0.5,
        "such regions say no more than a caption does",
    )  # fmt: skip
    same = Counter(map(tuple, boxes.round(4).tolist())).most_common(1)
    if same and not whole.mean() > 0.5:
        suspect("one box on many images", same[0][1], count, 0.3, f"it is {list(same[0][0])}; a placeholder?")
    if stats.top_texts:
        text, times = stats.top_texts[0]
        suspect("one text for most regions", times, stats.regions, 0.8, f"it is {text[:60]!r}")
    lengths = stats.region_text_lengths
    suspect(
        "region texts of more than 30 words", int(lengths[31:].sum()), stats.regions, 0.1,
        "text towers of 77 tokens cut them off; captions may have been taken for regions",
    )  # fmt: skip
    usable = stats.images - sum(stats.skipped.values())
    suspect(
        "samples that cannot be used", stats.images - usable, stats.images, 0.05, "see what was skipped, and why"
    )  # fmt: skip
    suspect(
        "images that EXIF says to turn", stats.noticed.get(ORIENTED, 0), usable, 0.02,
        "see in samples.png whether their boxes fit the pixels as stored",
    )  # fmt: skip
    suspect(
        "images without regions", usable - stats.images_with_regions, usable, 0.9,
        "they train as image-text pairs alone; were the labels found?",
    )  # fmt: skip
    suspect(
        "images without a caption", usable - seen.captioned, usable, 0.999,
        "region texts in a row take its place",
    )  # fmt: skip
    return tuple(found)


def _markdown(found: Check, source: Source, opened: Mapping[str, int]) -> str:
    """The report: suspicions first, then the figures."""
    lines = ["# Check", "", f"{found.stats.images:,} images read, of {_size(source)}.", "", "## Suspicious", ""]
    lines += [
        f"* **{one.what}**: {one.share:.0%}. {one.advice[0].upper()}{one.advice[1:]}." for one in found.suspicions
    ]
    lines += [] if found.suspicions else ["Nothing."]
    lines += ["", "![samples with their boxes](samples.png)", "", "## Left out when the data were opened", ""]
    lines += [f"* {reason}: {number:,}" for reason, number in opened.items()] or ["Nothing."]
    return "\n".join(lines) + "\n\n" + markdown(found.stats).replace("# Region labels", "## Region labels", 1)


def _size(source: Source) -> str:
    return "a source without end" if source.size is None else f"{source.size:,}"


def _json(found: Check, opened: Mapping[str, int]) -> bytes:
    values: dict[str, Any] = {
        "suspicions": [vars(one) for one in found.suspicions],
        "left_out_at_opening": dict(opened),
        "stats": json.loads(as_json(found.stats)),
    }
    return json.dumps(values, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
