"""The figures of a labelled data set, and how they are shown: as Markdown and as a PNG of histograms."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opencloc.data.sources.coco_json import OUTSIDE

NUM_BINS = 50  # of scores and box sizes over [0, 1]
TEXTS_PLOTTED = 30
ORIENTED = "image that EXIF says to turn (read as stored)"
_ADVICE = {  # for what is worth a look
    OUTSIDE: "COCO's boxes are x, y, width, height; boxes written as x0, y0, x1, y1 look like this",
    ORIENTED: "boxes drawn in a viewer may be turned against the pixels; look at some with `opencloc data view`",
}
# Table 1 of the paper for what it compares: (name, regions per image, tokens per region text, tokens per image text)
PUBLISHED = (("VESL, published", "11.5", "2.1", "36 to 45"), ("alt-text n-grams, published", "5.1", "3.9", ""))

_INK, _BLUE, _FAINT = "#1f2933", "#3b6ea8", "#d9dfe5"


@dataclass(frozen=True, kw_only=True)
class Stats:
    """The figures.  Means are nan where there is nothing to average."""

    data: str
    labels: str | None  # name of the sidecar; None: the images' own regions
    images: int  # with those that cannot be used
    images_with_regions: int
    regions: int
    regions_per_image: float  # over the images that can be used
    image_text_tokens: float  # mean over captions
    region_text_tokens: float  # mean over regions
    tokens: str  # what a token is here
    distinct_texts: int  # of regions; a lower bound if `pruned`
    pruned: bool  # rare texts were dropped from the count
    top_texts: tuple[tuple[str, int], ...]
    skipped: dict[str, int]  # images and annotations left out, by reason
    noticed: dict[str, int]  # what is used and worth a look
    scores: np.ndarray  # (NUM_BINS,) regions by score in [0, 1]; all 0 if there are no scores
    box_sizes: np.ndarray  # (NUM_BINS,) regions by the square root of their share of the image in [0, 1]
    region_counts: np.ndarray  # images by their number of regions
    region_text_lengths: np.ndarray  # regions by the tokens of their text


def markdown(stats: Stats) -> str:
    """The report as GitHub Markdown; expects `stats.png` beside it."""
    lines = [
        "# Region labels in figures",
        "",
        f"Data: {_escape(stats.data)}; "
        + (f"labels: {_escape(stats.labels)}." if stats.labels else "the regions that come with the images."),
        "",
        *_table(
            ("", "images", "with regions", "regions", "regions per image", "region-text length", "image-text length"),
            [
                (
                    "this data set",
                    f"{stats.images:,}",
                    f"{stats.images_with_regions:,}",
                    f"{stats.regions:,}",
                    _figure(stats.regions_per_image),
                    _figure(stats.region_text_tokens),
                    _figure(stats.image_text_tokens),
                ),
                *((name, "", "", "", regions, region, image) for name, regions, region, image in PUBLISHED),
            ],
        ),
        "",
        f"Lengths are means in {_escape(stats.tokens)}. Regions per image is the mean over the usable images.",
        "The published rows are those of the CLOC paper (Table 1), for its own data and tokens.",
        "",
        "![histograms](stats.png)",
        "",
        "## Most frequent region texts",
        "",
        f"{'More than ' if stats.pruned else ''}{stats.distinct_texts:,} distinct texts"
        + ("; rare ones were dropped while counting, so counts are lower bounds." if stats.pruned else "."),
        "",
        *_table(
            ("text", "regions", "share"),
            [(_escape(text), f"{count:,}", f"{count / stats.regions:.1%}") for text, count in stats.top_texts],
        ),
        "",
        "## Skipped",
        "",
        *(_counts("reason", stats.skipped) if stats.skipped else ["Nothing."]),
    ]
    if stats.noticed:
        lines += ["", "## Worth a look", "", *_counts("what", stats.noticed), ""]
        lines += [f"* {_escape(what)}: {advice}." for what, advice in _ADVICE.items() if what in stats.noticed]
    return "\n".join(lines) + "\n"


def _counts(head: str, counts: Mapping[str, int]) -> list[str]:
    return _table((head, "count"), [(_escape(what), f"{count:,}") for what, count in counts.items()])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _figure(value: float) -> str:
    return "n/a" if value != value else f"{value:.2f}"


def _escape(text: str) -> str:
    """A text that stays one plain cell of a Markdown table."""
    return re.sub(r"([\\`*_|\[\]~#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def plot(stats: Stats) -> bytes:
    """The histograms and the most frequent texts as a PNG."""
    figure = Figure(figsize=(13, 7.4), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
    figure.suptitle(
        f"{stats.regions:,} regions on {stats.images_with_regions:,} of {stats.images:,} images",
        x=0.012, ha="left", fontsize=14, color=_INK,
    )  # fmt: skip
    grid = figure.add_gridspec(2, 3)
    unit = np.arange(NUM_BINS) / NUM_BINS
    sizes, scores, counts, lengths = (
        figure.add_subplot(cell) for cell in (grid[0, 0], grid[0, 1], grid[1, 0], grid[1, 1])
    )
    _bars(sizes, unit, stats.box_sizes, "Box size", "square root of the box's share of the image")
    _bars(scores, unit, stats.scores, "Score", "confidence of the detector", empty="no scores")
    _count_bars(counts, stats.region_counts, "Regions per image", "regions")
    _count_bars(lengths, stats.region_text_lengths, "Region-text length", stats.tokens)
    _text_bars(figure.add_subplot(grid[:, 2]), stats.top_texts[:TEXTS_PLOTTED])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # texts in scripts that the font doesn't have
        canvas.print_png(buffer)
    return buffer.getvalue()


def _bars(axes: Any, left: np.ndarray, heights: np.ndarray, title: str, label: str, empty: str = "none") -> None:
    """A histogram whose bars begin at `left`, evenly spaced."""
    width = left[1] - left[0]
    axes.bar(left, heights, width=width * 0.92, align="edge", color=_BLUE, linewidth=0)
    axes.set_xlim(left[0], left[-1] + width)
    axes.set_xlabel(label, color=_INK)
    _style(axes, title, grid="y")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if not heights.any():
        axes.set_yticks([])
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", color="#8795a1")


def _count_bars(axes: Any, heights: np.ndarray, title: str, label: str) -> None:
    """A histogram over whole numbers from 0; the last bar of `heights` stands for its number and all beyond."""
    last = len(heights) - 1
    used = max(int(np.flatnonzero(heights)[-1]) + 1 if heights.any() else 1, 8)
    _bars(axes, np.arange(used) - 0.46, heights[:used], title, label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}+" if value == last else f"{value:.0f}")


def _text_bars(axes: Any, texts: Sequence[tuple[str, int]]) -> None:
    places = np.arange(len(texts))
    axes.barh(places, [count for _, count in texts], height=0.78, color=_BLUE, linewidth=0)
    axes.set_yticks(places, [text if len(text) <= 32 else f"{text[:31]}…" for text, _ in texts], parse_math=False)
    axes.set_ylim(max(len(texts), 1) - 0.4, -0.6)
    axes.set_xlabel("regions", color=_INK)
    _style(axes, "Most frequent region texts", grid="x")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _style(axes: Any, title: str, grid: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=_FAINT, linewidth=0.8)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_FAINT)
