"""Region samplers: image tokens and prompts -> one vector per region, as wide as the language model.

* `prompter`: CLOC's Prompter, its output before normalisation, through a norm and a two-layer MLP (CLOC, section 4.4);
* `roi`: the mean of RoIAlign over the box, through the same norm and MLP;
* `points`: Ferret's spatial-aware sampler (You et al. 2023, arXiv 2310.07704, section 3.2).

Symbols: B rows (a conversation and its image), P regions per row, N patches, D width of the vision tower, W width of
the language model, n points of a region, k neighbours of a point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opencloc.model.prompter import PROMPTERS, Mlp, roi_align
from opencloc.model.prompts import Box, Mask, Point, PromptEncoder

BOX, POINT, MASK, NONE = 0, 1, 2, -1  # kinds of a region; NONE is padding

MOST_POINTS = 512  # of a region, as published for 576 patches; two to a patch of fewer
STAGES = 2
FEWER = 4  # points of a stage for each one that it keeps
NEIGHBOURS = 24
ROI_SIZE = 4  # bins per side


@dataclass(frozen=True, kw_only=True)
class Regions:
    """The regions of a batch, in the frame of the square; rows with fewer are padded with kind `NONE` at the end."""

    boxes: Float[Tensor, "B P 4"]  # of a point (x, y, x, y), of a mask its bounding box
    kinds: Int[Tensor, "B P"]
    masks: Float[Tensor, "B P H W"] | None = None  # coverage; None where no region is a mask


def make_sampler(kind: str, vision_width: int, width: int, grid: tuple[int, int], prompter: Any) -> nn.Module:
    """The sampler of a name; `prompter` describes CLOC's (`prompter_settings`), for `prompter` alone."""
    if kind == "prompter":
        return PrompterSampler(vision_width, width, grid, prompter)
    if kind == "roi":
        return RoiSampler(vision_width, width, grid)
    return PointSampler(vision_width, width, grid)


