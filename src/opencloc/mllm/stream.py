"""The training stream of conversations: as that of pre-training (`data.stream`), but for what is made of a sample."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opencloc.data.loader import make_loader
from opencloc.data.stream import MAX_BAD_IN_A_ROW, TrainingExamples, _Rows
from opencloc.errors import BadSample
from opencloc.mllm.processor import RegionLlavaProcessor, Row
from opencloc.mllm.readers import Asked
from opencloc.mllm.templates import Kind


@dataclass(frozen=True, kw_only=True)
class Made:
    """A row, and the reasons of the conversations that it had to replace."""

    row: Row
    skipped: list[str]


class ConversationExamples(TrainingExamples):
    """Position -> row: a pure function of the seed and the position."""

    def __init__(
        self,
        sources: Sequence[Any],
        weights: Sequence[float],
        processor: RegionLlavaProcessor,
        *,
        questions: Sequence[Kind],
        max_turns: int,
        seed: int,
        lanes: int = 16,
    ) -> None:
        super().__init__(sources, weights, num_regions=1, image_size=processor.image_size, seed=seed, lanes=lanes)
        self.processor = processor
        self._asked = [Asked(source, questions, max_turns) for source in sources]

    def __getitem__(self, position: int) -> Any:
        skipped: list[str] = []
        for attempt in range(MAX_BAD_IN_A_ROW):
            which, number = self.locate(position, attempt)
            try:
                rng = random.Random((self.seed << 64) + position)
                conversation = self._asked[which].conversation(number, rng)
                row = self.processor.encode(
                    conversation, for_training=True, where=f"{self.sources[which]!r}, number {number}"
                )
                return Made(row=row, skipped=skipped)
            except BadSample as error:
                skipped.append(error.reason)
                last = error
        raise RuntimeError(f"{MAX_BAD_IN_A_ROW} unusable conversations in a row, the last: {last}") from last  # pyright: ignore


def training_rows(
    examples: ConversationExamples,
    *,
    batch_size: int,
    start: int,
    stop: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[list[Row], Counter[str]]]:
    """This rank's rows of the batches number `start` ... `stop` - 1 of the stream, and what was skipped.

    Raises ValueError if `batch_size` is no multiple of `world_size`.
    """
    if world_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size must be a multiple of the number of ranks ({world_size}), got {batch_size}")
    order = _Rows(batch_size, examples.lanes, start, stop, rank, world_size)
    loader = make_loader(examples, order, num_workers=num_workers, ahead=16)
    parts = iter(loader)  # here, so that the workers begin before the first batch is asked for
    return (_joined([next(parts) for _ in order.parts]) for _ in range(start, stop))


def micro_batches(
    rows: list[Row], size: int | None, processor: RegionLlavaProcessor, device: torch.device
) -> Iterator[Any]:
    """The rows in padded batches of `size`, on the device, those of like length together."""
    size = size or len(rows)
    if size < len(rows):
        rows = sorted(rows, key=lambda row: len(row.input_ids))
    for first in range(0, len(rows), size):
        yield processor.pad(rows[first : first + size], for_training=True).to(device)


def _joined(parts: list[list[Made]]) -> tuple[list[Row], Counter[str]]:
    made = [one for part in parts for one in part]
    return [one.row for one in made], Counter(reason for one in made for reason in one.skipped)
