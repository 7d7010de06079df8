"""Ranks and overlaps of queries, and scores with their denominators and 95 % intervals.

Pure functions over arrays: nothing here knows of images, encoders or files.  Ties count against the encoder: a rival
that scores within `TIE` of the truth is ranked before it, and so is any rival when a score is not a number.
Embeddings that are all equal therefore score 0, not 1.

Symbols: R regions, C classes, Q queries, G gallery entries, P pairs, I images, E width of the joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opencloc.boxes import iou

TIE = 1e-6  # cosines this near are one value: float32 rounding differs with a row's place in a matrix product
SCORES_AT_ONCE = 2**23  # entries of the score matrix held at a time
DRAWS_AT_ONCE = 2**21  # entries of the table of draws held at a time
SIZES = {"small": "area under 32²", "medium": "under 96²", "large": "from 96²"}
_SIZE_LIMITS_PX = (32.0**2, 96.0**2)  # COCO's: areas of boxes in pixels of the image as annotated


# -- ranks and overlaps ------------------------------------------------------------------------------------------------


def class_ranks(
    regions: Float[Tensor, "R E"], classes: Float[Tensor, "C E"], labels: Int[Tensor, " R"]
) -> Int[Tensor, " R"]:
    """Rank of each region's own class among all classes by cosine; 1 is best, ties count against it."""
    ranks = torch.empty(len(regions), dtype=torch.long, device=regions.device)
    for rows, scores in _score_rows(regions, classes):
        own = scores.gather(1, labels[rows, None])
        ranks[rows] = _not_below(scores, own).sum(1)  # itself included
    return ranks


def best_hit_ranks(
    queries: Float[Tensor, "Q E"],
    gallery: Float[Tensor, "G E"],
    pairs: Int[Tensor, "P 2"],
    *,
    weights: Int[Tensor, " G"] | None = None,
) -> Int[Tensor, " Q"]:
    """Rank of each query's best hit in the gallery by cosine; 1 is best, ties count against it.

    `pairs` (query, gallery entry) are the hits, at least one per query.  Other hits take no place.  An entry that is
    no hit takes `weights` places (1 if not given).
    """
    asking, hits = pairs[pairs[:, 0].argsort()].T.contiguous()
    places = None if weights is None else weights.float()  # their sums are exact as far as ranks matter
    ranks = torch.empty(len(queries), dtype=torch.long, device=queries.device)
    for rows, scores in _score_rows(queries, gallery):
        first, last = torch.searchsorted(asking, torch.tensor([rows.start, rows.stop], device=asking.device)).tolist()
        at = asking[first:last] - rows.start, hits[first:last]
        best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, at[0], scores[at], "amax")
        scores[at] = -torch.inf
        before = _not_below(scores, best[:, None])
        ranks[rows] = 1 + (before.sum(1) if places is None else (before.float() @ places).long())
    return ranks


def retrieval_ranks(
    items: Float[Tensor, "N E"], texts: Float[Tensor, "U E"], pairs: Int[Tensor, "P 2"]
) -> tuple[Int[Tensor, " N"], Int[Tensor, " P"]]:
    """(rank of each item's best text, rank of the best item of each pair's text), by cosine.

    `texts` are distinct; `pairs` (item, text) say which text describes which item, one row for each time it does.
    Items look through the P texts as they occur: a text that occurs k times takes k places when it is wrong, and each
    of its occurrences is a hit for every item it describes.  So two regions both called "dog" never compete.
    """
    occurrences = torch.bincount(pairs[:, 1], minlength=len(texts))
    to_text = best_hit_ranks(items, texts, pairs, weights=occurrences)
    return to_text, best_hit_ranks(texts, items, pairs.flip(1))[pairs[:, 1]]


def overlaps(found: Tensor, truth: np.ndarray) -> np.ndarray:
    """Plain IoU (not GIoU) of boxes, broadcasting; 0 where a found box is empty or not a number."""
    overlap = iou(found.double(), torch.from_numpy(truth).double())
    unsound = (found[..., 2:] <= found[..., :2]).any(-1)
    return torch.where(unsound | overlap.isnan(), 0.0, overlap).numpy()


def share_below(scores: Float[Tensor, " Q"], rivals: Float[Tensor, " G"]) -> Float[Tensor, " Q"]:
    """The share of the rivals that lie clearly below each score; ties and what is no number count against it.

    Its mean is the area under the ROC curve.
    """
    return torch.stack([(rivals < score - TIE).double().mean() for score in scores])


