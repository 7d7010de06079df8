"""Metrics against properties, slow loops written from the definitions, and cases worked out by hand."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from opencloc.eval import metrics

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


# -- properties --------------------------------------------------------------------------------------------------------


@given(seed=seeds, classes=st.integers(1, 12), regions=st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_recognition_does_not_depend_on_the_order_of_regions_or_classes(seed: int, classes: int, regions: int) -> None:
    names, boxes = unit(classes, 6, seed=seed), unit(regions, 6, seed=seed + 1)
    labels, areas = integers(classes, regions, seed), torch.rand(regions, generator=torch.Generator().manual_seed(seed))
    expected = metrics.region_recognition(boxes, names, labels, areas)
    order = torch.randperm(regions, generator=torch.Generator().manual_seed(seed))
    shuffled = torch.randperm(classes, generator=torch.Generator().manual_seed(seed + 1))
    place = torch.empty_like(shuffled)
    place[shuffled] = torch.arange(classes)
    got = metrics.region_recognition(boxes[order], names[shuffled], place[labels[order]], areas[order])
    for part, want in [
        (got.overall, expected.overall),
        *zip(got.by_size.values(), expected.by_size.values(), strict=True),
    ]:
        assert astuple(part) == pytest.approx(astuple(want), nan_ok=True)


@given(seed=seeds, items=st.integers(1, 15), texts=st.integers(1, 15), extra=st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_retrieval_does_not_depend_on_order(seed: int, items: int, texts: int, extra: int) -> None:
    a, b = unit(items, 5, seed=seed), unit(texts, 5, seed=seed + 1)
    pairs = every_text_and_item_paired(items, texts, extra, seed)
    generator = torch.Generator().manual_seed(seed)
    new_a, new_b = torch.randperm(items, generator=generator), torch.randperm(texts, generator=generator)
    place_a, place_b = new_a.argsort(), new_b.argsort()
    moved = torch.stack([place_a[pairs[:, 0]], place_b[pairs[:, 1]]], 1)
    moved = moved[torch.randperm(len(moved), generator=generator)]
    assert metrics.retrieval(a[new_a], b[new_b], moved) == metrics.retrieval(a, b, pairs)


@given(seed=seeds, count=st.integers(2, 20))
@settings(max_examples=20, deadline=None)
def test_perfect_embeddings_score_one(seed: int, count: int) -> None:
    names = torch.eye(count)
    labels = torch.cat([torch.arange(count), integers(count, 7, seed)])
    recognised = metrics.region_recognition(names[labels], names, labels, torch.full((len(labels),), 0.5))
    assert (recognised.overall.top1, recognised.overall.macc) == (1.0, 1.0)
    pairs = torch.stack([torch.arange(len(labels)), labels], 1)
    found = metrics.retrieval(names[labels], names, pairs)
    assert found.to_text.r1 == found.from_text.r1 == 1.0
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.9]]).repeat(count, 1)
    assert metrics.grounding(boxes, boxes) == metrics.Grounding(acc50=1.0, mean_iou=1.0, queries=count)


@given(seed=seeds, count=st.integers(11, 300), width=st.sampled_from([3, 64, 512]))
@settings(max_examples=20, deadline=None)
def test_equal_embeddings_score_zero(seed: int, count: int, width: int) -> None:
    same = unit(1, width, seed=seed).repeat(count, 1)
    labels = torch.arange(count)
    areas = torch.full((count,), 0.5)
    assert metrics.region_recognition(same, same, labels, areas).overall.top1 == 0.0
    found = metrics.retrieval(same, same.clone(), torch.stack([labels, labels], 1))
    assert found.to_text.r10 == found.from_text.r10 == 0.0


def test_embeddings_that_are_not_numbers_score_zero() -> None:
    nan = torch.full((20, 4), float("nan"))
    labels = torch.arange(20)
    assert metrics.region_recognition(nan, nan, labels, torch.full((20,), 0.5)).overall.top1 == 0.0
    found = metrics.retrieval(nan, nan, torch.stack([labels, labels], 1))
    assert found.to_text.r10 == found.from_text.r10 == 0.0
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    assert metrics.grounding(boxes * float("nan"), boxes).mean_iou == 0.0


# -- slow references ---------------------------------------------------------------------------------------------------


def slow_rank(query: Tensor, gallery: list[Tensor], hits: set[int]) -> int:
    """One more than the wrong entries that are as similar as the best hit, or more."""
    scores = [float(query @ entry) for entry in gallery]
    best = max(scores[j] for j in hits)
    return 1 + sum(score >= best - 1e-6 for j, score in enumerate(scores) if j not in hits)


@given(seed=seeds, items=st.integers(1, 14), texts=st.integers(1, 14), extra=st.integers(0, 30), tied=st.booleans())
@settings(max_examples=40, deadline=None)
def test_retrieval_equals_ranking_the_undeduplicated_lists(
    seed: int, items: int, texts: int, extra: int, tied: bool
) -> None:
    # Few distinct vectors make ties between different texts.
    vectors = F.normalize(torch.eye(4) + 0.25, dim=-1) if tied else unit(64, 6, seed=seed)
    a = vectors[integers(len(vectors), items, seed)]
    b = vectors[integers(len(vectors), texts, seed + 1)]
    pairs = every_text_and_item_paired(items, texts, extra, seed)
    right = {(int(i), int(t)) for i, t in pairs}
    occurring = [int(t) for _, t in pairs]  # the texts as they lie in the data, repeats and all
    to_text = [
        slow_rank(a[i], [b[t] for t in occurring], {j for j, t in enumerate(occurring) if (i, t) in right})
        for i in range(items)
    ]
    from_text = [slow_rank(b[t], list(a), {i for i in range(items) if (i, t) in right}) for t in occurring]
    got = metrics.retrieval(a, b, pairs)
    for recall, ranks, gallery in ((got.to_text, to_text, len(pairs)), (got.from_text, from_text, items)):
        for k, score in ((1, recall.r1), (5, recall.r5), (10, recall.r10)):
            assert score == pytest.approx(sum(r <= k for r in ranks) / len(ranks))
        assert (recall.queries, recall.gallery) == (len(ranks), gallery)


@given(seed=seeds, regions=st.integers(1, 60), classes=st.integers(1, 15))
@settings(max_examples=40, deadline=None)
def test_recognition_equals_a_loop_over_boxes(seed: int, regions: int, classes: int) -> None:
    boxes, names, labels = (
        unit(regions, 4, seed=seed),
        unit(classes, 4, seed=seed + 1),
        integers(classes, regions, seed),
    )
    areas = torch.rand(regions, generator=torch.Generator().manual_seed(seed)) ** 4
    got = metrics.region_recognition(boxes, names, labels, areas)
    limits = {"small": (0.0, 0.01), "medium": (0.01, 0.1), "large": (0.1, 2.0)}
    for low, high, part in [(0.0, 2.0, got.overall), *((*limits[size], got.by_size[size]) for size in limits)]:
        outcomes: dict[int, list[bool]] = {}
        for region, label, share in zip(boxes, labels.tolist(), areas.tolist(), strict=True):
            if low <= share < high:
                said = max(range(classes), key=lambda c: float(region @ names[c]))
                outcomes.setdefault(label, []).append(said == label)
        count = sum(map(len, outcomes.values()))
        assert (part.boxes, part.classes_present) == (count, len(outcomes))
        if count:
            assert part.top1 == pytest.approx(sum(map(sum, outcomes.values())) / count)
            assert part.macc == pytest.approx(sum(sum(o) / len(o) for o in outcomes.values()) / len(outcomes))
        else:
            assert math.isnan(part.top1)
            assert math.isnan(part.macc)


@pytest.mark.parametrize("at_once", [1, 40, 1000])
def test_scores_do_not_depend_on_how_much_is_held_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items, texts = unit(60, 8, seed=0), unit(37, 8, seed=1)
    pairs, labels = every_text_and_item_paired(60, 37, 50, 2), integers(37, 60, 3)
    expected = metrics.retrieval(items, texts, pairs), metrics.class_ranks(items, texts, labels)
    monkeypatch.setattr(metrics, "SCORES_AT_ONCE", at_once)
    assert metrics.retrieval(items, texts, pairs) == expected[0]
    assert torch.equal(metrics.class_ranks(items, texts, labels), expected[1])


def test_ranks_are_those_of_float32_under_autocast() -> None:
    first, second = unit(2, 64, seed=0)
    regions = F.normalize(torch.stack([first + 0.999 * second, 0.999 * first + second]), dim=-1)  # bfloat16 sees a tie
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ranks = metrics.class_ranks(regions, torch.stack([first, second]), torch.tensor([0, 1]))
    assert ranks.tolist() == [1, 1]


# -- known answers -----------------------------------------------------------------------------------------------------


def test_recognition_of_a_hand_computed_case() -> None:
    names = torch.eye(4)
    labels = torch.tensor([0, 0, 1, 0, 2])
    regions = names[[0, 3, 1, 0, 2]]  # class 0: 2 of 3 right; class 1: 1 of 1; class 2: 1 of 1; class 3 does not occur
    got = metrics.region_recognition(regions, names, labels, torch.tensor([0.005, 0.05, 0.01, 0.5, 0.0099]))
    assert got.classes == 4
    assert astuple(got.overall) == pytest.approx((4 / 5, (2 / 3 + 1 + 1) / 3, 5, 3))
    assert astuple(got.by_size["small"]) == pytest.approx((1.0, 1.0, 2, 2))
    assert astuple(got.by_size["medium"]) == pytest.approx((1 / 2, 1 / 2, 2, 2))
    assert astuple(got.by_size["large"]) == pytest.approx((1.0, 1.0, 1, 1))


def test_two_regions_of_one_name_do_not_compete() -> None:
    dog, cat = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    got = metrics.retrieval(
        torch.stack([dog, dog, cat]), torch.stack([dog, cat]), torch.tensor([[0, 0], [1, 0], [2, 1]])
    )
    assert got.to_text == metrics.Recall(r1=1.0, r5=1.0, r10=1.0, queries=3, gallery=3)
    assert got.from_text == metrics.Recall(r1=1.0, r5=1.0, r10=1.0, queries=3, gallery=3)
    assert got.distinct_texts == 2


def test_a_wrong_text_takes_as_many_places_as_it_has_occurrences() -> None:
    # Item 0 likes "dog" best, which names five other items; its own "cat" comes right behind.
    dog, cat = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    items = torch.stack([F.normalize(torch.tensor([0.8, 0.6]), dim=0), *[dog] * 5])
    pairs = torch.tensor([[0, 1], [1, 0], [2, 0], [3, 0], [4, 0], [5, 0]])
    assert metrics.best_hit_ranks(items, torch.stack([dog, cat]), pairs, weights=torch.tensor([5, 1])).tolist() == [
        6,
        1,
        1,
        1,
        1,
        1,
    ]
    got = metrics.retrieval(items, torch.stack([dog, cat]), pairs)
    assert (got.to_text.r1, got.to_text.r5, got.to_text.r10) == (5 / 6, 5 / 6, 1.0)


def test_any_of_several_captions_is_a_hit() -> None:
    captions = torch.eye(4)
    images = torch.stack([captions[1], captions[2]])
    got = metrics.retrieval(images, captions, torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3]]))
    assert got.to_text.r1 == 1.0  # each image finds one of its two
    assert got.from_text == metrics.Recall(r1=0.5, r5=1.0, r10=1.0, queries=4, gallery=2)  # the other two see a tie


def test_grounding_of_a_hand_computed_case() -> None:
    truth = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).repeat(5, 1)
    predicted = torch.tensor(
        [
            [0.0, 0.0, 0.5, 0.5],  # IoU 1
            [0.0, 0.0, 0.5, 1.0],  # IoU 1/2: counts
            [0.0, 0.0, 1.0, 1.0],  # IoU 1/4
            [0.6, 0.6, 0.9, 0.9],  # IoU 0
            [0.5, 0.5, 0.0, 0.0],  # corners swapped: no box
        ]
    )
    assert astuple(metrics.grounding(predicted, truth)) == pytest.approx((2 / 5, 1.75 / 5, 5))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, 0], [0, 1]], "every item needs a pair: 2 items, 1 in pairs"),
        ([[0, 1], [1, 1]], "every text needs a pair: 2 texts, 1 in pairs"),
    ],
)
def test_an_unpaired_entry_is_refused(pairs: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.retrieval(torch.eye(2), torch.eye(2), torch.tensor(pairs))


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no regions"):
        metrics.region_recognition(torch.zeros(0, 4), torch.eye(4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    with pytest.raises(ValueError, match="no grounding queries"):
        metrics.grounding(torch.zeros(0, 4), torch.zeros(0, 4))
