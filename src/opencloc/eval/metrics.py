"""Scores from embeddings and boxes: recognition, retrieval and grounding, each with its denominators.

Pure functions over tensors.  What is a region, a class or a caption is decided in `tasks.py`; nothing here knows of
images, encoders or files.  Every score comes from a vector of outcomes, one per query (`class_ranks`,
`best_hit_ranks`, `opencloc.boxes.iou`), so intervals can be drawn from the same outcomes.

Ties always count against the encoder: a rival that scores within `TIE` of the truth is ranked before it, and so is
any rival when a score is not a number.  Embeddings that are all equal therefore score 0, not 1.

Symbols: R regions, C classes, Q queries, G gallery entries, P pairs, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opencloc.boxes import iou

TIE = 1e-6  # cosines this near are one value: float32 rounding differs with a row's place in a matrix product
SCORES_AT_ONCE = 2**23  # entries of the score matrix held at a time

# A box is small below 1 % of its image's area, medium below 10 %, else large.  COCO's 32 and 96 px mean nothing to an
# encoder that resizes; of 14 x 14 patches, 1 % is about two and 10 % about twenty.
SIZE_LIMITS = {"small": 0.01, "medium": 0.10, "large": float("inf")}


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of boxes named right.  Scores are in [0, 1], NaN where there is no box."""

    top1: float  # over boxes
    macc: float  # mean over the classes present of each class's own share
    boxes: int  # denominator of top1
    classes_present: int  # denominator of macc: classes with at least one box


@dataclass(frozen=True, kw_only=True)
class RegionRecognition:
    """Naming given boxes among a list of class names."""

    overall: Accuracy
    by_size: dict[str, Accuracy]  # keys of SIZE_LIMITS
    classes: int  # names to choose from; chance is 1 / classes


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of queries with a hit among the first 1, 5 and 10 of the gallery, in [0, 1]."""

    r1: float
    r5: float
    r10: float
    queries: int
    gallery: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Retrieval between items (images or regions) and texts, both ways."""

    to_text: Recall  # an item looks for any of its texts
    from_text: Recall  # a text looks for any item it describes
    distinct_texts: int


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Boxes found for texts."""

    acc50: float  # share of queries with plain IoU >= 0.5
    mean_iou: float
    queries: int


def region_recognition(
    regions: Float[Tensor, "R E"],
    classes: Float[Tensor, "C E"],
    labels: Int[Tensor, " R"],
    areas: Float[Tensor, " R"],
) -> RegionRecognition:
    """Top-1 and mean class accuracy of naming each region by the most similar class, overall and by box size.

    Embeddings are L2-normalised; `labels` index the classes; `areas` are shares of the image (see SIZE_LIMITS).
    Raises ValueError if there is no region.
    """
    if not len(regions):
        raise ValueError("no regions to recognise")
    correct = class_ranks(regions, classes, labels) == 1
    by_size, lower = {}, 0.0
    for size, upper in SIZE_LIMITS.items():
        inside = (areas >= lower) & (areas < upper)
        by_size[size] = accuracy(correct[inside], labels[inside])
        lower = upper
    return RegionRecognition(overall=accuracy(correct, labels), by_size=by_size, classes=len(classes))


def accuracy(correct: Bool[Tensor, " R"], labels: Int[Tensor, " R"]) -> Accuracy:
    """Share of `correct` over boxes and over the classes present."""
    if not len(correct):
        return Accuracy(top1=float("nan"), macc=float("nan"), boxes=0, classes_present=0)
    boxes = torch.bincount(labels)
    right = torch.bincount(labels[correct], minlength=len(boxes))
    present = boxes > 0
    return Accuracy(
        top1=correct.double().mean().item(),
        macc=(right[present].double() / boxes[present]).mean().item(),
        boxes=len(correct),
        classes_present=int(present.sum()),
    )


def retrieval(items: Float[Tensor, "N E"], texts: Float[Tensor, "U E"], pairs: Int[Tensor, "P 2"]) -> Retrieval:
    """Recall at 1, 5 and 10 from items to texts and back, by cosine.

    `texts` are distinct; `pairs` (item, text) say which text describes which item, one row for each time it does.
    The gallery of `to_text` and the queries of `from_text` are the P texts as they occur: a text that occurs k times
    takes k places when it is wrong and asks k times, and each of its occurrences is a hit for every item it describes.
    So two regions both called "dog" never compete, and a rank is what it would be over the undeduplicated list.

    Raises ValueError if an item or a text is in no pair.
    """
    for what, side, count in (("item", 0, len(items)), ("text", 1, len(texts))):
        if not count or len(pairs[:, side].unique()) != count:
            raise ValueError(f"every {what} needs a pair: {count} {what}s, {len(pairs[:, side].unique())} in pairs")
    occurrences = torch.bincount(pairs[:, 1], minlength=len(texts))
    return Retrieval(
        to_text=_recall(
            best_hit_ranks(items, texts, pairs, weights=occurrences),
            asked=torch.ones(len(items), dtype=torch.long, device=pairs.device),
            gallery=len(pairs),
        ),
        from_text=_recall(best_hit_ranks(texts, items, pairs.flip(1)), asked=occurrences, gallery=len(items)),
        distinct_texts=len(texts),
    )


def grounding(predicted: Float[Tensor, "Q 4"], truth: Float[Tensor, "Q 4"]) -> Grounding:
    """Share of predicted boxes with plain IoU >= 0.5 (not GIoU) and the mean IoU, boxes normalised to their images.

    A predicted box that is empty or not a number has IoU 0.  Raises ValueError if there is no query.
    """
    if not len(truth):
        raise ValueError("no grounding queries")
    overlap = iou(predicted.double(), truth.double())
    inverted = (predicted[:, 2:] <= predicted[:, :2]).any(1)
    overlap = torch.where(inverted | overlap.isnan(), 0.0, overlap)
    return Grounding(
        # IoUs come from float32 boxes: exactly one half must count as one half.
        acc50=(overlap >= 0.5 - TIE).double().mean().item(),
        mean_iou=overlap.mean().item(),
        queries=len(truth),
    )


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


def _recall(ranks: Tensor, *, asked: Tensor, gallery: int) -> Recall:
    """Recall of ranks where query q was asked `asked[q]` times."""
    queries = int(asked.sum())

    def at(k: int) -> float:
        return int(asked[ranks <= k].sum()) / queries

    return Recall(r1=at(1), r5=at(5), r10=at(10), queries=queries, gallery=gallery)