def cosines(a: Float[Tensor, "A E"], b: Float[Tensor, "B E"]) -> Float[Tensor, "A B"]:
    """Products of every row with every row in float32, whatever autocast is on; cosines where rows are normalised."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().T


def _score_rows(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The score matrix in bands of whole rows: (rows, scores (rows, G) in float32)."""
    step = max(1, SCORES_AT_ONCE // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        yield rows, cosines(queries[rows], gallery)


def _not_below(scores: Tensor, own: Tensor) -> Tensor:
    """Where a score is not clearly below `own`; true for NaN on either side."""
    return ~(scores < own - TIE)


# -- scores with intervals ---------------------------------------------------------------------------------------------


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
    """Makes the scores of one task from rows of queries, all with the same draws of images.

    A score is a mean over cells of each cell's own mean: top-1 and recall have one cell, mean class accuracy has one
    for each class.  Its interval is the middle 95 % of a bootstrap over whole images, since the queries of one image
    (its regions, its captions) hang together.  Where all queries agree or come from one image, the draws say nothing:
    a plain share then has Wilson's interval with as many trials as there are images.
    """

    def __init__(self, images: np.ndarray, *, resamples: int, seed: int = 0) -> None:
        self.scores: dict[str, Score] = {}
        self._images = np.unique(images)  # the numbers of all images that will be named
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
        """Adds the score `key`: the mean over cells (one, if not given) of each cell's mean of `hits`.

        `images` has the number of each query's image.
        """
        places = np.searchsorted(self._images, images)
        one_cell = np.zeros(len(hits), dtype=np.int64)
        value, low, high = interval(hits.astype(np.float64), places, one_cell if cells is None else cells, self._draws)
        if len(self._draws) and len(hits) and hits.dtype == bool and cells is None and not low < high:
            low, high = wilson(value, len(np.unique(images)))
        self.scores[key] = Score(label=label, value=value, low=low, high=high, count=len(hits), of=of)

    def add_ratio(
        self, key: str, label: str, parts: np.ndarray, wholes: np.ndarray, images: np.ndarray, *, of: str
    ) -> None:
        """Adds the score `key`: the sum of `parts` over the sum of `wholes`, which F1 and judged scores are.

        A draw whose wholes sum to nothing doesn't count; no wholes at all: NaN.
        """
        places = np.searchsorted(self._images, images)
        sums = [np.bincount(places, weights=rows, minlength=len(self._images)) for rows in (parts, wholes)]
        drawn = [self._draws.astype(np.float64) @ of_image for of_image in sums]
        ratios = np.divide(*drawn, out=np.full(len(self._draws), math.nan), where=drawn[1] > 0)
        ratios = ratios[~np.isnan(ratios)]
        value = float(sums[0].sum() / sums[1].sum()) if sums[1].sum() > 0 else math.nan
        low, high = (math.nan, math.nan)
        if len(np.unique(images)) > 1 and len(ratios) and ratios.min() < ratios.max():
            low, high = map(float, np.quantile(ratios, (0.025, 0.975)))
        self.scores[key] = Score(label=label, value=value, low=low, high=high, count=len(parts), of=of)

    def add_accuracy(
        self,
        hits: np.ndarray,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        what: str,
        classes: int,
        parts: Sequence[str] = (),
    ) -> None:
        """Adds top-1 over `what` and mAcc over the classes present; `parts` name the subset, if it is one."""
        key = "".join(f"_{part.split(' ')[0]}" for part in parts if part)
        suffix = "".join(f", {part}" for part in parts if part)
        self.add(f"top1{key}", f"top-1{suffix}", hits, images, of=f"{len(hits):,} {what}")
        present = f"{len(np.unique(labels)):,} classes present of {classes:,}"
        self.add(f"macc{key}", f"mAcc{suffix}", hits, images, of=present, cells=labels)

    def add_sizes(
        self, key: str, label: str, hits: np.ndarray, images: np.ndarray, areas_px: np.ndarray, *, what: str
    ) -> None:
        """Adds the score of the rows of each size, from the areas of their boxes."""
        for size, inside in by_size(areas_px).items():
            name, of = f"{key}_{size.split(' ')[0]}", f"{inside.sum():,} {what}"
            self.add(name, f"{label}, {size}", hits[inside], images[inside], of=of)

    def add_recall(
        self, ranks: np.ndarray, images: np.ndarray, *, key: str, label: str, what: str, gallery: int
    ) -> None:
        """Adds recall at 1, 5 and 10 among `gallery` entries."""
        for k in (1, 5, 10):
            of = f"{len(ranks):,} {what} among {gallery:,}"
            self.add(f"{key}_r{k}", f"{label} R@{k}", ranks <= k, images, of=of)


def by_size(areas_px: np.ndarray) -> dict[str, np.ndarray]:
    """Of each size, with its bound in words, which of the areas (Q,) belong to it."""
    places = np.digitize(areas_px, _SIZE_LIMITS_PX)
    return {f"{size} ({words})": places == place for place, (size, words) in enumerate(SIZES.items())}


def draw_images(num_images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn in each of the resamples: (resamples, I) uint8, rows sum to I."""
    random = np.random.default_rng(seed)
    draws = np.empty((resamples, num_images), dtype=np.uint8)
    for row in draws:
        row[:] = np.bincount(random.integers(num_images, size=num_images), minlength=num_images)
    return draws


def interval(hits: np.ndarray, images: np.ndarray, cells: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
    """(score, low, high) of rows (Q,): the mean over cells of each cell's mean hit, and its central 95 % over `draws`.

    A draw in which no row is left has no score and doesn't count.  No rows: NaN; draws that all agree: no interval.
    """
    if not len(hits):
        return math.nan, math.nan, math.nan
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

    shares = np.add.reduceat(pair_hits, starts) / np.add.reduceat(pair_rows, starts)
    value = torch.from_numpy(hits if len(names) == 1 else shares).mean().item()  # torch adds up more exactly
    step = max(1, DRAWS_AT_ONCE // len(pairs))
    parts = [means(draws[i : i + step, pair_image].astype(np.float64)) for i in range(0, len(draws), step)]
    drawn = np.concatenate([np.zeros(0), *parts])
    drawn = drawn[~np.isnan(drawn)]
    if len(np.unique(images)) < 2 or not len(drawn) or drawn.min() == drawn.max():
        return value, math.nan, math.nan
    low, high = np.quantile(drawn, (0.025, 0.975))
    return value, float(low), float(high)


def wilson(share: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many trials: (0, 0.168) for 0 of 19."""
    z2 = 1.959963984540054**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


class Rows:
    """Columns of values of queries, gathered batch by batch: `rows.add(images=..., ranks=...)`, `rows["ranks"]`."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, **columns: Tensor | np.ndarray | Sequence[float]) -> None:
        """Adds some rows; every call names the same columns."""
        for name, values in columns.items():
            array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
            self._parts.setdefault(name, []).append(array)

    def __len__(self) -> int:
        return sum(map(len, next(iter(self._parts.values()), [])))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate(self._parts[name])
