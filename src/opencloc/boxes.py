"""Box algebra and the letterbox.  Owns every coordinate frame of the project.

A box is XYXY float32, normalised to [0, 1] of the image it belongs to.  Pixel boxes live only at the borders of
the program and are named `*_px`.  Three frames exist:

* the image: [0, 1] of the original width and height;
* the square: [0, 1] of the letterboxed square that the model sees (long side resized, the rest padded, paper
  section 4.1);
* pixels of either, only in names that end in `_px`.

`Letterbox` is the one place that moves boxes between the first two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)

MEAN_RGB = (0.48145466, 0.4578275, 0.40821073)  # CLIP's pixel mean; the letterbox pads with it (0 once normalised)
STD_RGB = (0.26862954, 0.26130258, 0.27577711)


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


def xywh_px_to_xyxy(box_px: np.ndarray, width_px: int, height_px: int) -> np.ndarray:
    """COCO's (x, y, width, height) in pixels, shape (..., 4), as normalised XYXY float32, clipped to the image."""
    x, y, w, h = np.moveaxis(np.asarray(box_px, dtype=np.float64), -1, 0)
    box = np.stack([x / width_px, y / height_px, (x + w) / width_px, (y + h) / height_px], axis=-1)
    return np.clip(box, 0.0, 1.0).astype(np.float32)


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


def crop(image: Image.Image, box: np.ndarray) -> Image.Image:
    """The box (4,), normalised to the image, cut out at whole pixels: rounded to the nearest, at least one each way."""
    left, right = _whole_pixels(float(box[0]), float(box[2]), image.width)
    top, bottom = _whole_pixels(float(box[1]), float(box[3]), image.height)
    return image.crop((left, top, right, bottom))


def _whole_pixels(low: float, high: float, size_px: int) -> tuple[int, int]:
    first = min(max(round(low * size_px), 0), size_px - 1)
    return first, min(max(round(high * size_px), first + 1), size_px)


def letterbox_array(image: Image.Image, size_px: int) -> np.ndarray:
    """The image resized (bicubic, antialiased) into a square (size_px, size_px, 3) of uint8, padded with CLIP's mean.

    The image is placed with sub-pixel accuracy at the very place `Letterbox.to_square` says: the resampled content
    covers the exact (unrounded) rectangle, bars cover the rest.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")  # which copies even what is RGB
    width, height = image.size
    if width == height:
        return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC))
    scale = size_px / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (size_px - inner[0]) // 2, (size_px - inner[1]) // 2
    # The source rectangle whose image is the whole-pixel rectangle (left, top, inner): pixel p of the square shows
    # source coordinate (p - offset) / scale.  It may reach at most half a pixel over the source; it is clipped there.
    offset_x, offset_y = (size_px - width * scale) / 2, (size_px - height * scale) / 2
    source = (
        max(0.0, (left - offset_x) / scale),
        max(0.0, (top - offset_y) / scale),
        min(float(width), (left + inner[0] - offset_x) / scale),
        min(float(height), (top + inner[1] - offset_y) / scale),
    )
    square = _bars(size_px).copy()
    resized = image.resize(inner, Image.Resampling.BICUBIC, box=source)
    square[top : top + inner[1], left : left + inner[0]] = np.asarray(resized)
    return square


@functools.lru_cache(maxsize=4)
def _bars(size_px: int) -> np.ndarray:
    """A square of CLIP's mean colour, (size_px, size_px, 3)."""
    return np.full((size_px, size_px, 3), [round(255 * c) for c in MEAN_RGB], dtype=np.uint8)
