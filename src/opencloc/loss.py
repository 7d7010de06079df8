"""The losses of CLOC (paper sections 2, 3.3 and 3.4) as pure functions of embeddings and boxes.

    L = L_CLIP + lambda * (L_CLOC + L_G),   lambda = region_weight * (images that have region texts / B)

with L_CLIP the symmetric InfoNCE over images and captions, L_CLOC the same over the B*M regions and their texts, L_G
the box regression from text prompts.  sim is the cosine; embeddings come L2-normalised.

Symbols: B images, M regions per image, R = B * M, E width of the joint embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from opencloc.boxes import giou
from opencloc.config import LossConfig
from opencloc.model.cloc import ClocOutput


@dataclass(frozen=True, kw_only=True)
class ClocLoss:
    """The parts of the loss, all scalars.  Parts that were not computed are None."""

    total: Float[Tensor, ""]
    image_text: Float[Tensor, ""]
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
) -> ClocLoss:
    """The whole loss of one batch.  `text_hash` identifies a region text (equal hash = same text)."""
    image_text = image_text_loss(output.image, output.caption, output.logit_scale)
    if output.region is None or config.region_weight == 0:
        return ClocLoss(total=image_text, image_text=image_text)
    assert output.region_text is not None
    assert output.region_logit_scale is not None
    text, flat_valid = output.region_text.flatten(0, 1), valid.flatten()
    negatives = negative_pairs(
        text, text_hash.flatten(), flat_valid, mode=config.conflict_filter, threshold=config.conflict_threshold
    )
    region_text = region_text_loss(output.region.flatten(0, 1), text, output.region_logit_scale, negatives, flat_valid)
    region_share = valid.any(1).float().mean()
    region_part, grounding = region_text, None
    if output.ground_boxes is not None:
        grounding = grounding_loss(output.ground_boxes, boxes, valid, form=config.grounding)
        region_part = region_text + config.grounding_weight * grounding
    return ClocLoss(
        total=image_text + config.region_weight * region_share * region_part,
        image_text=image_text,
        region_text=region_text,
        grounding=grounding,
        region_share=region_share,
        filtered_share=_filtered_share(negatives, flat_valid),
    )


def image_text_loss(
    image: Float[Tensor, "B E"], caption: Float[Tensor, "B E"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """L_CLIP: symmetric InfoNCE over the batch."""
    logits = logit_scale * image @ caption.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def negative_pairs(
    text: Float[Tensor, "R E"],
    text_hash: Int[Tensor, " R"],
    valid: Bool[Tensor, " R"],
    *,
    mode: Literal["similar", "identical", "none"],
    threshold: float = 0.9,
) -> Bool[Tensor, "R R"]:
    """Which pairs (region a, text b), a != b, are negatives (section 3.3, conflict filter); symmetric.

    Identical texts never are (but in mode `none`).  Mode `similar` also leaves out pairs of texts whose cosine is
    above the published threshold AND more than three standard deviations above the batch's mean cosine.  The second
    condition is ours: an untrained text tower finds everything similar and the published rule alone would erase
    all negatives.  By Cantelli's inequality at most a tenth of the pairs can ever be erased by it, and once texts have
    spread out (mean + 3 sd < threshold) the rule is the published one.
    """
    pairs = valid[:, None] & valid[None]
    pairs.fill_diagonal_(False)
    if mode == "none":
        return pairs
    distinct = pairs & (text_hash[:, None] != text_hash[None])
    if mode == "identical":
        return distinct
    sim = text.float() @ text.float().T
    count = distinct.sum().clamp_min(1)
    mean = torch.where(distinct, sim, 0).sum() / count
    deviation = (torch.where(distinct, sim - mean, 0).square().sum() / count).sqrt()
    return distinct & (sim <= torch.clamp_min(mean + 3 * deviation, threshold))


def region_text_loss(
    region: Float[Tensor, "R E"],
    text: Float[Tensor, "R E"],
    logit_scale: Float[Tensor, ""],
    negatives: Bool[Tensor, "R R"],
    valid: Bool[Tensor, " R"],
) -> Float[Tensor, ""]:
    """L_CLOC: symmetric InfoNCE over valid regions, each against its own text and its negatives; 0 if none is valid."""
    logits = logit_scale * region @ text.T
    kept = negatives | torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(~kept, float("-inf"))
    positive = logits.diagonal()
    both = (logits.logsumexp(1) - positive) + (logits.logsumexp(0) - positive)
    return torch.where(valid, both, 0).sum() / (2 * valid.sum().clamp_min(1))


def grounding_loss(
    predicted: Float[Tensor, "B M 4"],
    boxes: Float[Tensor, "B M 4"],
    valid: Bool[Tensor, "B M"],
    *,
    form: Literal["l1_giou", "squared"],
) -> Float[Tensor, ""]:
    """L_G: mean over valid regions; 0 if none is valid.

    `squared` is the published form, the mean squared error of the four coordinates (section 3.4).  `l1_giou` is DETR's
    pair, (5 * sum of absolute errors + 2 * (1 - GIoU)) / 7: at this scale of errors the squared form is a hundred
    times smaller than the contrastive losses and hardly moves the head.
    """
    if form == "squared":
        error = (predicted - boxes).square().mean(-1)
    else:
        first, second = predicted.chunk(2, dim=-1)
        ordered = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)
        error = (5 * (predicted - boxes).abs().sum(-1) + 2 * (1 - giou(ordered, boxes))) / 7
    return torch.where(valid, error, 0).sum() / valid.sum().clamp_min(1)


@torch.no_grad()
def _filtered_share(negatives: Tensor, valid: Tensor) -> Tensor:
    count = valid.sum().float()
    return 1 - negatives.sum() / (count * (count - 1)).clamp_min(1)
