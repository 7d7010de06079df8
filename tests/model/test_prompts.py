"""Prompts: positions, spatial priors, padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from opencloc.model.prompts import (
    Box,
    Mask,
    Point,
    PromptEncoder,
    Text,
    box_penalty,
    check_boxes,
    mask_box,
    mask_penalty,
    patch_centres,
    point_penalty,
    sinusoidal,
)

GRID = (4, 6)  # rows, columns


def test_patch_centres_run_row_by_row() -> None:
    centres = patch_centres((2, 4))
    torch.testing.assert_close(centres[0], torch.tensor([1 / 8, 1 / 4]))
    torch.testing.assert_close(centres[1], torch.tensor([3 / 8, 1 / 4]))
    torch.testing.assert_close(centres[4], torch.tensor([1 / 8, 3 / 4]))


boxes_in_the_square = st.tuples(*[st.floats(0, 1, width=32)] * 4).map(
    lambda e: (min(e[0], e[2]), min(e[1], e[3]), max(e[0], e[2]), max(e[1], e[3]))
)


def area(box: tuple[float, float, float, float]) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


@given(boxes_in_the_square.filter(lambda box: area(box) > 1e-3))
def test_box_penalty_equals_a_slow_loop(box: tuple[float, float, float, float]) -> None:
    cells = [
        (x / GRID[1], y / GRID[0], (x + 1) / GRID[1], (y + 1) / GRID[0]) for y in range(GRID[0]) for x in range(GRID[1])
    ]
    shares = [
        area((max(c[0], box[0]), max(c[1], box[1]), min(c[2], box[2]), min(c[3], box[3]))) * len(cells) for c in cells
    ]
    assume(not any(1e-9 < share < 1e-4 for share in shares))  # float32 may see shares of no size or not
    covered = [n for n, share in enumerate(shares) if share > 1e-9]
    got = box_penalty(torch.tensor(box), GRID)
    for n, share in enumerate(shares):
        away = min(math.hypot(n % GRID[1] - m % GRID[1], n // GRID[1] - m // GRID[1]) for m in covered)
        expected = -math.log(max(share / max(shares), 0.01)) + (0 if n in covered else math.exp(1.5) * away)
        assert got[n].item() == pytest.approx(expected, abs=1e-2, rel=1e-3)


@given(boxes_in_the_square.filter(lambda box: area(box) > 1e-2))
def test_attention_by_the_prior_alone_is_the_area_weighted_mean_over_the_box(
    box: tuple[float, float, float, float],
) -> None:
    """What lies outside, or has under a hundredth of the largest share, gets under 2 % in all."""
    weight = (-box_penalty(torch.tensor(box), GRID)).softmax(0)
    inside = torch.tensor([[y / 64, x / 96] for y in range(64) for x in range(96)]) + torch.tensor([1 / 128, 1 / 192])
    hit = (inside[:, 1] > box[0]) & (inside[:, 1] < box[2]) & (inside[:, 0] > box[1]) & (inside[:, 0] < box[3])
    share = torch.nn.functional.adaptive_avg_pool2d(hit.float().reshape(1, 1, 64, 96), GRID).flatten()
    assert (weight - share / share.sum()).abs().sum() < 0.25


@pytest.mark.parametrize("box", [(2, 1, 5, 3), (0, 0, 12, 8), (4, 2, 5, 8)])
def test_a_mask_of_a_box_has_the_prior_of_the_box(box: tuple[int, int, int, int]) -> None:
    mask = torch.zeros(8, 12)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    edges = torch.tensor(box) / torch.tensor([12, 8, 12, 8])
    torch.testing.assert_close(mask_penalty(mask, GRID), box_penalty(edges, GRID), atol=1e-5, rtol=1e-5)


def test_point_penalty_is_half_the_squared_distance_in_patches() -> None:
    penalty = point_penalty(patch_centres(GRID)[7], GRID)
    assert penalty[7] == 0
    torch.testing.assert_close(penalty[8], torch.tensor(0.5))
    torch.testing.assert_close(penalty[7 + GRID[1]], torch.tensor(0.5))


def test_mask_that_fills_patches_is_free_there_and_costs_elsewhere() -> None:
    mask = torch.zeros(8, 12)
    mask[2:6, 4:8] = 1  # rows 1-2, columns 2-3 of the 4 x 6 grid
    penalty = mask_penalty(mask, GRID).reshape(GRID)
    assert (penalty[1:3, 2:4] == 0).all()
    torch.testing.assert_close(penalty[0, 2], torch.tensor(math.exp(1.5) + math.log(100)))
    torch.testing.assert_close(mask_box(mask), torch.tensor([4 / 12, 2 / 8, 8 / 12, 6 / 8]))


def test_a_patch_half_covered_counts_half() -> None:
    mask = torch.zeros(8, 12)
    mask[:, :3] = 1
    penalty = mask_penalty(mask, GRID).reshape(GRID)
    torch.testing.assert_close(penalty[0, 1] - penalty[0, 0], torch.tensor(math.log(2)))


def test_positions_tell_all_patches_apart() -> None:
    basis = sinusoidal(patch_centres((16, 16)), 64, 8.0)
    distance = torch.cdist(basis, basis) + 10 * torch.eye(256)
    assert distance.min() > 0.1


@pytest.mark.parametrize(
    "box",
    [[0.5, 0.1, 0.5, 0.2], [0.0, 0.0, 1.5, 1.0], [0.0, 0.0, float("nan"), 1.0], [10.0, 10.0, 20.0, 20.0]],
)
def test_bad_boxes_are_named(box: list[float]) -> None:
    with pytest.raises(ValueError, match=r"box \(0, 1\) is"):
        check_boxes(torch.tensor([[[0.1, 0.1, 0.2, 0.2], box]]))


def test_bad_points_masks_and_tuples_are_refused() -> None:
    encoder = PromptEncoder(16, 8, GRID)
    with pytest.raises(ValueError, match="outside"):
        encoder([[Point(3.0, 0.1)]])
    with pytest.raises(ValueError, match="mask is empty"):
        encoder([[Mask(torch.zeros(4, 4))]])
    with pytest.raises(ValueError, match="at least one part"):
        encoder([[()]])
    with pytest.raises(ValueError, match=r"bool or coverage in \[0, 1\]"):
        encoder([[Mask(torch.full((4, 4), 3.0))]])
    with pytest.raises(ValueError, match=r"has shape \(8,\), this one \(5,\)"):
        encoder([[Text(torch.ones(5))]])
    with pytest.raises(TypeError, match="Predictor takes strings"):
        encoder([[Text("a dog")]])


def test_listed_boxes_equal_the_tensor_path() -> None:
    encoder = PromptEncoder(16, 8, GRID)
    boxes = torch.tensor([[[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0]]])
    fast, slow = encoder.boxes(boxes), encoder([[Box(*row) for row in boxes[0].tolist()]])
    for name in ("tokens", "penalty", "valid", "boxes"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name))


def test_a_combined_prompt_has_the_tokens_and_priors_of_its_parts() -> None:
    encoder = PromptEncoder(16, 8, GRID)
    parts = (Box(0.1, 0.1, 0.5, 0.5), Point(0.8, 0.8), Text(torch.ones(8)))
    combined, alone = encoder([[parts]]), encoder([[part] for part in parts])
    assert combined.valid.sum() == 4
    torch.testing.assert_close(combined.tokens[0, 0, :2], alone.tokens[0, 0, :2])
    torch.testing.assert_close(combined.penalty[0, 0, 2], alone.penalty[1, 0, 0])
    half = torch.tensor([0.5 / 6, 0.5 / 4])
    torch.testing.assert_close(combined.boxes[0, 0, 2:], 0.8 + half)  # extent of box and point together


def test_no_prompts_at_all_give_an_empty_batch() -> None:
    batch = PromptEncoder(16, 8, GRID)([[], []])
    assert batch.tokens.shape[:2] == (2, 0)
