"""Losses against slow loops written from the formulas, and their properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from opencloc.boxes import giou
from opencloc.config import LossConfig
from opencloc.loss import cloc_loss, grounding_loss, image_text_loss, region_text_loss
from opencloc.model.cloc import ClocOutput

SCALE = torch.tensor(10.0, dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def region_loss(
    region: torch.Tensor, text: torch.Tensor, text_hash: torch.Tensor, valid: torch.Tensor, **changes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """L_CLOC of one region per image."""
    return region_text_loss(
        region[:, None], text[:, None], SCALE, valid[:, None], text_hash[:, None], LossConfig(**changes)
    )


def slow_region_text(
    region: torch.Tensor, text: torch.Tensor, hashes: list[int], valid: list[bool], threshold: float
) -> float:
    """L_CLOC with the published conflict filter, one pair at a time (section 3.3)."""
    rows = [i for i, v in enumerate(valid) if v]

    def negative(a: int, b: int) -> bool:
        return hashes[a] != hashes[b] and float(text[a] @ text[b]) <= threshold

    total = 0.0
    for a in rows:
        others = [b for b in rows if b != a and negative(a, b)]
        for ours, theirs in ((region, text), (text, region)):
            positive = math.exp(10 * float(ours[a] @ theirs[a]))
            denominator = positive + sum(math.exp(10 * float(ours[a] @ theirs[b])) for b in others)
            total -= math.log(positive / denominator)
    return total / (2 * len(rows))


@pytest.mark.parametrize("seed", range(5))
def test_region_text_loss_equals_a_slow_loop_with_the_published_filter(seed: int) -> None:
    region, text = unit(12, 6, seed=seed), unit(12, 6, seed=seed + 100)
    text[3] = F.normalize(text[2] + 0.1 * text[4], dim=-1)  # similar, not identical
    text[7] = text[5]
    hashes = list(range(12))
    hashes[7] = hashes[5]
    valid = [i % 4 != 1 or i == 5 for i in range(12)]
    got, _ = region_loss(region, text, torch.tensor(hashes), torch.tensor(valid), conflict_threshold=0.99)
    # mean + 3 sd of these random texts is above 0.99 only if nothing is filtered: check which rule is in force
    rows = torch.tensor(valid)
    pairs = rows[:, None] & rows[None] & (torch.tensor(hashes)[:, None] != torch.tensor(hashes)[None])
    sims = (text @ text.T)[pairs]
    threshold = max(0.99, float(sims.mean() + 3 * sims.std(correction=0)))
    assert got.item() == pytest.approx(slow_region_text(region, text, hashes, valid, threshold), abs=1e-9)


@pytest.mark.parametrize(("conflict_filter", "left_out"), [("none", 0), ("identical", 2), ("similar", 4)])
def test_filter_leaves_out_identical_and_similar_texts_only_when_asked(conflict_filter: Any, left_out: int) -> None:
    text = unit(60, 16)
    text[1] = text[0]
    text[3] = F.normalize(text[2] + 0.05 * text[4], dim=-1)
    hashes = torch.arange(60)
    hashes[1] = hashes[0]
    _, share = region_loss(unit(60, 16, seed=1), text, hashes, torch.ones(60).bool(), conflict_filter=conflict_filter)
    assert share.item() == pytest.approx(left_out / (60 * 59))


def test_invalid_regions_change_neither_loss_nor_gradients() -> None:
    region, text = unit(6, 8).requires_grad_(), unit(6, 8, seed=1).requires_grad_()
    valid = torch.tensor([True, True, False, True, False, True])
    keep = valid.nonzero().flatten()
    whole, whole_share = region_loss(region, text, torch.arange(6), valid)
    whole_grad = torch.autograd.grad(whole, (region, text))
    part, part_share = region_loss(region[keep], text[keep], keep, torch.ones(4).bool())
    part_grad = torch.autograd.grad(part, (region, text))
    torch.testing.assert_close((whole, whole_share), (part, part_share))
    for a, b in zip(whole_grad, part_grad, strict=True):
        torch.testing.assert_close(a, b)
        assert (a[~valid] == 0).all()


def test_no_valid_region_at_all_gives_zero_and_finite_gradients() -> None:
    region = unit(4, 8).requires_grad_()
    valid = torch.zeros(4, dtype=torch.bool)
    loss, _ = region_loss(region, unit(4, 8), torch.arange(4), valid)
    loss.backward()
    assert loss == 0
    assert torch.isfinite(region.grad).all()  # pyright: ignore[reportArgumentType]
    predicted = torch.rand(2, 2, 4, requires_grad=True)
    ground = grounding_loss(predicted, torch.rand(2, 2, 4), valid.reshape(2, 2), form="l1_giou")
    ground.backward()
    assert ground == 0
    assert torch.isfinite(predicted.grad).all()  # pyright: ignore[reportArgumentType]


def test_image_text_loss_equals_a_slow_loop() -> None:
    image, caption = unit(5, 8), unit(5, 8, seed=1)
    total = 0.0
    for a in range(5):
        for ours, theirs in ((image, caption), (caption, image)):
            scores = [math.exp(10 * float(ours[a] @ theirs[b])) for b in range(5)]
            total -= math.log(scores[a] / sum(scores))
    assert image_text_loss(image, caption, SCALE).item() == pytest.approx(total / 10)


def test_grounding_loss_equals_its_formulas() -> None:
    predicted = torch.tensor([[[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0]]])
    boxes = torch.tensor([[[0.2, 0.2, 0.5, 0.8], [0.5, 0.5, 1.0, 1.0]]])
    valid = torch.tensor([[True, False]])
    squared = (0.1**2 + 0.2**2) / 4
    assert grounding_loss(predicted, boxes, valid, form="squared").item() == pytest.approx(squared)
    expected = (5 * 0.3 + 2 * (1 - giou(predicted[0, 0], boxes[0, 0]).item())) / 7
    assert grounding_loss(predicted, boxes, valid, form="l1_giou").item() == pytest.approx(expected)


def output(num_images: int, num_regions: int) -> ClocOutput:
    def of(*shape: int, seed: int) -> torch.Tensor:
        return unit(*shape, seed=seed).float().requires_grad_()

    return ClocOutput(
        image=of(num_images, 8, seed=0),
        caption=of(num_images, 8, seed=1),
        logit_scale=torch.tensor(10.0),
        region=of(num_images, num_regions, 8, seed=2),
        region_text=of(num_images, num_regions, 8, seed=3),
        ground_boxes=torch.rand(num_images, num_regions, 4, requires_grad=True),
        region_logit_scale=torch.tensor(10.0),
    )


def test_lambda_is_the_share_of_images_with_region_texts() -> None:
    out = output(4, 3)
    valid = torch.tensor([[True, True, False], [False] * 3, [True] * 3, [False] * 3])
    boxes = torch.tensor([0.1, 0.1, 0.6, 0.6]).expand(4, 3, 4)
    loss = cloc_loss(out, boxes, valid, torch.arange(12).reshape(4, 3), LossConfig(region_weight=2.0))
    assert loss.region_share == 0.5
    assert loss.region_text is not None
    assert loss.grounding is not None
    assert loss.image_text is not None
    torch.testing.assert_close(loss.total, loss.image_text + 2 * 0.5 * (loss.region_text + loss.grounding))


def test_region_weight_zero_is_clip() -> None:
    out = output(4, 2)
    boxes, valid = torch.rand(4, 2, 4), torch.ones(4, 2, dtype=torch.bool)
    loss = cloc_loss(out, boxes, valid, torch.arange(8).reshape(4, 2), LossConfig(region_weight=0))
    assert loss.region_text is None
    assert out.image is not None
    assert out.caption is not None
    assert out.logit_scale is not None
    torch.testing.assert_close(loss.total, image_text_loss(out.image, out.caption, out.logit_scale))
