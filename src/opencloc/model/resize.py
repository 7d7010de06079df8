"""A checkpoint at another image size: the position table of the vision tower is interpolated, all else stays.

Symbols: R, C rows and columns of patches, D width of the vision tower.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from opencloc.model import towers
from opencloc.model.cloc import ClocModel
from opencloc.model.processor import ClocProcessor


def at_image_size(model: ClocModel, processor: ClocProcessor, image_size: int) -> tuple[ClocModel, ClocProcessor]:
    """The model and its processor for squares of `image_size` pixels; both as they are if that is their size already.

    Positions are interpolated as transformers does it for images of another size: bicubic for CLIP and SigLIP, CLIP's
    class token keeping its own; bilinear with antialiasing for SigLIP 2.  Sizes a little apart need little training to
    get used to, sizes far apart more.  Raises ValueError for a size that is no multiple of the patch, and for a table
    that is no square.
    """
    config = model.config.clip_config
    patch = config.vision_config.patch_size  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    if image_size < patch or image_size % patch:
        raise ValueError(f"the image size must be a multiple of its patches, {patch} pixels; got {image_size}")
    if image_size == towers.image_size(config):
        return model, processor
    side = image_size // patch
    name, value = _resized_table(model, side)
    resized_config = copy.deepcopy(model.config)
    towers.set_image_size(resized_config.clip_config, image_size)
    if model.config.regions_trained:  # what was learned of the basis holds at the same frequencies only
        resized_config.basis_cycles = model.prompt_encoder.max_cycles
    resized = ClocModel(resized_config)
    resized.to(device=model.device, dtype=model.dtype)  # pyright: ignore[reportCallIssue]
    resized.load_state_dict(model.state_dict() | {name: value})
    resized.set_attn_implementation(model.config._attn_implementation or "sdpa")
    resized_processor = copy.copy(processor)
    resized_processor.image_size = image_size
    return resized.train(model.training), resized_processor


@torch.no_grad()
def _resized_table(model: ClocModel, side: int) -> tuple[str, Float[Tensor, "L D"]]:
    """(name among the model's weights, value) of the position table for `side` x `side` patches."""
    table, before = towers.position_table(model.clip)
    name = next(name for name, value in model.named_parameters() if value is table.weight)
    rows, columns = model.grid
    if len(table.weight) != before + rows * columns:
        raise ValueError(f"the position table has {len(table.weight) - before} rows, which is no square of patches")
    grid = table.weight[before:].float().unflatten(0, (rows, columns))
    resized = interpolated(grid, side, antialiased=model.clip.config.model_type == "siglip2").flatten(0, 1)
    return name, torch.cat([table.weight[:before], resized.to(table.weight.dtype)])


def interpolated(grid: Float[Tensor, "R C D"], side: int, *, antialiased: bool) -> Float[Tensor, "S S D"]:
    """A grid of positions for `side` x `side` patches: bilinear if `antialiased` (SigLIP 2), else bicubic."""
    how: dict[str, Any] = {"mode": "bilinear", "antialias": True} if antialiased else {"mode": "bicubic"}
    values = F.interpolate(grid.permute(2, 0, 1)[None], size=(side, side), align_corners=False, **how)
    return values[0].permute(1, 2, 0)
