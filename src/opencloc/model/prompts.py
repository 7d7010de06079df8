"""Prompts: what a user points with, and the tokens and spatial priors it becomes.

A prompt is one or more tokens, each with a spatial prior over the patches of the image: a penalty that says how far a
patch lies from what the prompt points at, and that attention subtracts from its scores.

* box: two corner tokens (paper section 3.2), penalty = -log of the share of the patch that the box covers;
* mask: the corner tokens of its bounding box, the same penalty;
* point: one token, penalty = r^2 / 2 with r the distance in patches (a Gaussian of one patch);
* text: one token that has only a penalty, minus the logits of the text's heat map (`Heat`); where the Prompter cannot
  make one, a token made of f_T(y), without a penalty;
* several prompts in a tuple: their tokens, side by side, make one prompt.

Patches and corners share one sinusoidal position basis.  Here all coordinates are in the frame of the letterboxed
square; `Predictor` takes the same classes in pixels of the image and moves them there.

Symbols: B images, P prompts per image, K tokens per prompt, N patches, D width of the vision tower, E width of the
joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

MIN_CYCLES = 0.25  # lowest frequency of the position basis, in cycles per image
LEAST_SHARE = 0.01  # of a patch, beside the patch that a region covers most
OUTSIDE = math.exp(1.5)  # penalty per patch of distance where a region covers nothing


@dataclass(frozen=True)
class Box:
    """A region given by its corners, x0 < x1 and y0 < y1.

    For `ClocModel` in [0, 1] of the square, for `Predictor` in pixels of the image.
    """

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Point:
    """A region given by one point: for `ClocModel` in [0, 1] of the square, for `Predictor` in pixels of the image."""

    x: float
    y: float


@dataclass(frozen=True)
class Mask:
    """A region given by a mask.

    For `ClocModel` a tensor over the square, any resolution (H, W), bool or coverage in [0, 1].  For `Predictor`
    anything that `opencloc.images.as_mask` takes, of the size of the image.
    """

    mask: Any


@dataclass(frozen=True)
class Text:
    """A region given by a text: its embedding f_T(y), shape (E,); `Predictor` takes a string too."""

    text: str | Tensor


@dataclass(frozen=True)
class Heat:
    """A text as one image answers it: logits over the patches, shape (N,).  `ClocModel` makes it of a `Text`."""

    logits: Tensor


Prompt = Box | Point | Mask | Text | tuple[Box | Point | Mask | Text, ...]


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts of a batch, padded to the same number per image and of tokens per prompt."""

    tokens: Float[Tensor, "B P K D"]
    penalty: Float[Tensor, "B P K N"]
    valid: Bool[Tensor, "B P K"]  # False where a token is padding
    asks: Bool[Tensor, "B P K"]  # False where a token has only its prior: attention is then softmax(-penalty)
    boxes: Float[Tensor, "B P 4"]  # extent of the prompt; the whole square for a text

    def over(self, kept: Int[Tensor, "B N_kept"]) -> PromptBatch:
        """The same prompts where of each image only the patches `kept` are there."""
        where = kept[:, None, None].expand(*self.penalty.shape[:3], -1)
        return replace(self, penalty=self.penalty.gather(-1, where))


