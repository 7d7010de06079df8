"""The losses of CLOC (paper sections 2, 3.3 and 3.4) as pure functions of embeddings and boxes.

    L = L_CLIP + lambda * (L_CLOC + L_G),   lambda = region_weight * (images that have region texts / B)

with L_CLIP the symmetric InfoNCE over images and captions, L_CLOC the same over the B*M regions and their texts, L_G
the box regression from text prompts.  sim is the cosine; embeddings come L2-normalised.

With a process group the ranks share one batch, equally many images each.  Every mean and count, and with them every
value, is then the whole batch's and the same on all ranks; the gradients are each rank's share: with respect to its own
embeddings those of the whole batch's loss, and summed over ranks those of the parameters.

How InfoNCE is computed is in `opencloc.contrastive`.

Symbols: B images of this rank, M regions per image, E width of the joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opencloc import collectives
from opencloc.boxes import giou
from opencloc.collectives import Group, sum_ranks, sum_shares
from opencloc.config import LossConfig
from opencloc.contrastive import info_nce
from opencloc.model.cloc import ClocOutput


@dataclass(frozen=True, kw_only=True)
class ClocLoss:
    """The parts of the loss, all scalars.  Parts that were not computed are None."""

    total: Float[Tensor, ""]
    image_text: Float[Tensor, ""] | None = None
    region_text: Float[Tensor, ""] | None = None
    grounding: Float[Tensor, ""] | None = None
    region_share: Float[Tensor, ""] | None = None  # images that have region texts / B
    filtered_share: Float[Tensor, ""] | None = None  # pairs left out by the conflict filter / off-diagonal pairs


def cloc_loss(
    output: ClocOutput,
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    text_hash: Int[Tensor, "B M"],
    config: LossConfig,
    group: Group = None,
) -> ClocLoss:
    """The whole loss of one batch.  `text_hash` identifies a region text (equal hash = same text)."""
    image_text = None
    if output.caption is not None:
        assert output.image is not None
        assert output.logit_scale is not None
        image_text = image_text_loss(output.image, output.caption, output.logit_scale, group)
    if output.region is None or config.region_weight == 0:
        assert image_text is not None
        return ClocLoss(total=image_text, image_text=image_text)
    assert output.region_text is not None
    assert output.region_logit_scale is not None
    region_text, filtered_share = region_text_loss(
        output.region, output.region_text, output.region_logit_scale, valid, text_hash, config, group
    )
    region_share = sum_ranks(valid.any(1).float().mean(), group) / collectives.size(group)
    region_part, grounding = region_text, None
    if output.ground_boxes is not None:
        grounding = grounding_loss(output.ground_boxes, boxes, valid, form=config.grounding, group=group)
        region_part = region_text + config.grounding_weight * grounding
    return ClocLoss(
        total=(0 if image_text is None else image_text) + config.region_weight * region_share * region_part,
        image_text=image_text,
        region_text=region_text,
        grounding=grounding,
        region_share=region_share,
        filtered_share=filtered_share,
    )


def image_text_loss(
    image: Float[Tensor, "B E"], caption: Float[Tensor, "B E"], logit_scale: Float[Tensor, ""], group: Group = None
) -> Float[Tensor, ""]:
    """L_CLIP: symmetric InfoNCE over the batch."""
    return info_nce(image, caption, logit_scale, group=group)[0]


def region_text_loss(
    region: Float[Tensor, "B M E"],
    text: Float[Tensor, "B M E"],
    logit_scale: Float[Tensor, ""],
    valid: Bool[Tensor, "B M"],
    text_hash: Int[Tensor, "B M"],
    config: LossConfig,
    group: Group = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """L_CLOC, 0 if no region is valid, and the share of pairs that the conflict filter left out."""
    return info_nce(
        region.flatten(0, 1),
        text.flatten(0, 1),
        logit_scale,
        valid=valid.flatten(),
        text_hash=None if config.conflict_filter == "none" else text_hash.flatten(),
        similar_above=config.conflict_threshold if config.conflict_filter == "similar" else None,
        gce_q=config.gce_q,
        group=group,
    )


def grounding_loss(
    predicted: Float[Tensor, "B M 4"],
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    *,
    form: Literal["l1_giou", "squared"],
    group: Group = None,
) -> Float[Tensor, ""]:
    """L_G: mean over valid regions; 0 if none is valid.

    `squared` is the published form, the mean squared error of the four coordinates (section 3.4).  `l1_giou` is DETR's
    pair, (5 * sum of absolute errors + 2 * (1 - GIoU)) / 7: at this scale of errors the squared form is a hundred
    times smaller than the contrastive losses and hardly moves the head.
    """
    boxes = torch.where(valid[..., None], boxes, 0)  # before anything is computed: padding may hold NaN
    if form == "squared":
        error = (predicted - boxes).square().mean(-1)
    else:
        first, second = predicted.chunk(2, dim=-1)
        ordered = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)
        error = (5 * (predicted - boxes).abs().sum(-1) + 2 * (1 - giou(ordered, boxes))) / 7
    return sum_shares(torch.where(valid, error, 0).sum() / sum_ranks(valid.sum(), group).clamp_min(1), group)
