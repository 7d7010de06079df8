"""Ranks, overlaps and intervals against properties, slow loops written from the definitions, and cases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from opencloc.eval import metrics
from opencloc.eval.metrics import Scorer, by_size, draw_images, interval, wilson

seeds = st.integers(0, 2**31 - 1)


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def integers(high: int, count: int, seed: int) -> Tensor:
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed))


def every_text_and_item_paired(num_items: int, num_texts: int, extra: int, seed: int) -> Tensor:
    """Random pairs in which every item and every text occurs; repeats included."""
    most = max(num_items, num_texts)
    both = torch.stack([torch.arange(most) % num_items, torch.arange(most) % num_texts], 1)
    more = torch.stack([integers(num_items, extra, seed), integers(num_texts, extra, seed + 1)], 1)
    return torch.cat([both, more])


# -- ranks and overlaps ------------------------------------------------------------------------------------------------


@given(seed=seeds, count=st.integers(11, 300), width=st.sampled_from([3, 64, 512]))
@settings(max_examples=20, deadline=None)
def test_equal_embeddings_come_last_and_perfect_ones_first(seed: int, count: int, width: int) -> None:
    labels = torch.arange(count)
    pairs = torch.stack([labels, labels], 1)
    same = unit(1, width, seed=seed).repeat(count, 1)
    for ranks in (metrics.class_ranks(same, same, labels), *metrics.retrieval_ranks(same, same.clone(), pairs)):
        assert (ranks == count).all()
    eye = torch.eye(count)
    for ranks in (metrics.class_ranks(eye, eye, labels), *metrics.retrieval_ranks(eye, eye, pairs)):
        assert (ranks == 1).all()


def test_what_is_not_a_number_is_wrong() -> None:
    nan, labels = torch.full((20, 4), float("nan")), torch.arange(20)
    ranks = metrics.class_ranks(nan, nan, labels), *metrics.retrieval_ranks(nan, nan, torch.stack([labels, labels], 1))
    assert all((of_one > 10).all() for of_one in ranks)
    truth = np.array([0.0, 0.0, 0.5, 0.5], dtype=np.float32)
    assert metrics.overlaps(torch.full((1, 4), float("nan")), truth).tolist() == [0.0]


def slow_rank(query: Tensor, gallery: list[Tensor], hits: set[int]) -> int:
    """One more than the wrong entries that are as similar as the best hit, or more."""
    scores = [float(query @ entry) for entry in gallery]
    best = max(scores[j] for j in hits)
    return 1 + sum(score >= best - 1e-6 for j, score in enumerate(scores) if j not in hits)


@given(seed=seeds, items=st.integers(1, 14), texts=st.integers(1, 14), extra=st.integers(0, 30), tied=st.booleans())
@settings(max_examples=40, deadline=None)
def test_retrieval_ranks_are_those_in_the_undeduplicated_lists(
    seed: int, items: int, texts: int, extra: int, tied: bool
) -> None:
    # Few distinct vectors make ties between different texts.
    vectors = F.normalize(torch.eye(4) + 0.25, dim=-1) if tied else unit(64, 6, seed=seed)
    a = vectors[integers(len(vectors), items, seed)]
    b = vectors[integers(len(vectors), texts, seed + 1)]
    pairs = every_text_and_item_paired(items, texts, extra, seed)
    right = {(int(i), int(t)) for i, t in pairs}
    occurring = [int(t) for _, t in pairs]  # the texts as they lie in the data, repeats and all
    to_text, from_text = metrics.retrieval_ranks(a, b, pairs)
    assert to_text.tolist() == [
        slow_rank(a[i], [b[t] for t in occurring], {j for j, t in enumerate(occurring) if (i, t) in right})
        for i in range(items)
    ]
    assert from_text.tolist() == [
        slow_rank(b[t], list(a), {i for i in range(items) if (i, t) in right}) for t in occurring
    ]


@given(seed=seeds, regions=st.integers(1, 60), classes=st.integers(1, 15))
@settings(max_examples=40, deadline=None)
def test_class_ranks_equal_a_loop_over_boxes(seed: int, regions: int, classes: int) -> None:
    boxes, names = unit(regions, 4, seed=seed), unit(classes, 4, seed=seed + 1)
    labels = integers(classes, regions, seed)
    want = [slow_rank(box, list(names), {label}) for box, label in zip(boxes, labels.tolist(), strict=True)]
    assert metrics.class_ranks(boxes, names, labels).tolist() == want


@pytest.mark.parametrize("at_once", [1, 40, 1000])
def test_ranks_do_not_depend_on_how_much_is_held_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items, texts = unit(60, 8, seed=0), unit(37, 8, seed=1)
    pairs, labels = every_text_and_item_paired(60, 37, 50, 2), integers(37, 60, 3)
    expected = [*metrics.retrieval_ranks(items, texts, pairs), metrics.class_ranks(items, texts, labels)]
    monkeypatch.setattr(metrics, "SCORES_AT_ONCE", at_once)
    got = [*metrics.retrieval_ranks(items, texts, pairs), metrics.class_ranks(items, texts, labels)]
    assert all(map(torch.equal, got, expected))


def test_ranks_are_those_of_float32_under_autocast() -> None:
    first, second = unit(2, 64, seed=0)
    regions = F.normalize(torch.stack([first + 0.999 * second, 0.999 * first + second]), dim=-1)  # bfloat16 sees a tie
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ranks = metrics.class_ranks(regions, torch.stack([first, second]), torch.tensor([0, 1]))
    assert ranks.tolist() == [1, 1]


def test_a_wrong_text_takes_as_many_places_as_it_has_occurrences() -> None:
    # Item 0 likes "dog" best, which names five other items; its own "cat" comes right behind.  The five don't compete.
    dog, cat = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    items = torch.stack([F.normalize(torch.tensor([0.8, 0.6]), dim=0), *[dog] * 5])
    pairs = torch.tensor([[0, 1], [1, 0], [2, 0], [3, 0], [4, 0], [5, 0]])
    to_text, from_text = metrics.retrieval_ranks(items, torch.stack([dog, cat]), pairs)
    assert to_text.tolist() == [6, 1, 1, 1, 1, 1]
    assert from_text.tolist() == [1, 1, 1, 1, 1, 1]


def test_overlap_is_plain_iou_and_nothing_for_what_is_no_box() -> None:
    truth = np.array([0.0, 0.0, 0.5, 0.5], dtype=np.float32)
    found = [[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 1.0, 1.0], [0.6, 0.6, 0.9, 0.9], [0.5, 0.5, 0, 0]]
    assert metrics.overlaps(torch.tensor(found), truth).tolist() == pytest.approx([1, 1 / 2, 1 / 4, 0, 0])


@given(st.lists(st.integers(0, 4), min_size=1), st.lists(st.integers(0, 4), min_size=1))
def test_the_mean_share_below_is_the_area_under_the_roc_curve(true: list[int], false: list[int]) -> None:
    wins = [t > f for t in true for f in false]  # ties are lost
    got = metrics.share_below(torch.tensor(true) / 4, torch.tensor(false) / 4)
    assert float(got.mean()) == pytest.approx(sum(wins) / len(wins))
    assert metrics.share_below(torch.tensor([0.5, float("nan")]), torch.tensor([float("nan"), 0.1])).tolist() == [
        0.5,
        0,
    ]


# -- scores and intervals ----------------------------------------------------------------------------------------------


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "DRAWS_AT_ONCE", 7)
        assert interval(hits, images, cells, draws) == pytest.approx((value, low, high), nan_ok=True)


def test_one_query_per_image_gives_the_binomial_interval() -> None:
    count, share = 2000, 0.3
    hits = (np.arange(count) < share * count).astype(float)
    one_cell = np.zeros(count, dtype=np.int64)
    value, low, high = interval(hits, np.arange(count), one_cell, draw_images(count, 2000, seed=1))
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


@pytest.mark.parametrize(
    ("share", "trials", "expected"),
    [(0.0, 19, (0.0, 0.1682)), (1.0, 19, (0.8318, 1.0)), (0.0, 1, (0.0, 0.7935)), (0.5, 10, (0.2366, 0.7634))],
)
def test_wilsons_interval_of_known_shares(share: float, trials: int, expected: tuple[float, float]) -> None:
    assert wilson(share, trials) == pytest.approx(expected, abs=1e-4)


@given(count=st.integers(1, 40), per_image=st.integers(1, 4), right=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_share_on_which_all_queries_agree_has_wilsons_interval_by_images(
    count: int, per_image: int, right: bool
) -> None:
    images = np.repeat(np.arange(count), per_image)
    scorer = Scorer(images, resamples=20)
    scorer.add("share", "share", np.full(len(images), right), images, of="x")
    scorer.add("mean", "mean", np.full(len(images), float(right)), images, of="x")
    share, mean = scorer.scores["share"], scorer.scores["mean"]
    assert (share.low, share.high) == wilson(float(right), count)
    assert share.low <= share.value <= share.high
    assert math.isnan(mean.low)  # no share


def test_scores_of_a_hand_computed_case() -> None:
    images, labels = np.array([4, 4, 9, 9, 9]), np.array([0, 1, 0, 0, 2])
    scorer = Scorer(images, resamples=200)
    hits = np.array([True, False, True, False, True])
    scorer.add_accuracy(hits, images, labels, what="boxes", classes=80)
    scorer.add_accuracy(hits[:0], images[:0], labels[:0], what="boxes", classes=80, parts=["large (from 96²)"])
    scorer.add_recall(np.array([1, 5, 6, 10, 11]), images, key="t2i", label="text to image", what="captions", gallery=9)
    got = scorer.scores
    assert got["top1"].value == pytest.approx(3 / 5)
    assert got["macc"].value == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert (got["top1"].of, got["macc"].of) == ("5 boxes", "3 classes present of 80")
    assert (got["top1"].low, got["top1"].high) == pytest.approx((1 / 2, 2 / 3))  # both images once, or one of them
    assert math.isnan(got["top1_large"].value)
    assert (got["top1_large"].label, got["top1_large"].count) == ("top-1, large (from 96²)", 0)
    assert [got[f"t2i_r{k}"].value for k in (1, 5, 10)] == pytest.approx([1 / 5, 2 / 5, 4 / 5])
    assert got["t2i_r10"].of == "5 captions among 9"
    without = Scorer(images, resamples=0)
    without.add("top1", "top-1", hits, images, of="5 boxes")
    assert without.scores["top1"].value == pytest.approx(3 / 5)
    assert math.isnan(without.scores["top1"].low)


@given(seed=seeds, count=st.integers(2, 40))
@settings(max_examples=20, deadline=None)
def test_a_ratio_of_sums_to_ones_is_the_mean_and_its_interval_that_of_the_mean(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    images, hits = random.integers(0, 7, count), random.random(count)
    scorer = Scorer(images, resamples=50)
    scorer.add("mean", "mean", hits, images, of="x")
    scorer.add_ratio("ratio", "ratio", hits, np.ones(count), images, of="x")
    scorer.add_ratio("twice", "twice", 2 * hits, np.full(count, 4.0), images, of="x")
    mean, ratio, twice = (scorer.scores[key] for key in ("mean", "ratio", "twice"))
    np.testing.assert_allclose([ratio.value, ratio.low, ratio.high], [mean.value, mean.low, mean.high])
    np.testing.assert_allclose([twice.value, twice.low, twice.high], np.array([mean.value, mean.low, mean.high]) / 2)


def test_a_ratio_to_nothing_is_no_number_and_draws_without_a_whole_do_not_count() -> None:
    images = np.array([0, 1])
    scorer = Scorer(images, resamples=30)
    scorer.add_ratio("none", "none", np.zeros(2), np.zeros(2), images, of="x")
    scorer.add_ratio("half", "half", np.array([1.0, 0.0]), np.array([2.0, 0.0]), images, of="x")
    assert math.isnan(scorer.scores["none"].value)
    assert scorer.scores["half"].value == 0.5
    assert math.isnan(scorer.scores["half"].low)  # every draw that counts says one half


def test_sizes_are_cocos() -> None:
    small, medium, large = by_size(np.array([0.0, 1023.9, 1024.0, 9215.9, 9216.0, 1e9])).values()
    assert (small.sum(), medium.sum(), large.sum()) == (2, 2, 2)
    assert (small | medium | large).all()