def sinusoidal(xy: Float[Tensor, "*S 2"], dim: int, max_cycles: float) -> Float[Tensor, "*S D"]:
    """Position basis of points in [0, 1]: half of it sines and cosines of x, half of y.

    `dim` must be a multiple of 4.  Frequencies run geometrically from `MIN_CYCLES` to `max_cycles` per image;
    half the number of patches per side is the finest that patches can tell apart.
    """
    if dim % 4:
        raise ValueError(f"the width of the vision tower must be a multiple of 4 for the position basis, got {dim}")
    steps = torch.linspace(0, 1, dim // 4, device=xy.device)
    cycles = MIN_CYCLES * (max(max_cycles, 1.0) / MIN_CYCLES) ** steps
    phase = 2 * math.pi * xy.float()[..., None] * cycles
    return torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(-2)


def patch_centres(grid: tuple[int, int], device: torch.device | None = None) -> Float[Tensor, "N 2"]:
    """Centres (x, y) in [0, 1] of the patches of a (rows, columns) grid, row by row."""
    rows, columns = grid
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def coverage_penalty(coverage: Float[Tensor, "*S N"], distance: Float[Tensor, "*S N"]) -> Float[Tensor, "*S N"]:
    """The penalty of a region, from the share of every patch that it covers: -log(share / largest share).

    With it as attention bias and nothing else, attention is the area-weighted mean over the region.  Shares under 1 %
    of the largest count as 1 %.  A patch without any share pays `OUTSIDE` more for each patch of `distance` to the
    nearest patch that has one.
    """
    share = coverage / coverage.amax(-1, keepdim=True).clamp_min(1e-12)
    return torch.where(coverage > 0, 0.0, OUTSIDE * distance) - share.clamp_min(LEAST_SHARE).log()


def box_penalty(boxes: Float[Tensor, "*S 4"], grid: tuple[int, int]) -> Float[Tensor, "*S N"]:
    """`coverage_penalty` of boxes."""
    covered, away = [], []  # along x and y: the share of each column (row), and how far it lies from one with a share
    for axis, count in ((0, grid[1]), (1, grid[0])):
        edge = torch.arange(count, device=boxes.device)
        low, high = (boxes.float()[..., axis + side, None] * count for side in (0, 2))
        share = (torch.minimum(high, edge + 1) - torch.maximum(low, edge)).clamp_min(0)
        covered.append(share)
        away.append(torch.maximum(low.floor() - edge, edge + 1 - high.ceil()).clamp_min(0))
    coverage = covered[1][..., :, None] * covered[0][..., None, :]
    distance = (away[1][..., :, None].square() + away[0][..., None, :].square()).sqrt()
    return coverage_penalty(coverage.flatten(-2), distance.flatten(-2))


def mask_penalty(mask: Float[Tensor, "H W"] | Bool[Tensor, "H W"], grid: tuple[int, int]) -> Float[Tensor, " N"]:
    """`coverage_penalty` of a mask."""
    coverage = nn.functional.adaptive_avg_pool2d(mask.float()[None, None], grid).flatten()
    centres = _in_patches(patch_centres(grid, mask.device), grid)
    distance = torch.cdist(centres, centres).masked_fill(coverage <= 0, float("inf")).amin(-1)
    return coverage_penalty(coverage, distance)


def point_penalty(points: Float[Tensor, "*S 2"], grid: tuple[int, int]) -> Float[Tensor, "*S N"]:
    """Half the squared distance of every patch centre to the point, in patches: a Gaussian of one patch."""
    offset = points.float()[..., None, :] - patch_centres(grid, points.device)
    return _in_patches(offset, grid).square().sum(-1) / 2


def mask_box(mask: Tensor) -> Float[Tensor, " 4"]:
    """Bounding box of a mask, normalised.

    Raises ValueError if the mask is empty, not two-dimensional or not within [0, 1].
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask has shape (H, W), this one {tuple(mask.shape)}")
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError("a mask is bool or coverage in [0, 1], this one has other values")
    rows, columns = (mask > 0).any(1).nonzero(), (mask > 0).any(0).nonzero()
    if len(rows) == 0:
        raise ValueError("the mask is empty")
    height, width = mask.shape
    box = [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
    return torch.stack([edge.squeeze() for edge in box]).float()


def check_boxes(boxes: Tensor) -> None:
    """Raises ValueError naming the first box that is not finite, reaches outside [0, 1] or is empty."""
    bad = ~torch.isfinite(boxes).all(-1) | (boxes < -1e-4).any(-1) | (boxes > 1 + 1e-4).any(-1)
    bad |= (boxes[..., 2] <= boxes[..., 0]) | (boxes[..., 3] <= boxes[..., 1])
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"box {where} is {boxes[where].tolist()}: needs finite 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 "
            "(normalised to the letterboxed square, not pixels)"
        )


def as_prompt(prompt: Any) -> Any:
    """A row of a tensor of boxes as a `Box`, anything else as it is."""
    return Box(*prompt.tolist()) if isinstance(prompt, Tensor) and prompt.shape == (4,) else prompt


def has_text(prompt: Prompt) -> bool:
    return isinstance(prompt, Text) or (isinstance(prompt, tuple) and any(isinstance(part, Text) for part in prompt))


def replace_texts(prompt: Prompt, other: Callable[[Text], Any]) -> Any:
    """The prompt with `other(text)` in place of every text."""
    if isinstance(prompt, tuple):
        return tuple(replace_texts(part, other) for part in prompt)
    return other(prompt) if isinstance(prompt, Text) else prompt


def check_text(prompt: Text, embed_dim: int) -> Float[Tensor, " E"]:
    """The embedding of a text prompt.  Raises ValueError if it has another shape than (E,) or is not finite."""
    text = prompt.text
    if not isinstance(text, Tensor):
        raise TypeError(f"{prompt!r}: ClocModel takes texts as embeddings by encode_text; Predictor takes strings")
    if text.shape != (embed_dim,):
        raise ValueError(f"a text embedding has shape ({embed_dim},), this one {tuple(text.shape)}")
    if not torch.isfinite(text).all():
        raise ValueError("a text embedding holds values that are not finite")
    return text


class PromptEncoder(nn.Module):
    """Prompts -> tokens and priors.  One private method per kind of prompt.

    `text_tokens`: texts become tokens by weights of their own; else they are only taken as heat maps.
    """

    def __init__(self, width: int, embed_dim: int, grid: tuple[int, int], *, text_tokens: bool = True) -> None:
        super().__init__()
        self.width, self.grid, self.max_cycles = width, grid, max(grid) / 2
        self.corner_kind = nn.Parameter(torch.zeros(2, width))  # top left, bottom right
        self.point_kind = nn.Parameter(torch.zeros(width))
        if text_tokens:
            self.text_kind = nn.Parameter(torch.zeros(width))
            self.text_projection = nn.Linear(embed_dim, width)

    def basis(self, xy: Float[Tensor, "*S 2"]) -> Float[Tensor, "*S D"]:
        """Position basis shared by prompts and patches."""
        return sinusoidal(xy, self.width, self.max_cycles).to(self.corner_kind.dtype)

    def boxes(self, boxes: Float[Tensor, "B P 4"]) -> PromptBatch:
        """Box prompts.  Values are not checked: the training loop must not wait for the device.

        What is not finite (padding that the loss leaves out) is moved into the square, so that it has no NaN gradient.
        """
        batch, count = boxes.shape[:2]
        boxes = boxes.nan_to_num(0.0, 1.0, 0.0)
        tokens = self.basis(boxes.reshape(batch, count, 2, 2)) + self.corner_kind
        penalty = box_penalty(boxes, self.grid)[:, :, None].expand(-1, -1, 2, -1)
        return PromptBatch(tokens=tokens, penalty=penalty, valid=_all(tokens), asks=_all(tokens), boxes=boxes.float())

    def points(self, xy: Float[Tensor, "B P 2"]) -> PromptBatch:
        """Point prompts, each with the extent of a patch around it.  Values are not checked."""
        tokens = (self.basis(xy) + self.point_kind)[:, :, None]
        half = xy.new_tensor([0.5 / self.grid[1], 0.5 / self.grid[0]])
        box = torch.cat([xy - half, xy + half], -1).clamp(0, 1)
        penalty = point_penalty(xy, self.grid)[:, :, None]
        return PromptBatch(tokens=tokens, penalty=penalty, valid=_all(tokens), asks=_all(tokens), boxes=box)

    def texts(self, embeddings: Float[Tensor, "B P E"]) -> PromptBatch:
        """Text prompts, from L2-normalised embeddings f_T(y)."""
        batch, count, embed_dim = embeddings.shape
        scaled = (embeddings * embed_dim**0.5).to(self.text_kind.dtype)
        tokens = (self.text_projection(scaled) + self.text_kind)[:, :, None]
        penalty = torch.zeros(batch, count, 1, self.grid[0] * self.grid[1], device=tokens.device)
        corner = penalty.new_zeros(batch, count, 2)
        whole = torch.cat([corner, corner + 1], -1)
        return PromptBatch(tokens=tokens, penalty=penalty, valid=_all(tokens), asks=_all(tokens), boxes=whole)

    def heat(self, heat: Float[Tensor, "B P N"]) -> PromptBatch:
        """Text prompts, from the logits of the texts' heat maps over the patches."""
        tokens = torch.zeros(*heat.shape[:2], 1, self.width, device=heat.device, dtype=self.corner_kind.dtype)
        corner = heat.new_zeros(*heat.shape[:2], 2)
        return PromptBatch(
            tokens=tokens,
            penalty=-heat[:, :, None].float(),
            valid=_all(tokens),
            asks=~_all(tokens),
            boxes=torch.cat([corner, corner + 1], -1).float(),
        )

    def forward(self, prompts: Sequence[Sequence[Any]]) -> PromptBatch:
        """Any prompts (`Heat` among them), any number per image; images with fewer get padding, which is not valid."""
        rows = [[self._one(prompt) for prompt in image] for image in prompts]
        device = self.corner_kind.device
        count = max((len(row) for row in rows), default=0)
        num_tokens = max((p.tokens.shape[2] for row in rows for p in row), default=1)
        empty = PromptBatch(
            tokens=torch.zeros(1, 1, 0, self.width, device=device),
            penalty=torch.zeros(1, 1, 0, self.grid[0] * self.grid[1], device=device),
            valid=torch.zeros(1, 1, 0, dtype=torch.bool, device=device),
            asks=torch.zeros(1, 1, 0, dtype=torch.bool, device=device),
            boxes=torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).reshape(1, 1, 4),
        )
        padded = [[_pad_tokens(p, num_tokens) for p in [*row, *[empty] * (count - len(row))]] for row in rows]
        if count == 0:
            blank = _pad_tokens(empty, 1)
            return PromptBatch(**{k: v[:, :0].expand(len(rows), *v[:, :0].shape[1:]) for k, v in vars(blank).items()})
        return concatenate([concatenate(row, dim=1) for row in padded], dim=0)

    def _one(self, prompt: Any) -> PromptBatch:
        if isinstance(prompt, tuple):
            if not prompt:
                raise ValueError("a combined prompt needs at least one part")
            parts = [self._one(part) for part in prompt]
            places = [part.boxes for part, p in zip(parts, prompt, strict=True) if not isinstance(p, Text | Heat)]
            corners = torch.stack(places or [parts[0].boxes])
            return PromptBatch(
                tokens=torch.cat([p.tokens for p in parts], 2),
                penalty=torch.cat([p.penalty for p in parts], 2),
                valid=torch.cat([p.valid for p in parts], 2),
                asks=torch.cat([p.asks for p in parts], 2),
                boxes=torch.cat([corners[..., :2].amin(0), corners[..., 2:].amax(0)], -1),
            )
        if isinstance(prompt, Box):
            box = self._numbers(prompt)
            check_boxes(box)
            return self.boxes(box)
        if isinstance(prompt, Point):
            return self._point(prompt)
        if isinstance(prompt, Mask) and isinstance(prompt.mask, Tensor):
            return self._mask(prompt.mask.to(self.corner_kind.device))
        if isinstance(prompt, Heat):
            return self.heat(prompt.logits[None, None])
        if isinstance(prompt, Text) and isinstance(prompt.text, Tensor):
            text = check_text(prompt, self.text_projection.in_features)
            return self.texts(text.to(self.corner_kind.device)[None, None])
        raise TypeError(
            f"{prompt!r} is no prompt: ClocModel takes Box, Point, Mask (of a tensor), Text (of an embedding by "
            "encode_text) and tuples of them; Predictor takes strings and other masks too"
        )

    def _numbers(self, prompt: Box | Point) -> Float[Tensor, "1 1 C"]:
        try:
            return self.corner_kind.new_tensor([[[float(value) for value in astuple(prompt)]]])
        except (TypeError, ValueError):
            raise TypeError(f"{prompt!r}: coordinates are real numbers") from None

    def _point(self, point: Point) -> PromptBatch:
        xy = self._numbers(point)
        if not (torch.isfinite(xy).all() and (xy >= 0).all() and (xy <= 1).all()):
            raise ValueError(f"{point} lies outside the square [0, 1] (normalised, not pixels)")
        return self.points(xy)

    def _mask(self, mask: Tensor) -> PromptBatch:
        as_box = self.boxes(mask_box(mask)[None, None])
        penalty = mask_penalty(mask, self.grid)[None, None, None].expand(-1, -1, 2, -1)
        return replace(as_box, penalty=penalty)