class Projection(nn.Sequential):
    """A region's vector as a token of the language model."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__(nn.LayerNorm(size), Mlp(size, width, width))


class PrompterSampler(nn.Module):
    """The Prompter of a CLOC checkpoint, which reads the tokens of the last layer, as it was trained to."""

    def __init__(self, vision_width: int, width: int, grid: tuple[int, int], prompter: Any) -> None:
        super().__init__()
        kind, embed_dim = PROMPTERS[prompter["kind"]], prompter["embed_dim"]
        self.prompt_encoder = PromptEncoder(vision_width, embed_dim, grid, text_tokens=False)
        self.prompter = kind(vision_width, embed_dim, grid, **prompter["options"])
        self.projection = Projection(embed_dim, width)

    def forward(
        self, last: Float[Tensor, "B N D"], _chosen: Float[Tensor, "B N D"], regions: Regions
    ) -> Float[Tensor, "B P W"]:
        if (regions.kinds > BOX).any():
            prompts = self.prompt_encoder([_prompts(regions, row) for row in range(len(regions.boxes))])
        else:
            prompts = self.prompt_encoder.boxes(regions.boxes)
        return self.projection(self.prompter(last, prompts))


class RoiSampler(nn.Module):
    """The mean of the box's tokens by RoIAlign, of the layer that the language model reads."""

    def __init__(self, vision_width: int, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.projection = Projection(vision_width, width)

    def forward(
        self, _last: Float[Tensor, "B N D"], chosen: Float[Tensor, "B N D"], regions: Regions
    ) -> Float[Tensor, "B P W"]:
        feature_map = chosen.transpose(1, 2).unflatten(-1, self.grid)
        return self.projection(roi_align(feature_map, extents(regions, self.grid), ROI_SIZE).mean((-1, -2)))


class PointSampler(nn.Module):
    """Ferret's: points drawn in the mask, then twice farthest-point sampling and pooling over the nearest neighbours.

    A neighbour's feature and place relative to the point go through a linear layer; beside the point's own they go
    through a second one; the maximum over the neighbours is the point's new feature.  What is left is laid side by side
    and projected.  Differs from the paper in that points lie evenly in the region, not at random, so that a question
    has one answer; and few patches get fewer points.
    """

    def __init__(self, vision_width: int, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.num_points = grid, max(FEWER**STAGES, min(MOST_POINTS, 2 * grid[0] * grid[1]))
        size = vision_width + 2
        self.difference = nn.ModuleList(nn.Linear(size, size) for _ in range(STAGES))
        self.gather = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * size, vision_width), nn.ReLU(), nn.LayerNorm(vision_width))
            for _ in range(STAGES)
        )
        self.projection = nn.Linear(self.num_points // FEWER**STAGES * vision_width, width)

    def forward(
        self, _last: Float[Tensor, "B N D"], chosen: Float[Tensor, "B N D"], regions: Regions
    ) -> Float[Tensor, "B P W"]:
        rows, count = regions.kinds.shape
        points = points_within(regions, self.grid, self.num_points)  # (B, P, n, 2)
        feature_map = chosen.transpose(1, 2).unflatten(-1, self.grid)
        sampled = F.grid_sample(feature_map, (2 * points - 1).to(chosen.dtype), "bilinear", "border", False)
        features = sampled.permute(0, 2, 3, 1).flatten(0, 1)  # (B * P, n, D)
        xy = points.flatten(0, 1).to(chosen.dtype)
        for difference, gather in zip(self.difference, self.gather, strict=True):
            kept = farthest_points(xy, xy.shape[1] // FEWER)
            near = torch.cdist(take(xy, kept).float(), xy.float()).topk(min(NEIGHBOURS, xy.shape[1]), largest=False)[1]
            both = torch.cat([features, xy], -1)
            own = take(both, kept)[:, :, None]  # (R, n / 4, 1, D + 2)
            around = take(both, near.flatten(1)).unflatten(1, near.shape[1:])
            seen = torch.cat([difference(around - own), own.expand_as(around)], -1)
            features, xy = gather(seen).amax(2), take(xy, kept)
        return self.projection(features.flatten(1)).unflatten(0, (rows, count))


# -- geometry ----------------------------------------------------------------------------------------------------------


def extents(regions: Regions, grid: tuple[int, int]) -> Float[Tensor, "B P 4"]:
    """The boxes, those of points as large as a patch."""
    half = 0.5 / max(grid)
    wide = regions.boxes + regions.boxes.new_tensor([-half, -half, half, half])
    return torch.where((regions.kinds == POINT)[..., None], wide.clamp(0, 1), regions.boxes)


def points_within(regions: Regions, grid: tuple[int, int], count: int) -> Float[Tensor, "B P n 2"]:
    """Points that lie evenly in every region: in its box, or in the covered pixels of its mask."""
    boxes = extents(regions, grid).float()
    steps = torch.arange(1, count + 1, device=boxes.device, dtype=torch.float64)
    # multiples of the inverse powers of the plastic number: the two-dimensional golden section (Roberts 2018)
    spread = torch.stack([(steps * 0.7548776662466927) % 1, (steps * 0.5698402909980532) % 1], -1).float()
    points = boxes[..., None, :2] + spread * (boxes[..., 2:] - boxes[..., :2])[..., None, :]
    if regions.masks is None:
        return points
    height, width = regions.masks.shape[-2:]
    covered = (regions.masks > 0.5).flatten(2).float().cumsum(-1)  # (B, P, H * W)
    wanted = (steps.float() - 0.5) / count * covered[..., -1:]
    pixel = torch.searchsorted(covered, wanted).clamp(max=height * width - 1)
    at = torch.stack([(pixel % width + 0.5) / width, (pixel // width + 0.5) / height], -1)
    return torch.where((regions.kinds == MASK)[..., None, None], at, points)


@torch.no_grad()
def farthest_points(xy: Float[Tensor, "R n 2"], count: int) -> Int[Tensor, "R m"]:
    """Numbers of `count` points, beginning with the first, each the farthest from those before it."""
    xy = xy.float()
    chosen = torch.zeros(len(xy), count, dtype=torch.long, device=xy.device)
    nearest = torch.full(xy.shape[:2], torch.inf, device=xy.device)
    for i in range(1, count):
        last = xy.gather(1, chosen[:, i - 1, None, None].expand(-1, 1, 2))
        nearest = torch.minimum(nearest, (xy - last).square().sum(-1))
        chosen[:, i] = nearest.argmax(-1)
    return chosen


def take(x: Float[Tensor, "R n X"], index: Int[Tensor, "R m"]) -> Float[Tensor, "R m X"]:
    """Rows of x by number."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _prompts(regions: Regions, row: int) -> list[Box | Point | Mask]:
    """The prompts of a row, padding as the whole square."""
    prompts: list[Box | Point | Mask] = []
    for i, (kind, box) in enumerate(zip(regions.kinds[row].tolist(), regions.boxes[row].tolist(), strict=True)):
        if kind == POINT:
            prompts.append(Point(box[0], box[1]))
        elif kind == MASK and regions.masks is not None:
            prompts.append(Mask(regions.masks[row, i]))
        else:
            prompts.append(Box(*box) if kind == BOX else Box(0.0, 0.0, 1.0, 1.0))
    return prompts
