"""The training stream: which sample at which position, M regions per image, replacement of bad samples, workers, ranks.

Everything about position p of the stream (source, sample, caption, regions) is a pure function of (seed, p).  So a run
resumed at step k sees exactly the batches k, k + 1, ... of the uninterrupted run, with any number of workers and ranks,
and every sample of a source comes once per epoch.

Position p belongs to lane p mod L.  The order inside a source (`shuffle`) keeps a lane in few tars at a time.  The rows
of a batch are sorted by lane, so that a rank, which has consecutive rows, needs only the tars of its lanes.

Symbols: B images of a batch over all ranks, M regions per image, L lanes, S side of the square.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from opencloc.boxes import Letterbox
from opencloc.data.batch import Batch, Example, collate, join
from opencloc.data.loader import make_loader
from opencloc.data.sample import Record, Sample, Source
from opencloc.data.shuffle import SHUFFLE, WholeOrder, WindowedOrder, permutation
from opencloc.data.sources.features import EncodedSample, Features
from opencloc.data.sources.mosaic import NamedSource
from opencloc.data.tars.shards import Shards
from opencloc.errors import BadSample
from opencloc.images import letterbox_array
from opencloc.model.processor import ClocProcessor

MAX_BAD_IN_A_ROW = 50  # samples tried for one position before a run stops: by then the data, not a sample, is broken
MIN_DRAWN = 1000  # samples drawn before the share of bad ones means anything
BLOCK = 1000  # positions of a lane over which the shares of the sources are exact
PART_ROWS = 128  # of a batch that a worker makes at a time
_PARTS_AHEAD = 32  # made in advance by all workers together (a waiting part is seven open files)


class TrainingExamples(Dataset[Example]):
    """Position -> example.  Draws sources by their shares, permutes finite ones per epoch, replaces bad samples.

    `lanes`: of tars, as many stretches of an epoch are read at once.  `keep_patches`: (K, N) keeps a random K of each
    image's N patches; None keeps all.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        *,
        num_regions: int,
        image_size: int,
        seed: int,
        lanes: int = 16,
        keep_patches: tuple[int, int] | None = None,
    ) -> None:
        self.sources, self.num_regions, self.image_size, self.seed = sources, num_regions, image_size, seed
        self.lanes, self.keep_patches = lanes, keep_patches
        self._whole = np.tile(np.array([0, 0, 1, 1], dtype=np.float32), (num_regions, 1))  # where there are no regions
        self.shares = np.asarray(weights or [1.0] * len(sources))
        self.shares = self.shares / self.shares.sum()
        self._ends = np.round(np.cumsum(self.shares) * BLOCK).astype(int)  # of each source's slots in a block
        self._counts = np.diff(self._ends, prepend=0)
        if (self._counts == 0).any():
            raise ValueError(f"data.weights {tuple(weights)}: a source with a share under 1/{BLOCK} is never drawn")
        for source in sources:
            if source.size == 0:
                raise ValueError(f"{source!r} holds no samples")
        self._orders = [self._order(which) for which in range(len(sources))]
        self._blocks: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}  # of every lane: the last block, drawn
        self._ahead: dict[tuple[int, int], tuple[int, int]] = {}  # (source, lane) -> (epoch, window) prefetched for

    def _order(self, which: int) -> WholeOrder | WindowedOrder | None:
        source, seed = self.sources[which], (self.seed, 2, which)
        if isinstance(source, Shards) and source.size > SHUFFLE:
            return WindowedOrder(source.counts, seed, lanes=self.lanes, shuffle=SHUFFLE)
        return WholeOrder(source.size, seed) if source.size is not None else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when the data would come in another order: other sources, sizes, names, shares, seed or lanes."""
        parts: list[Any] = [self.seed, self.lanes, *self.shares.tolist()]
        for source in map(_stored, self.sources):
            parts.append(source.size)
            if isinstance(source, Features):
                parts.append(source.info.vision_tower)
            if isinstance(source, Shards):
                parts += [source.counts.tobytes(), [url.rsplit("/", 1)[-1] for url in source.urls]]
            elif isinstance(source, NamedSource) and source.size is not None:
                parts += map(source.identity, range(source.size))
        return _digest(parts)

    @functools.cached_property
    def labels_fingerprint(self) -> str:
        """Changes when files with captions or regions have another size: the order is the same, the content is not."""
        return _digest([sorted(getattr(_stored(source), "label_sizes", dict)().items()) for source in self.sources])

    def draw(self, position: int) -> tuple[int, int]:
        """(which source, how many of its samples came before) of a position."""
        if len(self.sources) == 1:
            return 0, position
        along, lane = divmod(position, self.lanes)
        block, slot = divmod(along, BLOCK)
        if lane not in self._blocks or self._blocks[lane][0] != block:
            which = np.searchsorted(self._ends, permutation(BLOCK, (self.seed, 1, lane, block)), side="right")
            before = np.zeros(BLOCK, dtype=np.int64)  # how often the same source comes earlier in the block
            for source, count in enumerate(self._counts):
                before[which == source] = block * count + np.arange(count)
            self._blocks[lane] = (block, which, before)
        _, which, before = self._blocks[lane]
        return int(which[slot]), int(before[slot]) * self.lanes + lane

    def locate(self, position: int, attempt: int = 0) -> tuple[int, int]:
        """(which source, number of the sample in it) of a position.

        `attempt` k > 0 gives the k-th replacement, the same one in every run: of the same source, so that the shares
        stay, of the lanes beside it and some way on, so that the tars needed are in use anyway.
        """
        which, nth = self.draw(position)
        order, nth = self._orders[which], nth + attempt * (101 * self.lanes + 1)
        if order is None:
            return which, nth
        epoch, place = divmod(nth, order.size)
        if isinstance(order, WindowedOrder) and attempt == 0:
            self._prefetch(which, order, epoch, place)
        return which, order.number(epoch, place)

    def _prefetch(self, which: int, order: WindowedOrder, epoch: int, place: int) -> None:
        """Asks for the tars of the lane's next window when a window is entered."""
        lane, window = order.window_of(place)
        if self._ahead.get((which, lane)) != (epoch, window):
            self._ahead[which, lane] = (epoch, window)
            source = self.sources[which]
            assert isinstance(source, Shards)
            source.prefetch(order.tars_after(epoch, place))

    def __getitem__(self, position: int) -> Example:
        skipped: list[str] = []
        for attempt in range(MAX_BAD_IN_A_ROW):
            which, number = self.locate(position, attempt)
            try:
                sample = self.sources[which][number]
                return self._example(sample, random.Random((self.seed << 64) + position), skipped)
            except BadSample as error:
                skipped.append(error.reason)
                last = error
        raise RuntimeError(f"{MAX_BAD_IN_A_ROW} unusable samples in a row, the last: {last}") from last  # pyright: ignore

    def _example(self, sample: Sample | EncodedSample, rng: random.Random, skipped: list[str]) -> Example:
        caption = choose_caption(sample, rng)
        chosen = choose_regions(sample, self.num_regions, rng)
        boxes = self._whole.copy()
        if chosen:
            width, height = sample.size_px
            boxes[: len(chosen)] = Letterbox(width_px=width, height_px=height).to_square(sample.boxes[chosen])
        kept = None
        if self.keep_patches is not None:
            count, num_patches = self.keep_patches
            kept = sorted(rng.sample(range(num_patches), count))
        return Example(
            square=letterbox_array(sample.image, self.image_size) if isinstance(sample, Sample) else None,
            caption=caption,
            boxes=boxes,
            texts=[sample.texts[i] for i in chosen],
            skipped=skipped,
            kept=kept,
            features=None if isinstance(sample, Sample) else sample.features,
        )


