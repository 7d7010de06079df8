"""Scores and their intervals: against loops, against a closed form, and cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencloc.eval import scores
from opencloc.eval.scores import Scorer, draw_images, interval, sizes_of

seeds = st.integers(0, 2**31 - 1)


def slow_score(hits: np.ndarray, cells: np.ndarray, times: np.ndarray) -> float:
    """Mean over cells of the share of hits, each row counted `times`; NaN if no row is left."""
    shares = []
    for cell in sorted(set(cells.tolist())):
        inside = cells == cell
        if times[inside].sum():
            shares.append((hits[inside] * times[inside]).sum() / times[inside].sum())
    return float(np.mean(shares)) if shares else float("nan")


@given(seed=seeds, rows=st.integers(1, 40), num_images=st.integers(2, 8), num_cells=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_an_interval_equals_a_loop_over_draws(seed: int, rows: int, num_images: int, num_cells: int) -> None:
    random = np.random.default_rng(seed)
    hits, cells = random.random(rows), random.integers(num_cells, size=rows)
    images = random.integers(num_images, size=rows)
    draws = draw_images(num_images, 30, seed)
    value, low, high = interval(hits, images, cells, draws)
    assert value == pytest.approx(slow_score(hits, cells, np.ones(rows)))
    drawn = [slow_score(hits, cells, row[images].astype(float)) for row in draws]
    if len(set(images.tolist())) < 2:
        assert math.isnan(low)
        assert math.isnan(high)
    else:
        expected = np.quantile([score for score in drawn if not math.isnan(score)], (0.025, 0.975))
        assert (low, high) == pytest.approx(tuple(expected))


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_intervals_do_not_depend_on_how_much_is_held_at_a_time(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.random(50), random.integers(9, size=50), random.integers(4, size=50)
    draws = draw_images(9, 40, seed)
    expected = interval(*rows, draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "AT_ONCE", 70)
        assert interval(*rows, draws) == expected


def test_one_query_per_image_gives_the_binomial_interval() -> None:
    count, share = 2000, 0.3
    hits = (np.arange(count) < share * count).astype(float)
    value, low, high = interval(
        hits, np.arange(count), np.zeros(count, dtype=np.int64), draw_images(count, 2000, seed=1)
    )
    spread = 1.96 * math.sqrt(share * (1 - share) / count)  # 2 points
    assert value == pytest.approx(share)
    assert (low, high) == pytest.approx((share - spread, share + spread), abs=0.1 * spread)


def test_queries_of_one_image_hang_together() -> None:
    """Ten queries with one outcome per image tell as much as one: the interval is that of the images."""
    images = np.repeat(np.arange(500), 10)
    hits, cells = (images < 150).astype(float), np.zeros(5000, dtype=np.int64)
    clustered = interval(hits, images, cells, draw_images(500, 1000, seed=1))
    separate = interval(hits, np.arange(5000), cells, draw_images(5000, 1000, seed=1))
    assert (clustered[2] - clustered[1]) / (separate[2] - separate[1]) == pytest.approx(math.sqrt(10), rel=0.15)


def test_every_draw_has_as_many_images_as_the_set_and_a_seed_repeats_it() -> None:
    draws = draw_images(300, 50, seed=7)
    assert (draws.sum(1) == 300).all()
    assert draws.mean(0).std() > 0
    np.testing.assert_array_equal(draws, draw_images(300, 50, seed=7))
    assert (draws != draw_images(300, 50, seed=8)).any()


def test_scores_of_a_hand_computed_case() -> None:
    images, labels = np.array([4, 4, 9, 9, 9]), np.array([0, 1, 0, 0, 2])
    scorer = Scorer(images, resamples=200)
    hits = np.array([True, False, True, False, True])
    scorer.add_accuracy(hits, images, labels, what="boxes", classes=80)
    scorer.add_accuracy(hits[:1], images[:1], labels[:1], what="boxes", classes=80, part="small (area < 32²)")
    scorer.add_accuracy(hits[:0], images[:0], labels[:0], what="boxes", classes=80, part="large (area ≥ 96²)")
    scorer.add_recall(
        np.array([1, 5, 6, 10, 11]), images, key="t2i", label="text to image", what="captions", gallery=20
    )
    got = scorer.scores
    assert got["top1"].value == pytest.approx(3 / 5)
    assert got["macc"].value == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert (got["top1"].of, got["macc"].of) == ("5 boxes", "3 classes present of 80")
    assert got["top1"].low <= got["top1"].value <= got["top1"].high
    assert (got["top1"].low, got["top1"].high) == pytest.approx((1 / 2, 2 / 3))  # both images once, or one of them
    assert (got["top1_small"].value, got["top1_small"].of) == (1.0, "1 boxes")
    assert math.isnan(got["top1_small"].low)  # of one image only
    assert math.isnan(got["top1_large"].value)
    assert got["top1_large"].count == 0
    assert [got[f"t2i_r{k}"].value for k in (1, 5, 10)] == pytest.approx([1 / 5, 2 / 5, 4 / 5])
    assert got["t2i_r10"].of == "5 captions among 20"


def test_sizes_are_cocos() -> None:
    assert sizes_of(np.array([0.0, 1023.9, 1024.0, 9215.9, 9216.0, 1e9])).tolist() == [0, 0, 1, 1, 2, 2]


def test_no_draws_give_no_interval() -> None:
    images = np.arange(3)
    scorer = Scorer(images, resamples=0)
    scorer.add("x", "x", np.array([1.0, 0.0, 0.0]), images, of="3")
    assert scorer.scores["x"].value == pytest.approx(1 / 3)
    assert math.isnan(scorer.scores["x"].low)
