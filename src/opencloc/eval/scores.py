"""Scores with their denominators and intervals, from one row per query.

A score is a mean over cells of each cell's own share of hits: top-1 and recall have one cell, mean class accuracy has
one per class.  Intervals are percentiles of a bootstrap over images: the queries of one image (its regions, its
captions) hang together, so whole images are drawn, all scores from the same draws.  What is a hit is decided in
`protocols.py`.

Symbols: Q queries, I images, P distinct (image, cell) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZES = ("small", "medium", "large")
SIZE_LIMITS_PX = (32.0**2, 96.0**2)  # COCO's: areas in pixels of the image as annotated
SIZE_WORDS = {"small": "area < 32²", "medium": "area < 96²", "large": "area ≥ 96²"}
AT_ONCE = 2**21  # entries of a table of draws held at a time


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score in [0, 1] with its 95 % interval, NaN where it has no denominator."""

    label: str
    value: float
    low: float
    high: float
    count: int  # queries
    of: str  # the denominator in words


class Scorer:
    """Makes the scores of one task from rows of queries, all with the same draws from `images`.

    Of every query the number of its image is given; those of the constructor must include them all.
    """

    def __init__(self, images: np.ndarray, *, resamples: int, seed: int = 0) -> None:
        self.scores: dict[str, Score] = {}
        self._images = np.unique(images)
        self._draws = draw_images(len(self._images), resamples, seed)

    def add(
        self,
        key: str,
        label: str,
        hits: np.ndarray,
        images: np.ndarray,
        *,
        of: str,
        cells: np.ndarray | None = None,
    ) -> None:
        """Adds the score `key`: the mean over cells (one, if not given) of each cell's mean of `hits`."""
        places = np.searchsorted(self._images, images)
        cells = np.zeros(len(hits), dtype=np.int64) if cells is None else cells
        value, low, high = interval(hits.astype(np.float64), places, cells, self._draws)
        self.scores[key] = Score(label=label, value=value, low=low, high=high, count=len(hits), of=of)

    def add_accuracy(
        self, hits: np.ndarray, images: np.ndarray, labels: np.ndarray, *, what: str, classes: int, part: str = ""
    ) -> None:
        """Adds top-1 over `what` and mAcc over the classes present; `part` names the subset that the rows are."""
        key, suffix = (f"_{part.split(' ')[0]}", f", {part}") if part else ("", "")
        self.add(f"top1{key}", f"top-1{suffix}", hits, images, of=f"{len(hits):,} {what}")
        present = f"{len(np.unique(labels)):,} classes present of {classes:,}"
        self.add(f"macc{key}", f"mAcc{suffix}", hits, images, of=present, cells=labels)

    def add_recall(
        self, ranks: np.ndarray, images: np.ndarray, *, key: str, label: str, what: str, gallery: int
    ) -> None:
        """Adds recall at 1, 5 and 10 among `gallery` entries."""
        for k in (1, 5, 10):
            of = f"{len(ranks):,} {what} among {gallery:,}"
            self.add(f"{key}_r{k}", f"{label} R@{k}", ranks <= k, images, of=of)


def size_words(size: str) -> str:
    """The name of a size with its bound in pixels."""
    return f"{size} ({SIZE_WORDS[size]})"


def sizes_of(areas_px: np.ndarray) -> np.ndarray:
    """Of each area (Q,) in pixels its place in `SIZES`."""
    return np.digitize(areas_px, SIZE_LIMITS_PX)


def draw_images(num_images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn in each of the resamples: (resamples, I) uint8, rows sum to I."""
    random = np.random.default_rng(seed)
    draws = np.empty((resamples, num_images), dtype=np.uint8)
    for row in draws:
        row[:] = np.bincount(random.integers(num_images, size=num_images), minlength=num_images)
    return draws


def interval(hits: np.ndarray, images: np.ndarray, cells: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
    """(score, low, high) of rows (Q,): the mean over cells of each cell's mean hit, and its central 95 % over `draws`.

    A draw in which no row is left has no score and doesn't count.  No rows: NaN; a single image: no interval.
    """
    if not len(hits):
        return float("nan"), float("nan"), float("nan")
    names, cells = np.unique(cells, return_inverse=True)
    # rows of one image in one cell count together; pairs are sorted by cell, as reduceat needs them
    pairs, row_pair = np.unique(cells.astype(np.int64) * draws.shape[1] + images, return_inverse=True)
    pair_cell, pair_image = np.divmod(pairs, draws.shape[1])
    pair_hits = np.bincount(row_pair, weights=hits, minlength=len(pairs))
    pair_rows = np.bincount(row_pair, minlength=len(pairs)).astype(np.float64)
    starts = np.searchsorted(pair_cell, np.arange(len(names)))

    def means(times: np.ndarray) -> np.ndarray:
        """The score of each draw, from how often each pair is drawn (draws, P)."""
        right = np.add.reduceat(times * pair_hits, starts, axis=1)
        asked = np.add.reduceat(times * pair_rows, starts, axis=1)
        present = asked > 0
        shares = np.divide(right, asked, out=np.zeros_like(right), where=present)
        count = present.sum(axis=1)
        return np.divide(shares.sum(axis=1), count, out=np.full(len(times), np.nan), where=count > 0)

    value = float(means(np.ones((1, len(pairs))))[0])
    if len(np.unique(images)) < 2 or not len(draws):
        return value, float("nan"), float("nan")
    step = max(1, AT_ONCE // len(pairs))
    drawn = np.concatenate(
        [means(draws[i : i + step, pair_image].astype(np.float64)) for i in range(0, len(draws), step)]
    )
    low, high = np.quantile(drawn[~np.isnan(drawn)], (0.025, 0.975))
    return value, float(low), float(high)
