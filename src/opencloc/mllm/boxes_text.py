"""Boxes as text: `[x0, y0, x1, y1]` in whole numbers from 0 to 999 of the letterboxed square, written and read back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

SCALE = 999  # the largest number
STEPS = SCALE + 1
_BRACKETS = re.compile(r"\[([-+\d.,;\s]*\d[-+\d.,;\s]*)(\]?)")  # numbers behind a bracket, closed or not
_NUMBER = re.compile(r"[-+]?\d*\.?\d+")

Numbers = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class FoundBoxes:
    """`boxes`: XYXY in [0, 1] of the square, in the order of the text.  `problems`: what looks like one and is none."""

    boxes: tuple[Numbers, ...] = ()
    problems: Counter[str] = field(default_factory=Counter)  # by reason


def box_text(box: Sequence[float], steps: int = STEPS) -> str:
    """`[x0, y0, x1, y1]` of a box in [0, 1] of the square.

    `steps`: how many different numbers are used, evenly spread from 0 to 999: fewer are easier for a small model to
    learn.  A box thinner than a step becomes one step wide, so that it can be read back.
    """
    x0, y0, x1, y1 = box
    (left, right), (top, bottom) = _edges(x0, x1, steps), _edges(y0, y1, steps)
    return f"[{left}, {top}, {right}, {bottom}]"


def point_text(x: float, y: float, steps: int = STEPS) -> str:
    """`[x, y]` of a point in [0, 1] of the square."""
    return f"[{_number(_step(x, steps), steps)}, {_number(_step(y, steps), steps)}]"


def coordinate_numbers(steps: int = STEPS) -> list[int]:
    """The numbers that `box_text` writes with so many steps, ascending."""
    return [_number(step, steps) for step in range(steps)]


def find_boxes(text: str) -> FoundBoxes:
    """The boxes in a text, and what looks like a box and is none, counted by reason.

    Any bracket that holds nothing but numbers looks like one.
    """
    boxes: list[Numbers] = []
    problems: Counter[str] = Counter()
    for inside, closed in _BRACKETS.findall(text):
        numbers = _NUMBER.findall(inside)
        if not closed:
            problems["bracket is not closed"] += 1
        elif len(numbers) != 4:
            problems["not four numbers"] += 1
        elif not all(number.isdecimal() for number in numbers):
            problems["not whole numbers"] += 1
        elif any(len(number) > 4 or int(number) > SCALE for number in numbers):
            problems[f"number above {SCALE}"] += 1
        else:
            x0, y0, x1, y1 = (int(number) / SCALE for number in numbers)
            if x0 < x1 and y0 < y1:
                boxes.append((x0, y0, x1, y1))
            else:
                problems["empty box"] += 1
    return FoundBoxes(boxes=tuple(boxes), problems=problems)


def _edges(low: float, high: float, steps: int) -> tuple[int, int]:
    first, last = _step(low, steps), _step(high, steps)
    if last <= first:
        first = min(first, steps - 2)
        last = first + 1
    return _number(first, steps), _number(last, steps)


def _step(value: float, steps: int) -> int:
    return min(max(round(value * (steps - 1)), 0), steps - 1)


def _number(step: int, steps: int) -> int:
    return round(SCALE * step / (steps - 1))
