"""Which of a detector's boxes become region texts: named filters, whose counts go into every shard's statistics.

Symbols: D detections of one image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from opencloc.boxes import area
from opencloc.config import Strict
from opencloc.vesl.detect import Detections


@dataclass(frozen=True, kw_only=True)
class FilterConfig(Strict):
    """What a detection must satisfy to become a region.  The first two are the paper's (section 3.3).

    Raises ValueError, naming the field and its range, for a value that makes no sense.
    """

    score: float = 0.1
    """Keep detections that score more than this; in [0, 1)."""
    nms_iou: float = 0.5
    """Of boxes that overlap by more than this IoU, whatever their phrases, keep the most confident; 1 keeps all."""
    duplicate_inside: float = 0.9
    """Of boxes with the same phrase, drop the less confident where the smaller lies inside the larger by more than
    this share of its own area; 1 keeps all."""
    min_area: float = 0.001
    """Smallest box, as a share of the image; 0.001 is 14 x 14 pixels of a 448-pixel square."""
    max_area: float = 0.95
    """Largest box, as a share of the image: beyond it the region text says no more than a caption."""
    max_words: int = 10
    """Longest region text, in words."""

    def __post_init__(self) -> None:
        if not 0 <= self.score < 1:
            raise ValueError(f"filter score must be in [0, 1), got {self.score}")
        for name in ("nms_iou", "duplicate_inside"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"filter {name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.min_area < self.max_area <= 1:
            raise ValueError(
                f"filter areas must satisfy 0 <= min_area < max_area <= 1, got {self.min_area} and {self.max_area}"
            )
        if self.max_words < 1:
            raise ValueError(f"filter max_words must be at least 1, got {self.max_words}")


def filter_detections(
    found: Detections, phrases: Sequence[str], config: FilterConfig
) -> tuple[Detections, Counter[str]]:
    """(the detections that stay, best first, clipped to the image; how many each filter dropped, by its name).

    The order, each filter seeing what the ones before it left: `outside` (nothing of the box lies in the image),
    `score`, `words` (phrase too long), `best_phrase` (another phrase scores higher on the very same box), `min_area`,
    `max_area`, `nms`, `duplicate`.  Ties go to the detection that the detector named first.

    Raises ValueError if a box is not finite, a score lies outside [0, 1] or there is no phrase of a number.
    """
    _check(found, len(phrases))
    dropped: Counter[str] = Counter()
    found = replace(found, boxes=found.boxes.clip(0, 1))
    found = found.take(np.argsort(-found.scores, kind="stable"))

    def keep(name: str, mask: np.ndarray) -> None:
        nonlocal found
        if count := int((~mask).sum()):
            dropped[name] += count
            found = found.take(mask)

    words = np.array([len(phrase.split()) for phrase in phrases], dtype=int)
    keep("outside", np.all(found.boxes[:, 2:] > found.boxes[:, :2], axis=1))
    keep("score", found.scores > config.score)
    keep("words", words[found.phrase] <= config.max_words)
    keep("best_phrase", first_of_equal(found.boxes))
    keep("min_area", area(found.boxes) >= config.min_area)
    keep("max_area", area(found.boxes) <= config.max_area)
    keep("nms", nms(found.boxes, config.nms_iou))
    keep("duplicate", not_inside_same_phrase(found.boxes, found.phrase, config.duplicate_inside))
    return found, dropped


def first_of_equal(boxes: np.ndarray) -> np.ndarray:
    """(D,) True where no earlier box has exactly the same coordinates."""
    mask = np.zeros(len(boxes), dtype=bool)
    mask[np.unique(boxes, axis=0, return_index=True)[1]] = True
    return mask


def nms(boxes: np.ndarray, max_iou: float) -> np.ndarray:
    """(D,) True for the boxes that greedy non-maximum suppression keeps; `boxes` (D, 4) come best first.

    A box goes if it overlaps a kept one by an IoU above `max_iou`.
    """
    areas, shared = area(boxes), _shared(boxes)
    return _greedy(shared > max_iou * (areas[:, None] + areas[None] - shared))


def not_inside_same_phrase(boxes: np.ndarray, phrase: np.ndarray, max_inside: float) -> np.ndarray:
    """(D,) True for the boxes that stay when nested boxes of one phrase are reduced to the best; best first.

    A box goes if it and a kept one of the same phrase share more than `max_inside` of the smaller one's area.
    """
    areas, shared = area(boxes), _shared(boxes)
    same = phrase[:, None] == phrase[None]
    return _greedy(same & (shared > max_inside * np.minimum(areas[:, None], areas[None])))


def _greedy(suppresses: np.ndarray) -> np.ndarray:
    """(D,) True for those kept: in order, each kept one removes the later ones that it `suppresses` (D, D)."""
    kept = np.ones(len(suppresses), dtype=bool)
    for best in range(len(suppresses)):
        if kept[best]:
            kept[best + 1 :] &= ~suppresses[best, best + 1 :]
    return kept


def _shared(boxes: np.ndarray) -> np.ndarray:
    """(D, D) areas that boxes (D, 4) share with each other."""
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    return sides.clip(min=0).prod(axis=-1)


def _check(found: Detections, num_phrases: int) -> None:
    if not np.isfinite(found.boxes).all():
        raise ValueError("the detector returned a box that is not finite")
    if not ((found.scores >= 0) & (found.scores <= 1)).all():
        raise ValueError("the detector returned a score outside [0, 1]")
    if len(found) and (found.phrase.min() < 0 or found.phrase.max() >= num_phrases):
        low, high = found.phrase.min(), found.phrase.max()
        raise ValueError(f"the detector returned phrase numbers {low} to {high} for {num_phrases} phrases")
