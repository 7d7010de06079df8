"""The order of samples: arithmetic against lists, every sample once, few tars at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencloc.data.shuffle import SHUFFLE, WholeOrder, WindowedOrder, permutation

counts = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any).map(lambda some: np.array(some))
lanes = st.integers(1, 9)
shuffles = st.integers(1, 60)


def numbers(order: WholeOrder | WindowedOrder, epoch: int = 0) -> list[int]:
    return [order.number(epoch, place) for place in range(order.size)]


def slow_order(counts: np.ndarray, seed: tuple[int, ...], lanes: int, shuffle: int, epoch: int) -> list[int]:
    """The numbers of one epoch, by lists of all samples."""
    first = np.cumsum(counts) - counts
    tars = permutation(len(counts), (*seed, epoch, 0))
    samples = [int(first[tar]) + row for tar in tars for row in range(counts[tar])]
    cuts = [lane * len(samples) // lanes for lane in range(lanes + 1)]
    mixed = []
    for lane in range(lanes):
        own = samples[cuts[lane] : cuts[lane + 1]]
        num_windows = max(1, round(len(own) / max(1, shuffle // lanes)))
        pieces = [w * len(own) // num_windows for w in range(num_windows + 1)]
        mixed.append(
            [
                own[pieces[w] + i]
                for w in range(num_windows)
                for i in permutation(pieces[w + 1] - pieces[w], (*seed, epoch, 1, lane, w))
            ]
        )
    rounds = max(map(len, mixed))
    return [lane[step] for step in range(rounds) for lane in mixed if step < len(lane)]


@given(counts, lanes, shuffles, st.integers(0, 3))
def test_windowed_order_equals_the_slow_one(counts: np.ndarray, lanes: int, shuffle: int, epoch: int) -> None:
    order = WindowedOrder(counts, (5, 2), lanes=lanes, shuffle=shuffle)
    found = numbers(order, epoch)
    assert found == slow_order(counts, (5, 2), lanes, shuffle, epoch)
    assert sorted(found) == list(range(int(counts.sum())))


@given(counts, lanes, shuffles, st.data())
def test_any_place_can_be_asked_first(counts: np.ndarray, lanes: int, shuffle: int, data: st.DataObject) -> None:
    order = WindowedOrder(counts, (5, 2), lanes=lanes, shuffle=shuffle)
    epochs = {epoch: slow_order(counts, (5, 2), lanes, shuffle, epoch) for epoch in range(4)}
    for _ in range(20):
        epoch, place = data.draw(st.integers(0, 3)), data.draw(st.integers(0, order.size - 1))
        assert order.number(epoch, place) == epochs[epoch][place]


@given(counts, lanes, shuffles)
def test_the_tars_announced_are_those_of_the_next_window(counts: np.ndarray, lanes: int, shuffle: int) -> None:
    order = WindowedOrder(counts, (1,), lanes=lanes, shuffle=shuffle)
    ends = np.cumsum(counts)
    used: dict[tuple[int, int], set[int]] = {}
    announced: dict[tuple[int, int], set[int]] = {}
    for place in range(order.size):
        window = order.window_of(place)
        used.setdefault(window, set()).add(int(np.searchsorted(ends, order.number(0, place), side="right")))
        announced[window] = {tar for tar in order.tars_after(0, place) if counts[tar]}
    for lane, window in used:
        assert announced[lane, window] == used.get((lane, window + 1), set())


def test_a_lane_works_in_few_tars_and_lanes_in_different_ones() -> None:
    tars, per_tar, lanes, shuffle = 64, 50, 8, 400
    order = WindowedOrder(np.full(tars, per_tar), (0,), lanes=lanes, shuffle=shuffle)
    of_lane = [[order.number(0, place) // per_tar for place in range(lane, order.size, lanes)] for lane in range(lanes)]
    for lane in of_lane:
        assert len(set(lane)) == tars // lanes
        for step in range(0, len(lane), 50):
            assert len(set(lane[step : step + 50])) <= 2
    assert len(set().union(*map(set, of_lane))) == tars


@settings(max_examples=20)
@given(st.integers(30, 100), lanes)
def test_epochs_and_seeds_have_orders_of_their_own(size: int, lanes: int) -> None:
    counts = np.array([size // 3, size - size // 3])
    whole = [numbers(WholeOrder(size, (seed,)), epoch) for seed in (0, 1) for epoch in (0, 1)]
    windowed = [
        numbers(WindowedOrder(counts, (seed,), lanes=lanes, shuffle=size), epoch) for seed in (0, 1) for epoch in (0, 1)
    ]
    for orders in (whole, windowed):
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert len(set(map(tuple, orders))) == len(orders)


@pytest.mark.parametrize("place", [0, 1, 10**9, 2 * 10**9 - 1])
def test_two_billion_samples_in_two_hundred_thousand_tars_need_no_list_of_them(place: int) -> None:
    order = WindowedOrder(np.full(200_000, 10_000), (0,), lanes=16, shuffle=SHUFFLE)
    number = order.number(3, place)
    assert 0 <= number < 2 * 10**9
    assert sum(kept.size for _, kept in order._windows.values()) <= 2 * SHUFFLE
    assert 1 <= len(order.tars_after(3, 0)) <= 3
