"""Filters against slow loops written from their one-line definitions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opencloc.vesl.detect import Detections
from opencloc.vesl.filters import FilterConfig, filter_detections, first_of_equal, nms, not_inside_same_phrase


def detected(boxes, scores, phrase) -> Detections:
    return Detections(boxes=np.array(boxes), scores=np.array(scores), phrase=np.array(phrase))


PHRASES = ("dog", "red dog", "a very long phrase about a dog that nobody would ever want to have as text")
KEEP_ALL = FilterConfig(score=0, nms_iou=1, duplicate_inside=1, min_area=0, max_area=1, max_words=100)


@st.composite
def boxes(draw, max_side: int = 12, min_count: int = 0) -> np.ndarray:
    """Boxes on a coarse grid, so that equal, nested and touching ones are common."""
    count = draw(st.integers(min_count, 12))
    corner = draw(hnp.arrays(np.int64, (count, 2), elements=st.integers(0, max_side - 1)))
    size = draw(hnp.arrays(np.int64, (count, 2), elements=st.integers(1, 6)))
    return (np.concatenate([corner, corner + size], axis=1) / (max_side + 6)).astype(np.float32)


@st.composite
def detections(draw) -> Detections:
    found = draw(boxes())
    scores = draw(hnp.arrays(np.int64, len(found), elements=st.integers(0, 10))) / 10
    phrase = draw(hnp.arrays(np.int64, len(found), elements=st.integers(0, len(PHRASES) - 1)))
    return Detections(boxes=found, scores=scores, phrase=phrase)


def slow_overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """(intersection, area of a, area of b) in float64."""
    a, b = a.astype(float), b.astype(float)
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return width * height, (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])


# Thresholds that no ratio of small whole numbers equals, so that rounding cannot decide.
@given(boxes(), st.sampled_from([0.0431, 0.3137, 0.5123, 0.7713]))
def test_nms_equals_a_slow_loop(found: np.ndarray, threshold: float) -> None:
    kept: list[int] = []
    for i, box in enumerate(found):
        overlaps = [slow_overlap(found[k], box) for k in kept]
        if all(shared / (a + b - shared) <= threshold for shared, a, b in overlaps):
            kept.append(i)
    assert np.flatnonzero(nms(found, threshold)).tolist() == kept


@given(detections(), st.sampled_from([0.3137, 0.5123, 0.9017]))
def test_nested_boxes_of_one_phrase_equal_a_slow_loop(found: Detections, threshold: float) -> None:
    kept: list[int] = []
    for i, box in enumerate(found.boxes):
        same = [slow_overlap(found.boxes[k], box) for k in kept if found.phrase[k] == found.phrase[i]]
        if all(shared / min(a, b) <= threshold for shared, a, b in same):
            kept.append(i)
    assert np.flatnonzero(not_inside_same_phrase(found.boxes, found.phrase, threshold)).tolist() == kept


@given(boxes())
def test_first_of_equal_boxes_is_the_only_one_of_its_kind_kept(found: np.ndarray) -> None:
    expected = [i for i, box in enumerate(found) if not any((box == earlier).all() for earlier in found[:i])]
    assert np.flatnonzero(first_of_equal(found)).tolist() == expected


@given(detections())
def test_what_stays_and_what_is_counted_as_dropped_add_up(found: Detections) -> None:
    kept, dropped = filter_detections(found, PHRASES, FilterConfig(min_area=0.01, max_area=0.2, max_words=5))
    assert len(kept) + sum(dropped.values()) == len(found)
    assert (np.diff(kept.scores) <= 0).all()
    assert all(count > 0 for count in dropped.values())


@given(detections())
def test_filtering_twice_changes_nothing_more(found: Detections) -> None:
    config = FilterConfig(min_area=0.01, max_area=0.2)
    once, _ = filter_detections(found, PHRASES, config)
    twice, dropped = filter_detections(once, PHRASES, config)
    assert not dropped
    np.testing.assert_array_equal(once.boxes, twice.boxes)
    np.testing.assert_array_equal(once.phrase, twice.phrase)


@given(detections(), st.randoms())
def test_the_order_of_detections_with_distinct_scores_does_not_matter(found: Detections, random) -> None:
    scores = (np.arange(len(found)) + 1) / 20
    found = Detections(boxes=found.boxes, scores=scores, phrase=found.phrase)
    shuffled = np.array(random.sample(range(len(found)), len(found)), dtype=int)
    config = FilterConfig(min_area=0.01)
    one, dropped_one = filter_detections(found, PHRASES, config)
    other, dropped_other = filter_detections(found.take(shuffled), PHRASES, config)
    np.testing.assert_array_equal(one.boxes, other.boxes)
    assert dropped_one == dropped_other


@pytest.mark.parametrize(
    ("name", "config", "box", "score", "phrase"),
    [
        ("outside", {}, (1.2, 0.1, 1.5, 0.4), 0.9, 0),  # beyond the right edge
        ("outside", {}, (0.3, 0.3, 0.3, 0.5), 0.9, 0),  # no width
        ("score", {"score": 0.5}, (0.1, 0.1, 0.3, 0.3), 0.5, 0),  # not above the threshold
        ("words", {"max_words": 2}, (0.1, 0.1, 0.3, 0.3), 0.9, 2),
        ("min_area", {"min_area": 0.05}, (0.1, 0.1, 0.3, 0.3), 0.9, 0),
        ("max_area", {"max_area": 0.03}, (0.1, 0.1, 0.3, 0.3), 0.9, 0),
        ("best_phrase", {}, (0.5, 0.5, 0.9, 0.9), 0.7, 1),  # the same box as the one below
        ("nms", {"nms_iou": 0.6}, (0.5, 0.5, 0.9, 0.8), 0.7, 1),  # IoU 0.75 with it
        ("duplicate", {"duplicate_inside": 0.9}, (0.6, 0.6, 0.7, 0.7), 0.7, 0),  # inside it, same phrase
    ],
)
def test_each_filter_drops_its_case_under_its_name(name: str, config: dict, box, score: float, phrase: int) -> None:
    found = detected([(0.5, 0.5, 0.9, 0.9), box], [0.8, score], [0, phrase])
    if name == "max_area":  # the first box is the larger one
        found = found.take(np.array([1]))
    kept, dropped = filter_detections(found, PHRASES, dataclasses.replace(KEEP_ALL, **config))
    assert dict(dropped) == {name: 1}
    assert len(kept) == len(found) - 1


def test_a_box_over_the_border_is_clipped_before_its_area_is_judged() -> None:
    found = detected([(-0.5, 0.2, 0.1, 1.4)], [0.9], [0])
    kept, dropped = filter_detections(found, PHRASES, FilterConfig(max_area=0.1))
    assert not dropped
    np.testing.assert_allclose(kept.boxes, [[0, 0.2, 0.1, 1]])


def test_texts_of_the_detector_stay_with_their_boxes() -> None:
    found = dataclasses.replace(
        detected([(0, 0, 0.3, 0.3), (0.5, 0.5, 0.9, 0.9)], [0.5, 0.9], [1, 0]), texts=np.array(["one", "other"])
    )
    kept, _ = filter_detections(found, PHRASES, FilterConfig())
    assert kept.texts is not None
    assert kept.texts.tolist() == ["other", "one"]


def test_nested_boxes_of_different_phrases_both_stay() -> None:
    found = detected([(0, 0, 0.9, 0.9), (0.1, 0.1, 0.3, 0.3)], [0.5, 0.9], [0, 1])
    kept, dropped = filter_detections(found, PHRASES, FilterConfig())
    assert len(kept) == 2
    assert not dropped


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (detected([(0, 0, np.nan, 1)], [0.5], [0]), "not finite"),
        (detected([(0, 0, 1, 1)], [np.nan], [0]), "score outside"),
        (detected([(0, 0, 1, 1)], [1.5], [0]), "score outside"),
        (detected([(0, 0, 1, 1)], [0.5], [3]), "phrase numbers 3 to 3 for 3 phrases"),
    ],
)
def test_unsound_detections_are_refused(found: Detections, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filter_detections(found, PHRASES, FilterConfig())


def test_detections_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 boxes, 1 scores, 2 phrase numbers"):
        detected(np.zeros((2, 4)), [0.5], [0, 0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("score", 1.0), ("score", -0.1), ("nms_iou", 1.1), ("min_area", 0.96), ("max_area", 1.5), ("max_words", 0)],
)
def test_a_threshold_out_of_range_is_refused_by_name(field: str, value) -> None:
    with pytest.raises(ValueError, match=field):
        FilterConfig(**{field: value})
