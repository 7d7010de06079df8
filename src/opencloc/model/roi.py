"""RoIAlign (He et al. 2017) on `grid_sample`: the published baseline for regions.  Owns nothing else."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SAMPLES_PER_BIN = 2  # sampling points per bin and axis


def roi_align(
    feature_map: Float[Tensor, "B C H W"], boxes: Float[Tensor, "B P 4"], output_size: int
) -> Float[Tensor, "B P C S S"]:
    """Bilinear features of every box on an S x S grid of bins, each the mean of 2 x 2 samples.

    Boxes are normalised to the map; pixel centres lie at half-integers (`aligned=True` in torchvision); samples
    outside the centres of the outermost pixels repeat the border.
    """
    batch, count = boxes.shape[:2]
    channels = feature_map.shape[1]
    points = output_size * SAMPLES_PER_BIN
    t = (torch.arange(points, device=boxes.device, dtype=boxes.dtype) + 0.5) / points
    x = boxes[..., 0:1] + t * (boxes[..., 2:3] - boxes[..., 0:1])  # (B, P, points)
    y = boxes[..., 1:2] + t * (boxes[..., 3:4] - boxes[..., 1:2])
    grid = torch.stack(torch.broadcast_tensors(x[..., None, :], y[..., :, None]), dim=-1) * 2 - 1
    grid = grid.reshape(batch, count * points, points, 2).to(feature_map.dtype)
    sampled = F.grid_sample(feature_map, grid, mode="bilinear", padding_mode="border", align_corners=False)
    sampled = sampled.reshape(batch, channels, count, points, points).transpose(1, 2)
    return F.avg_pool2d(sampled.flatten(0, 1), SAMPLES_PER_BIN).unflatten(0, (batch, count))
