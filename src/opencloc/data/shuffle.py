"""In which order the samples of a source come, epoch by epoch: arithmetic on counts, nothing is read.

Both kinds are pure functions of (seed, epoch, place) and give every sample once per epoch.

`WholeOrder` permutes all samples.  `WindowedOrder`, for more tars than can be open at once, permutes the tars and cuts
their samples, in that order, into `lanes` stretches of equal length.  Consecutive places go round the lanes; inside a
lane, windows of some `SHUFFLE / lanes` samples are permuted.  So only the tars under one window per lane are in use at
any time, a reader of some lanes needs only their tars, and a sample is found in O(log tars) without a list of all.

Symbols: N samples, L lanes, e epoch.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cachetools import LRUCache

SHUFFLE = 131_072  # samples that the loader shuffles with one another; sources up to this size are permuted whole


def permutation(size: int, seed: Iterable[int]) -> np.ndarray:
    """A permutation of 0 ... size - 1."""
    return np.random.default_rng(tuple(seed)).permutation(size)


class WholeOrder:
    """Places 0 ... N - 1 of an epoch -> numbers of samples, by one permutation per epoch."""

    def __init__(self, size: int, seed: tuple[int, ...]) -> None:
        self.size, self._seed = size, seed
        self._kept = LRUCache[int, np.ndarray](2)  # by epoch

    def number(self, epoch: int, place: int) -> int:
        """The number of a sample."""
        if epoch not in self._kept:
            self._kept[epoch] = permutation(self.size, (*self._seed, epoch))
        return int(self._kept[epoch][place])


class WindowedOrder:
    """Places 0 ... N - 1 of an epoch -> numbers of samples, tar by tar in `lanes` lanes.

    `counts`: samples of every tar.  `shuffle`: samples shuffled with one another, over all lanes.
    """

    def __init__(self, counts: np.ndarray, seed: tuple[int, ...], *, lanes: int, shuffle: int) -> None:
        self.size, self.lanes, self._seed = int(counts.sum()), lanes, seed
        self._counts, self._window = counts, max(1, shuffle // lanes)
        self._starts = np.cumsum(counts) - counts  # number of the first sample of every tar
        self._epochs = LRUCache[int, tuple[np.ndarray, np.ndarray]](2)  # permuted tars, ends of their samples
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}  # of every lane: (epoch, window), permutation

    def number(self, epoch: int, place: int) -> int:
        """The number of a sample."""
        lane, start, window, (first, last), step = self._find(place)
        kept = self._windows.get(lane)
        if kept is None or kept[0] != (epoch, window):
            order = permutation(last - first, (*self._seed, epoch, 1, lane, window))
            kept = self._windows[lane] = ((epoch, window), order)
        tars, ends = self._tars(epoch)
        along = start + first + int(kept[1][step - first])  # among the samples of the permuted tars
        which = int(np.searchsorted(ends, along, side="right"))
        tar = int(tars[which])
        return int(self._starts[tar]) + along - (int(ends[which - 1]) if which else 0)

    def window_of(self, place: int) -> tuple[int, int]:
        """(lane, number of the window in it) of a place."""
        lane, _, window, _, _ = self._find(place)
        return lane, window

    def tars_after(self, epoch: int, place: int) -> list[int]:
        """The tars of the window after that of a place in its lane; none after the last."""
        _, start, window, (_, first), _ = self._find(place)
        size = self._lane_start(self._lane_of(place) + 1) - start
        if first == size:
            return []
        tars, ends = self._tars(epoch)
        last = (window + 2) * size // self._num_windows(size)
        low, high = np.searchsorted(ends, [start + first, start + last - 1], side="right")
        return tars[low : high + 1].tolist()

    def _lane_start(self, lane: int) -> int:
        return lane * self.size // self.lanes

    def _lane_of(self, place: int) -> int:
        whole, rest = divmod(self.size, self.lanes)
        if place < whole * self.lanes:
            return place % self.lanes
        # The last round: `rest` of the lanes are longer by one, the j-th of them is ceil((j + 1) L / rest) - 1.
        return -(-(place % self.lanes + 1) * self.lanes // rest) - 1

    def _num_windows(self, lane_size: int) -> int:
        return max(1, round(lane_size / self._window))

    def _find(self, place: int) -> tuple[int, int, int, tuple[int, int], int]:
        """(lane, its start, number of the window in it, that window's first and last + 1 step, step) of a place."""
        lane, step = self._lane_of(place), place // self.lanes
        start = self._lane_start(lane)
        size = self._lane_start(lane + 1) - start
        windows = self._num_windows(size)
        window = ((step + 1) * windows - 1) // size  # the last one that begins at or before the step
        return lane, start, window, (window * size // windows, (window + 1) * size // windows), step

    def _tars(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            tars = permutation(len(self._counts), (*self._seed, epoch, 0))
            self._epochs[epoch] = (tars, np.cumsum(self._counts[tars]))
        return self._epochs[epoch]
