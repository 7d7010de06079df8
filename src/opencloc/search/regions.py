"""The regions of a photo that are stored: which boxes, and their embeddings, thinned where neighbours are near-equal.

Symbols: B photos, P boxes of one photo, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image

from opencloc.boxes import Letterbox
from opencloc.model.cloc import ClocModel
from opencloc.model.predictor import Predictor

RegionKind = Literal["grid", "whole", "detector"]

# Sides of the grid's boxes, as shares of the photo's, in steps of about half a box from edge to edge.  LONG ones come
# in two shapes, 1 : 2 and 2 : 1.  There are none among the small: they would win with a narrow part of a thing, whose
# name often fits it better than the whole.
SIDES = (0.7, 0.5, 0.4, 0.3, 0.22, 0.16)
LONG = (0.7, 0.45)
# A box that overlaps a kept one and whose embedding has at least this cosine with it is not stored.
SAME = 0.97
WHOLE = np.array([[0, 0, 1, 1]], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Regions:
    """The stored regions of one photo; the first is the whole photo."""

    boxes: Float[np.ndarray, "P 4"]  # XYXY, normalised to the photo
    vectors: Float[np.ndarray, "P E"]  # L2-normalised, float16


def grid_boxes() -> Float[np.ndarray, "P 4"]:
    """The boxes of the grid, the whole photo first, then from large to small."""
    sizes = [(side, side) for side in SIDES]
    for side in LONG:
        sizes += [(side * 2**-0.5, side * 2**0.5), (side * 2**0.5, side * 2**-0.5)]
    boxes = [WHOLE[0].tolist()]
    for width, height in sorted(sizes, key=lambda size: -size[0] * size[1]):
        for y in _steps(height):
            boxes += [[x, y, x + width, y + height] for x in _steps(width)]
    return np.asarray(boxes, dtype=np.float32).clip(0, 1)


def _steps(side: float) -> list[float]:
    """Starts of boxes of a side, about half a side apart, from edge to edge."""
    return np.linspace(0, 1 - side, int(np.ceil((1 - side) / (side / 2) - 1e-9)) + 1).tolist()


def thinned(
    boxes: Float[np.ndarray, "P 4"], vectors: Float[np.ndarray, "P E"], same: float = SAME
) -> Bool[np.ndarray, " P"]:
    """Which regions are kept, going through them in order: those that no overlapping kept one equals."""
    alike = (vectors @ vectors.T >= same) & _overlapping(boxes)
    kept = np.zeros(len(boxes), dtype=bool)
    covered = np.zeros(len(boxes), dtype=bool)  # by one that is kept
    for row in range(len(boxes)):
        if not covered[row]:
            kept[row] = True
            covered |= alike[row]
    return kept


def _overlapping(boxes: np.ndarray) -> np.ndarray:
    """(P, P): whether two boxes share more than an edge."""
    low, high = boxes[:, :2], boxes[:, 2:]
    begins = (low[:, None, 0] < high[None, :, 0]) & (low[:, None, 1] < high[None, :, 1])  # before the other ends
    full = begins.diagonal()
    return begins & begins.T & full[:, None] & full


@torch.no_grad()
def encode_regions(
    predictor: Predictor, photos: Sequence[Image.Image], boxes: Sequence[np.ndarray], kind: RegionKind
) -> list[Regions]:
    """The regions of each photo, by one pass of the tower over the batch; `boxes` (P, 4) of each, normalised to it.

    `whole` stores the embedding of the image tower.  Elsewhere all regions, the whole photo too, are prompted, so that
    their scores compare.  Raises ValueError for embeddings that are not finite.
    """
    model: ClocModel = predictor.model
    pixels, letterboxes = predictor.processor.letterbox(list(photos))
    features = model.encode_image(pixels.to(model.device))
    if kind == "whole":
        embeddings = list(features.embedding[:, None])
    else:
        squares = [
            _in_square(own, letterbox).to(model.device) for own, letterbox in zip(boxes, letterboxes, strict=True)
        ]
        embeddings = model.encode_regions(features, squares)
    found: list[Regions] = []
    for own, embedding in zip(boxes, embeddings, strict=True):
        vectors = embedding.float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise ValueError("the model makes embeddings that are not finite: its weights are damaged")
        kept = thinned(own, vectors)
        found.append(Regions(boxes=own[kept], vectors=vectors[kept].astype(np.float16)))
    return found


def _in_square(boxes: np.ndarray, letterbox: Letterbox) -> torch.Tensor:
    return letterbox.to_square(torch.from_numpy(boxes)).clamp(0, 1)
