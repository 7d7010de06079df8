"""Box algebra, the letterbox, and the coordinate frames of the project.

A box is XYXY float32, normalised to [0, 1] of the image it belongs to.  Pixel boxes live only at the borders of
the program and are named `*_px`.  Three frames exist:

* the image: [0, 1] of the original width and height;
* the square: [0, 1] of the letterboxed square that the model sees (long side resized, the rest padded, paper
  section 4.1);
* pixels of either, only in names that end in `_px`.

`Letterbox` is the one place that moves boxes between the first two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)


def box_problem(box: np.ndarray, tolerance: float = 1e-4) -> str | None:
    """What is wrong with a normalised XYXY box of shape (4,), or None if it is sound."""
    if box.shape != (4,):
        return f"a box has 4 numbers, this one {box.shape}"
    if not np.isfinite(box).all():
        return f"box {box.tolist()} is not finite"
    if (box < -tolerance).any() or (box > 1 + tolerance).any():
        return f"box {box.tolist()} reaches outside the image [0, 1]"
    if box[2] <= box[0] or box[3] <= box[1]:
        return f"box {box.tolist()} is empty: needs x0 < x1 and y0 < y1"
    return None


def xywh_px_to_xyxy(box_px: np.ndarray, width_px: int | np.ndarray, height_px: int | np.ndarray) -> np.ndarray:
    """COCO's (x, y, width, height) in pixels, shape (..., 4), as normalised XYXY float32, clipped to the image.

    Width and height are those of one image, or of each box's own, of shape (...).
    """
    x, y, w, h = np.moveaxis(np.asarray(box_px, dtype=np.float64), -1, 0)
    with np.errstate(over="ignore", invalid="ignore"):  # an edge too large for a float is far outside, and clipped
        box = np.stack([x / width_px, y / height_px, (x + w) / width_px, (y + h) / height_px], axis=-1)
    return np.clip(box, 0.0, 1.0).astype(np.float32)


def clipped_px(boxes_px: np.ndarray, width_px: int, height_px: int) -> np.ndarray:
    """XYXY boxes (P, 4) in pixels, clipped to the image.

    Only what lies at most 1 pixel or 1 % of the side (the larger) over an edge is clipped, as detectors leave it.
    Raises ValueError naming the first box that reaches farther, is empty or not finite, or looks normalised: all of it
    within the first pixel of a larger image.
    """
    size = np.array([width_px, height_px] * 2, dtype=np.float64)
    tolerance = np.maximum(1.0, 0.01 * size)
    clipped = np.clip(boxes_px, 0, size)
    for i, (box, inside) in enumerate(zip(boxes_px, clipped, strict=True)):
        which = f"box {i}" if len(boxes_px) > 1 else "the box"
        where = f"{which} is {box.tolist()}, on an image of {width_px} x {height_px} pixels"
        if not np.isfinite(box).all():
            raise ValueError(f"{where}: it is not finite")
        if (box < -tolerance).any() or (box > size + tolerance).any():
            raise ValueError(f"{where}: it reaches outside")
        if (inside[2:] <= inside[:2]).any():
            raise ValueError(f"{where}: it is empty, boxes need x0 < x1 and y0 < y1")
        if box.max() <= 1 and max(width_px, height_px) > 2:
            raise ValueError(f"{where}: it looks normalised, boxes are in pixels here")
    return clipped


def area(boxes: Array) -> Array:
    """Areas of boxes (..., 4) as a share of the image, shape (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Float[Tensor, "*#A 4"], b: Float[Tensor, "*#A 4"]) -> Float[Tensor, "*#A"]:
    """Intersection over union of boxes, element by element (broadcasting); 0 where the union is empty."""
    return _overlap(a, b)[0]


def pairwise_iou(a: Float[Tensor, "P 4"], b: Float[Tensor, "Q 4"]) -> Float[Tensor, "P Q"]:
    """Intersection over union of every box of `a` with every box of `b`."""
    return iou(a[:, None], b[None])


def giou(a: Float[Tensor, "*#A 4"], b: Float[Tensor, "*#A 4"]) -> Float[Tensor, "*#A"]:
    """Generalised IoU in [-1, 1], element by element (Rezatofighi et al. 2019)."""
    overlap, union = _overlap(a, b)
    hull_wh = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = (hull_wh[..., 0] * hull_wh[..., 1]).clamp_min(1e-9)
    return overlap - (hull - union) / hull


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(IoU, union area) of boxes, element by element."""
    wh = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0)
    intersection = wh[..., 0] * wh[..., 1]
    union = area(a) + area(b) - intersection
    return intersection / union.clamp_min(1e-9), union


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """Where an image of `width_px` x `height_px` lies in the square the model sees.

    The long side fills the square, the short side is centred between two equal bars (as LLaVA's
    `expand2square` pads).  The geometry is exact and independent of the square's resolution, so boxes go there and
    back without rounding.
    """

    width_px: int
    height_px: int

    def __post_init__(self) -> None:
        if self.width_px < 1 or self.height_px < 1:
            raise ValueError(f"an image of {self.width_px} x {self.height_px} pixels is empty")

    @property
    def _scale(self) -> tuple[float, float]:
        long_px = max(self.width_px, self.height_px)
        return self.width_px / long_px, self.height_px / long_px

    def to_square(self, boxes: Array) -> Array:
        """Boxes (or, with a last axis of 2, points) of the image in the frame of the square."""
        scale, offset = self._affine(boxes)
        return boxes * scale + offset

    def to_image(self, boxes: Array) -> Array:
        """Inverse of `to_square`, clipped to the image."""
        scale, offset = self._affine(boxes)
        return ((boxes - offset) / scale).clip(0, 1)

    def _affine(self, like: Array) -> tuple[Array, Array]:
        sx, sy = self._scale
        repeat = like.shape[-1] // 2
        scale, offset = [sx, sy] * repeat, [(1 - sx) / 2, (1 - sy) / 2] * repeat
        if isinstance(like, Tensor):
            return like.new_tensor(scale), like.new_tensor(offset)
        return np.asarray(scale, dtype=like.dtype), np.asarray(offset, dtype=like.dtype)
