"""Where the things of a scene lie: rectangles as shares of the side of the square image."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

Rectangle = tuple[float, float, float, float]  # XYXY

SIZE_STEP = 1 / 64  # sizes come in steps, so that at any resolution few sprites are drawn many times
_MAX_OVERLAP = 0.08  # of the smaller of two boxes
_PAIR_LONG_SIDE = 0.42  # of a thing in a pair at most
_PAIR_GAP = 0.03  # between the two things of a pair at most
_BAND_MARGIN = 0.06  # at the edges of a band, so that things of different pairs are at least twice this apart


def scattered(
    aspects: list[tuple[float, float]], ranges: list[tuple[float, float]], step: float, rng: Random
) -> list[Rectangle]:
    """Places with little overlap for things of these aspects, their long sides at most as wanted.

    `ranges`: (smallest, wanted) long sides.  A thing that finds no place gets smaller by some `step`s; where even the
    smallest finds none, all start again, and the tenth attempt stands as it is.
    """
    places: list[Rectangle] = []
    for _ in range(10):
        places, all_free = [], True
        for (width, height), (smallest, long_side) in zip(aspects, ranges, strict=True):
            place, free = _place(long_side * width, long_side * height, places, rng)
            while not free and long_side > smallest + step / 2:
                long_side = max(smallest, long_side - 3 * step)
                place, free = _place(long_side * width, long_side * height, places, rng)
            places.append(place)
            all_free = all_free and free
        if all_free:
            break
    return places


def _place(width: float, height: float, taken: list[Rectangle], rng: Random) -> tuple[Rectangle, bool]:
    """A random place with little overlap and True; or the one with the least overlap of those tried, and False."""
    best, best_overlap = (0.0, 0.0, width, height), 2.0
    for _ in range(40):
        left, top = rng.random() * (1 - width), rng.random() * (1 - height)
        right, bottom = left + width, top + height
        overlap = 0.0
        for x0, y0, x1, y1 in taken:
            if left < x1 and right > x0 and top < y1 and bottom > y0:
                shared = (min(x1, right) - max(x0, left)) * (min(y1, bottom) - max(y0, top))
                overlap = max(overlap, shared / min(width * height, (x1 - x0) * (y1 - y0)))
        if overlap <= _MAX_OVERLAP:
            return (left, top, right, bottom), True
        if overlap < best_overlap:
            best, best_overlap = (left, top, right, bottom), overlap
    return best, False


def in_pairs(aspects: Sequence[tuple[float, float]], rng: Random) -> list[Rectangle]:
    """Places where the things of these aspects stand two by two: the first beside the second, the third by the fourth.

    The image is cut into rows or into columns, one for each pair, and a pair stands along its own: at most 0.03
    apart and at least 0.12 from every other thing.  Things are as large as the bands allow.
    """
    places: list[Rectangle] = []
    in_rows, band = rng.random() < 0.5, 2 / len(aspects)
    room = band - 2 * _BAND_MARGIN
    for number in range(len(aspects) // 2):
        along, across = ([], [])  # extents of the two things
        for width, height in aspects[2 * number : 2 * number + 2]:
            long_side = min(room, _PAIR_LONG_SIDE) * rng.uniform(0.75, 1)
            long_side = int(long_side / SIZE_STEP) * SIZE_STEP
            along.append(long_side * (width if in_rows else height))
            across.append(long_side * (height if in_rows else width))
        gap = rng.uniform(0, _PAIR_GAP)
        start = rng.random() * (1 - sum(along) - gap)
        middle = band * number + _BAND_MARGIN + max(across) / 2 + rng.random() * (room - max(across))
        for begin, length, breadth in ((start, along[0], across[0]), (start + along[0] + gap, along[1], across[1])):
            low, high = middle - breadth / 2, middle + breadth / 2
            end = begin + length
            places.append((begin, low, end, high) if in_rows else (low, begin, high, end))
    return places