def _stored(source: Source) -> Any:
    """The source whose files another one is made of: mosaics of photos, crops of regions."""
    inner = getattr(source, "photos", None) or getattr(source, "regions", None)
    return source if inner is None else _stored(inner)


def _digest(parts: list[Any]) -> str:
    return hashlib.blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def choose_regions(sample: Record, count: int, rng: random.Random) -> list[int]:
    """Numbers of `count` regions at random, of all where there are no more, ascending.

    Of regions with the same box, which are wordings of one thing, a random one: together they would be negatives of
    each other.
    """
    numbers = list(range(len(sample.boxes)))
    wordings: dict[bytes, list[int]] = {}
    for number in numbers:
        wordings.setdefault(sample.boxes[number].tobytes(), []).append(number)
    if len(wordings) < len(numbers):
        numbers = [rng.choice(same) for same in wordings.values()]
    return sorted(rng.sample(numbers, count) if len(numbers) > count else numbers)


def choose_caption(sample: Record, rng: random.Random) -> str:
    """One of the captions at random; else the alt text; else the region texts in a row.

    Raises `BadSample` if there is no text at all.
    """
    captions = [caption for caption in sample.captions if caption.strip()]
    if captions:
        return captions[rng.randrange(len(captions))]
    if sample.alt_text and sample.alt_text.strip():
        return sample.alt_text
    if sample.texts:
        return ", ".join(dict.fromkeys(sample.texts))
    raise BadSample("no caption, alt text or region text", sample.key)


