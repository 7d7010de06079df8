"""Region samplers against slow references, and what every one of them must do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencloc.mllm.sampler import (
    BOX,
    MASK,
    NONE,
    POINT,
    Regions,
    extents,
    farthest_points,
    make_sampler,
    points_within,
)
from opencloc.model.cloc import ClocConfig, ClocModel
from opencloc.model.prompts import Box, Mask, Point
from tests.conftest import SIZES

GRID = (4, 4)
PROMPTER = {
    "kind": "cross",
    "embed_dim": 24,
    "options": {"prompter_heads": 4, "prior_slope": 1.5, "shared_positions": True},
}


def tokens(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 16, 32, generator=torch.Generator().manual_seed(seed))


def regions(masked: bool = True) -> Regions:
    """A box, a point and a mask in the first row; a box and padding in the second."""
    whole = [0.0, 0.0, 1.0, 1.0]
    boxes = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.3, 0.4, 0.3, 0.4], [0.5, 0.0, 1.0, 0.5]], [whole] * 3])
    masks = torch.zeros(2, 3, 8, 8)
    masks[0, 2, :4, 4:] = 1
    kinds = torch.tensor([[BOX, POINT, MASK], [BOX, NONE, NONE]])
    return Regions(boxes=boxes, kinds=kinds, masks=masks if masked else None)


@pytest.mark.parametrize("kind", ["prompter", "roi", "points"])
def test_every_region_gets_a_vector_that_depends_on_it_alone(kind: str) -> None:
    torch.manual_seed(0)
    sampler = make_sampler(kind, 32, 48, GRID, PROMPTER).eval()
    last, chosen, both = tokens(), tokens(seed=1), regions()
    vectors = sampler(last, chosen, both).detach()
    assert vectors.shape == (2, 3, 48)
    assert torch.isfinite(vectors).all()
    assert both.masks is not None
    for row, place in ((0, 0), (0, 1), (0, 2), (1, 0)):
        one = Regions(
            boxes=both.boxes[row : row + 1, place : place + 1],
            kinds=both.kinds[row : row + 1, place : place + 1],
            masks=both.masks[row : row + 1, place : place + 1],
        )
        alone = sampler(last[row : row + 1], chosen[row : row + 1], one)
        torch.testing.assert_close(alone[0, 0], vectors[row, place], atol=1e-5, rtol=1e-5)
    first = vectors[0]
    assert min(float((first[i] - first[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4


@pytest.mark.parametrize("kind", ["prompter", "roi", "points"])
def test_every_trained_part_gets_a_gradient(kind: str) -> None:
    sampler = make_sampler(kind, 32, 48, GRID, PROMPTER)
    sampler(tokens(), tokens(seed=1), regions()).square().sum().backward()
    without = {name for name, p in sampler.named_parameters() if p.grad is None}
    assert without == set()


def test_prompter_sampler_reads_what_the_cloc_model_says(tower_config: Callable[[str], Any]) -> None:
    """The vector before the projection, normalised, is the CLOC model's region embedding, for every kind of prompt."""
    torch.manual_seed(0)
    model = ClocModel(ClocConfig(clip_config=tower_config("clip"))).eval()
    form = {"kind": "cross", "embed_dim": 24, "options": {n: getattr(model.config, n) for n in model.prompter.options}}
    sampler = make_sampler("prompter", SIZES["hidden_size"], 48, GRID, form).eval()
    sampler.prompter.load_state_dict(model.prompter.state_dict())  # pyright: ignore
    sampler.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict(), strict=False)  # pyright: ignore
    seen: list[torch.Tensor] = []
    sampler.projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # pyright: ignore
    features = model.encode_image(torch.randn(2, 3, 32, 32))
    both = regions()
    sampler(features.tokens, features.tokens, both)
    assert both.masks is not None
    prompts = [[Box(0.1, 0.2, 0.6, 0.9), Point(0.3, 0.4), Mask(both.masks[0, 2])], [Box(0.0, 0.0, 1.0, 1.0)]]
    expected = model.encode_regions(features, prompts)
    got = torch.nn.functional.normalize(seen[0], dim=-1)
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1, 0], expected[1][0], atol=1e-5, rtol=1e-4)


@given(seed=st.integers(0, 100), count=st.integers(1, 12))
def test_farthest_points_are_those_of_the_plain_search(seed: int, count: int) -> None:
    xy = torch.rand(1, 12, 2, generator=torch.Generator().manual_seed(seed))
    chosen = [0]
    for _ in range(count - 1):
        distances = [min(math.dist(p, xy[0, c].tolist()) for c in chosen) for p in xy[0].tolist()]
        chosen.append(max(range(12), key=lambda i: distances[i]))
    assert farthest_points(xy, count)[0].tolist() == chosen


@given(seed=st.integers(0, 50))
def test_points_lie_in_their_region_and_evenly(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(2, generator=generator) * 0.7
    high = low + 0.05 + torch.rand(2, generator=generator) * (0.95 - low)
    box = torch.cat([low, high])[None, None]
    points = points_within(Regions(boxes=box, kinds=torch.tensor([[BOX]])), GRID, 64)[0, 0]
    assert ((points >= low) & (points <= high)).all()
    inside = (points - low) / (high - low)
    quarters = [
        ((inside[:, 0] < 0.5) == left) & ((inside[:, 1] < 0.5) == top)
        for left in (True, False)
        for top in (True, False)
    ]
    assert all(13 <= int(q.sum()) <= 19 for q in quarters)  # 16 each, but for a few on the border
    mask = torch.rand(1, 1, 8, 8, generator=generator) < 0.2
    mask[0, 0, seed % 8, 3] = True
    masked = Regions(boxes=box, kinds=torch.tensor([[MASK]]), masks=mask.float())
    at = (points_within(masked, GRID, 64)[0, 0] * 8).long()
    assert mask[0, 0][at[:, 1], at[:, 0]].all()
    if int(mask.sum()) <= 64:
        assert len({tuple(p) for p in at.tolist()}) == int(mask.sum())  # every covered pixel is seen


def test_points_get_the_extent_of_a_patch() -> None:
    kinds = torch.tensor([[POINT, BOX]])
    boxes = torch.tensor([[[0.5, 0.05, 0.5, 0.05], [0.1, 0.2, 0.3, 0.4]]])
    assert torch.allclose(
        extents(Regions(boxes=boxes, kinds=kinds), GRID),
        torch.tensor([[[0.375, 0, 0.625, 0.175], [0.1, 0.2, 0.3, 0.4]]]),
    )