def concatenate(batches: Sequence[PromptBatch], dim: int) -> PromptBatch:
    """Prompt batches side by side: dim 0 joins images, dim 1 joins prompts.  Token counts are padded to the largest."""
    num_tokens = max(batch.tokens.shape[2] for batch in batches)
    batches = [_pad_tokens(batch, num_tokens) for batch in batches]
    return PromptBatch(
        tokens=torch.cat([b.tokens for b in batches], dim),
        penalty=torch.cat([b.penalty for b in batches], dim),
        valid=torch.cat([b.valid for b in batches], dim),
        asks=torch.cat([b.asks for b in batches], dim),
        boxes=torch.cat([b.boxes for b in batches], dim),
    )


def _pad_tokens(batch: PromptBatch, num_tokens: int) -> PromptBatch:
    missing = num_tokens - batch.tokens.shape[2]
    if missing == 0:
        return batch
    pad = nn.functional.pad
    return PromptBatch(
        tokens=pad(batch.tokens, (0, 0, 0, missing)),
        penalty=pad(batch.penalty, (0, 0, 0, missing)),
        valid=pad(batch.valid, (0, missing)),
        asks=pad(batch.asks, (0, missing)),
        boxes=batch.boxes,
    )


def _all(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:3], dtype=torch.bool, device=tokens.device)


def _in_patches(xy: Float[Tensor, "*S 2"], grid: tuple[int, int]) -> Float[Tensor, "*S 2"]:
    """Lengths in sides of the square, in patches.  No tensor is made of the grid: copying one would wait for a GPU."""
    return torch.stack([xy[..., 0] * grid[1], xy[..., 1] * grid[0]], dim=-1)