def check_skipped(skipped: Counter[str], drawn: int, limit: float) -> None:
    """Raises `RuntimeError` naming reasons and counts if more than `limit` of the samples drawn could not be used.

    `drawn` counts the samples that were used; below `MIN_DRAWN` drawn in all nothing is concluded.
    """
    bad = skipped.total()
    if drawn + bad >= MIN_DRAWN and bad > limit * (drawn + bad):
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in skipped.most_common())
        raise RuntimeError(
            f"{bad:,} of {drawn + bad:,} samples could not be used, {bad / (drawn + bad):.1%} where "
            f"data.max_skipped_share allows {limit:.1%} ({reasons}); mend the data, or raise the limit and run again"
        )


class _Rows:
    """One rank's rows of batch k, k + 1, ..., up to `stop` batches, in parts, as positions of the stream."""

    def __init__(self, batch_size: int, lanes: int, start: int, stop: int, rank: int, world_size: int) -> None:
        self.batch_size, self.start, self.stop = batch_size, start, stop
        self.spread = lanes if batch_size % lanes == 0 else 1  # else rows are in the order of positions
        first, last = (r * batch_size // world_size for r in (rank, rank + 1))
        self.parts = [range(i, min(i + PART_ROWS, last)) for i in range(first, last, PART_ROWS)]

    def __iter__(self) -> Iterator[list[int]]:
        per_lane = self.batch_size // self.spread
        for begin in range(self.start * self.batch_size, self.stop * self.batch_size, self.batch_size):
            for rows in self.parts:
                yield [begin + (row % per_lane) * self.spread + row // per_lane for row in rows]

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.parts)


def training_batches(
    examples: TrainingExamples,
    processor: ClocProcessor,
    *,
    batch_size: int,
    start: int,
    stop: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """This rank's rows of the batches number `start` ... `stop` - 1 of the stream, on `device` (None: the CPU).

    Batch k holds the positions k * batch_size ... (k + 1) * batch_size - 1 whatever the number of ranks, of which a
    rank gets its consecutive share of the rows: the ranks' rows in order are the batch of a single process.
    `num_workers` processes make them (0: this one).

    Raises ValueError if `batch_size` is no multiple of `world_size`; the iterator raises RuntimeError when a worker
    dies or no usable sample is found.
    """
    if world_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size must be a multiple of the number of ranks ({world_size}), got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 ... {world_size - 1}, got {rank}")
    rows = _Rows(batch_size, examples.lanes, start, stop, rank, world_size)
    ahead = min(max(2 * len(rows.parts), 4 * num_workers), _PARTS_AHEAD)
    collate_part = functools.partial(collate, processor=processor)
    pin_memory = torch.cuda.is_available()
    loader = make_loader(examples, rows, collate_part, num_workers=num_workers, ahead=ahead, pin_memory=pin_memory)
    parts = iter(loader)  # here, so that the workers begin before the first batch is asked for
    whole = device or torch.device("cpu")
    return (join([next(parts) for _ in rows.parts], processor, whole) for _ in range(start, stop))
