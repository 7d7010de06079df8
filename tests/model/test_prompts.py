"""Prompts: positions, spatial priors, padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
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


@given(st.tuples(*[st.floats(0, 1, width=32)] * 4))
def test_box_penalty_equals_a_slow_loop(edges: tuple[float, float, float, float]) -> None:
    x0, x1 = sorted(edges[:2])
    y0, y1 = sorted(edges[2:])
    got = box_penalty(torch.tensor([x0, y0, x1, y1]), GRID)
    for n, (x, y) in enumerate(patch_centres(GRID).tolist()):
        dx = max(x0 - x, x - x1, 0) * GRID[1]
        dy = max(y0 - y, y - y1, 0) * GRID[0]
        assert got[n].item() == pytest.approx(math.hypot(dx, dy), abs=1e-5)


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
    assert penalty[0, 2] == 1
    torch.testing.assert_close(mask_box(mask), torch.tensor([4 / 12, 2 / 8, 8 / 12, 6 / 8]))


def test_patches_half_covered_lie_half_a_patch_away() -> None:
    mask = torch.zeros(8, 12)
    mask[:, :1] = 1
    assert mask_penalty(mask, GRID).reshape(GRID)[0, 0] == 0.5


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
