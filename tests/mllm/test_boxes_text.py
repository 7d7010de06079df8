"""Boxes as text: what is written is read back, and what is no box is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencloc.mllm.boxes_text import STEPS, box_text, coordinate_numbers, find_boxes, point_text

EDGES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(x=EDGES, y=EDGES, steps=st.sampled_from([2, 16, 64, STEPS]))
def test_box_is_read_back_within_half_a_step(x: list[float], y: list[float], steps: int) -> None:
    text = box_text([x[0], y[0], x[1], y[1]], steps)
    found = find_boxes(f"The dog {text}.")
    assert found.problems == {}
    (box,) = found.boxes
    for (low, high), (first, last) in (((x[0], x[1]), (box[0], box[2])), ((y[0], y[1]), (box[1], box[3]))):
        half = 0.5 / (steps - 1) + 0.5 / 999
        wide = high - low > 1 / (steps - 1)  # a thinner box has to grow
        assert abs(first - low) <= half + (0 if wide else 1.5 / (steps - 1))
        assert abs(last - high) <= half + (0 if wide else 1.5 / (steps - 1))


@given(x=st.floats(-1, 2), steps=st.sampled_from([2, 64, STEPS]))
def test_only_the_listed_numbers_are_written(x: float, steps: int) -> None:
    numbers = coordinate_numbers(steps)
    assert (numbers[0], numbers[-1], len(set(numbers))) == (0, 999, steps)
    assert int(point_text(x, 0.5, steps)[1:].split(",")[0]) in numbers


@pytest.mark.parametrize(
    ("text", "boxes", "problems"),
    [
        ("no box at all", 0, {}),
        ("[0, 0, 999, 999] and [ 1 , 2 , 3 , 4 ]", 2, {}),  # spaces as word tokenizers leave them
        ("[1,2,3,4]", 1, {}),
        ("a point [5, 6]", 0, {"not four numbers": 1}),
        ("[1, 2, 3, 4, 5]", 0, {"not four numbers": 1}),
        ("[0.1, 0.2, 0.3, 0.4]", 0, {"not whole numbers": 1}),
        ("[-1, 2, 3, 4]", 0, {"not whole numbers": 1}),
        ("[1, 2, 3, 1000]", 0, {"number above 999": 1}),
        ("[1, 2, 3, 99999999999999999999]", 0, {"number above 999": 1}),
        ("[9, 9, 1, 1]", 0, {"empty box": 1}),
        ("[5, 5, 5, 9]", 0, {"empty box": 1}),
        ("it ends in [12, 34, 5", 0, {"bracket is not closed": 1}),
        ("[a, b] and [see 1]", 0, {}),  # words in brackets are no boxes
    ],
)
def test_what_looks_like_a_box_and_is_none_is_counted(text: str, boxes: int, problems: dict[str, int]) -> None:
    found = find_boxes(text)
    assert len(found.boxes) == boxes
    assert found.problems == problems
