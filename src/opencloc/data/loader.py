"""Training batches from sources: which sample at which position, M regions per image, collation, workers.

Owns the order.  Everything about position p of the stream (source, sample, caption, regions) is a pure function of
(seed, p), so a run resumed at step k sees exactly the batches k, k + 1, ... of the uninterrupted run, with any number
of workers.

Symbols: B images, M regions per image, U distinct region texts of the batch, T tokens of a caption, W of a region text,
S side of the square.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opencloc.boxes import Letterbox, letterbox_image
from opencloc.data.sample import BadSample, Sample, Source
from opencloc.model.processor import ClocProcessor

MAX_BAD_IN_A_ROW = 50  # positions tried before a run stops: by then the data, not a sample, is broken
BLOCK = 1000  # positions over which the shares of the sources are exact


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch.  Boxes are in the frame of the letterboxed square."""

    pixels: Float[Tensor, "B 3 S S"]
    caption_ids: Int[Tensor, "B T"]
    boxes: Float[Tensor, "B M 4"]
    valid: Bool[Tensor, "B M"]  # False where the image has fewer than M regions
    text_ids: Int[Tensor, "U W"]  # distinct region texts
    text_index: Int[Tensor, "B M"]  # row of text_ids; 0 where not valid
    text_hash: Int[Tensor, "B M"]  # identity of the text across batches and processes
    skipped: Counter[str] = field(default_factory=Counter)  # samples that could not be used, by reason

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**moved, skipped=self.skipped)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of `size` images; distinct texts are kept per micro-batch."""
        pieces = []
        for start in range(0, len(self.pixels), size):
            rows = slice(start, start + size)
            used, index = torch.unique(self.text_index[rows], return_inverse=True)
            pieces.append(
                Batch(
                    pixels=self.pixels[rows],
                    caption_ids=self.caption_ids[rows],
                    boxes=self.boxes[rows],
                    valid=self.valid[rows],
                    text_ids=self.text_ids[used],
                    text_index=index,
                    text_hash=self.text_hash[rows],
                )
            )
        return pieces


@dataclass(frozen=True, kw_only=True)
class _Example:
    """One sample made ready in a worker: everything but tokenisation."""

    square: np.ndarray  # (S, S, 3) uint8
    caption: str
    boxes: np.ndarray  # (M, 4) in the square
    texts: list[str]  # at most M
    skipped: list[str]  # reasons of positions that had to be replaced


class TrainingExamples(Dataset[_Example]):
    """Position -> example.  Draws sources by their shares, permutes finite ones per epoch, replaces bad samples."""

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], *, num_regions: int, image_size: int, seed: int
    ) -> None:
        self.sources, self.num_regions, self.image_size, self.seed = sources, num_regions, image_size, seed
        shares = np.asarray(weights or [1.0] * len(sources))
        bounds = np.round(np.cumsum(shares / shares.sum()) * BLOCK).astype(int)
        self.counts = np.diff(bounds, prepend=0)  # positions of each source per block
        if (self.counts == 0).any():
            raise ValueError(f"data.weights {tuple(weights)}: a source with a share under 1/{BLOCK} is never drawn")
        for source in sources:
            if source.size == 0:
                raise ValueError(f"{source!r} holds no samples")

    def locate(self, position: int) -> tuple[int, int]:
        """(which source, number of the sample in it) of a position."""
        block, slot = divmod(position, BLOCK)
        slot = int(_permutation(BLOCK, (self.seed, 1, block))[slot])
        which = int(np.searchsorted(np.cumsum(self.counts), slot, side="right"))
        nth = block * int(self.counts[which]) + slot - int(self.counts[:which].sum())
        size = self.sources[which].size
        if size is None:
            return which, nth
        epoch, place = divmod(nth, size)
        return which, int(_permutation(size, (self.seed, 2, which, epoch))[place])

    def __getitem__(self, position: int) -> _Example:
        skipped: list[str] = []
        for attempt in range(MAX_BAD_IN_A_ROW):
            # a bad sample is replaced by one from far away in the stream: the same one in every run
            which, number = self.locate(position + attempt * 7_919_000)
            try:
                sample = self.sources[which][number]
                return self._example(sample, np.random.default_rng((self.seed, 3, position)), skipped)
            except BadSample as error:
                skipped.append(error.reason)
                last = error
        raise RuntimeError(f"{MAX_BAD_IN_A_ROW} unusable samples in a row, the last: {last}") from last  # pyright: ignore

    def _example(self, sample: Sample, rng: np.random.Generator, skipped: list[str]) -> _Example:
        caption = choose_caption(sample, rng)
        if len(sample.boxes) > self.num_regions:
            chosen = np.sort(rng.choice(len(sample.boxes), self.num_regions, replace=False))
        else:
            chosen = np.arange(len(sample.boxes))
        boxes = np.tile(np.array([0, 0, 1, 1], dtype=np.float32), (self.num_regions, 1))
        letterbox = Letterbox(width_px=sample.image.width, height_px=sample.image.height)
        boxes[: len(chosen)] = letterbox.to_square(sample.boxes[chosen])
        return _Example(
            square=np.asarray(letterbox_image(sample.image, self.image_size)),
            caption=caption,
            boxes=boxes,
            texts=[sample.texts[i] for i in chosen],
            skipped=skipped,
        )


def choose_caption(sample: Sample, rng: np.random.Generator) -> str:
    """One of the captions at random; else the alt text; else the region texts in a row.

    Raises `BadSample` if there is no text at all.
    """
    captions = [caption for caption in sample.captions if caption.strip()]
    if captions:
        return captions[rng.integers(len(captions))]
    if sample.alt_text and sample.alt_text.strip():
        return sample.alt_text
    if sample.texts:
        return ", ".join(dict.fromkeys(sample.texts))
    raise BadSample("no caption, alt text or region text", sample.key)


def text_identity(text: str) -> int:
    """A 64-bit hash of a region text, the same in every process; case and outer blanks do not count."""
    digest = hashlib.blake2b(text.strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def collate(examples: Sequence[_Example], processor: ClocProcessor) -> Batch:
    """Examples as one batch; every distinct region text becomes one row of `text_ids`."""
    num_regions = len(examples[0].boxes)
    rows: dict[str, int] = {}
    index = torch.zeros(len(examples), num_regions, dtype=torch.long)
    hashes = torch.zeros(len(examples), num_regions, dtype=torch.long)
    valid = torch.zeros(len(examples), num_regions, dtype=torch.bool)
    for b, example in enumerate(examples):
        for m, text in enumerate(example.texts):
            index[b, m] = rows.setdefault(text.strip().lower(), len(rows))
            hashes[b, m] = text_identity(text)
            valid[b, m] = True
    return Batch(
        pixels=processor.normalize(np.stack([example.square for example in examples])),
        caption_ids=processor.tokenize([example.caption for example in examples]),
        boxes=torch.from_numpy(np.stack([example.boxes for example in examples])),
        valid=valid,
        text_ids=processor.tokenize(list(rows) or ["none"]),  # a row must exist for text_index 0 to point at
        text_index=index,
        text_hash=hashes,
        skipped=Counter(reason for example in examples for reason in example.skipped),
    )


class _Collate:
    """`collate` with its processor: a class so that it crosses to worker processes."""

    def __init__(self, processor: ClocProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[_Example]) -> Batch:
        return collate(examples, self.processor)


class _Positions:
    """The positions of batch k, k + 1, ..., up to `stop` batches."""

    def __init__(self, batch_size: int, start: int, stop: int) -> None:
        self.batch_size, self.start, self.stop = batch_size, start, stop

    def __iter__(self) -> Iterator[range]:
        return (range(k * self.batch_size, (k + 1) * self.batch_size) for k in range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop - self.start


def training_batches(
    examples: TrainingExamples, processor: ClocProcessor, *, batch_size: int, start: int, stop: int, num_workers: int
) -> Iterator[Batch]:
    """Batches number `start` ... `stop` - 1 of the stream, made by `num_workers` processes (0: in this one)."""
    loader = DataLoader(
        examples,
        batch_sampler=_Positions(batch_size, start, stop),  # pyright: ignore[reportArgumentType]
        collate_fn=_Collate(processor),
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


@lru_cache(maxsize=8)
def _permutation(size: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)
