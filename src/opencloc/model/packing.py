"""PackedTexts: many texts in few rows of tokens, so that short ones do not pay for the length of long ones.

A text tower whose attention is causal (CLIP's) can read several texts in one row, each with its own positions and blind
to its neighbours: every text gets the embedding that it gets alone.  Region texts have 3 to 5 tokens, start and end
included, captions some 40; padded to CLIP's 77 tokens, or to the longest of the batch, most of the tower's work is
padding.  Packed there is next to none, and a long text costs its own length only.  All rows have one length, so shapes
differ by the number of rows only, and captions and region texts go through the tower together.

The packing is done on the host; `opencloc.model.towers` says how a tower reads it.

Symbols: U texts, R rows, L tokens per row, W tokens of the longest text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

ALIGNMENT = 8  # tokens, of the rows: what attention kernels like


@dataclass(frozen=True, kw_only=True)
class PackedTexts:
    """U texts in R rows of L tokens.  `len` gives U."""

    input_ids: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R L"]  # 0 at the first token of every text, and at every token of padding
    end: Int[Tensor, " U"]  # where the end-of-text token of each text lies in the flattened rows
    max_length: int  # most tokens that a text may have
    pad_id: int

    def __len__(self) -> int:
        return len(self.end)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> PackedTexts:
        """The same texts on `device`."""
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return PackedTexts(**moved, max_length=self.max_length, pad_id=self.pad_id)

    def attention(self) -> Bool[Tensor, "R 1 L L"]:
        """What each token may look at: itself and what comes before it in its own text."""
        text = (self.position_ids == 0).cumsum(1)
        return (text[:, :, None] == text[:, None, :]).tril()[:, None]

    def select(self, rows: Int[Tensor, " K"]) -> PackedTexts:
        """The texts of these numbers, in this order, packed anew.  For the host: on a GPU it waits for the device."""
        sequences = self._sequences()
        chosen = [sequences[i] for i in rows.tolist()]
        return pack(chosen, max_length=self.max_length, pad_id=self.pad_id)

    def padded(self) -> Int[Tensor, "U W"]:
        """The texts one to a row, padded to the longest."""
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids in self._sequences()], batch_first=True, padding_value=self.pad_id
        )

    def _sequences(self) -> list[list[int]]:
        end = self.end.cpu()
        start = end - self.position_ids.cpu().flatten()[end]
        flat = self.input_ids.flatten().tolist()
        return [flat[a : b + 1] for a, b in zip(start.tolist(), end.tolist(), strict=True)]


def pack(sequences: Sequence[Sequence[int]], *, max_length: int, pad_id: int) -> PackedTexts:
    """Token sequences, each ending with its end-of-text token, in as few rows as best-fit decreasing finds.

    A row holds two texts of `max_length`, the longest that a text may be: three captions of CLIP's usual 50 tokens.
    Raises ValueError for a sequence that is empty or longer than `max_length`, and if there is none at all.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths:
        raise ValueError("there are no texts to pack")
    if min(lengths) == 0 or max(lengths) > max_length:
        raise ValueError(f"texts must have 1 to {max_length} tokens, got {min(lengths)} to {max(lengths)}")
    row_length = -(-2 * max_length // ALIGNMENT) * ALIGNMENT
    num_rows, start = _best_fit(lengths, row_length)
    position = np.concatenate([np.arange(length) for length in lengths])
    place = np.repeat(start, lengths) + position
    input_ids = np.full(num_rows * row_length, pad_id)
    position_ids = np.zeros(num_rows * row_length, dtype=np.int64)
    input_ids[place], position_ids[place] = np.concatenate(sequences), position
    return PackedTexts(
        input_ids=torch.from_numpy(input_ids).reshape(num_rows, row_length),
        position_ids=torch.from_numpy(position_ids).reshape(num_rows, row_length),
        end=torch.tensor(start) + torch.tensor(lengths) - 1,
        max_length=max_length,
        pad_id=pad_id,
    )


def join(first: PackedTexts, second: PackedTexts) -> PackedTexts:
    """The texts of both, those of `first` before those of `second`.  For any device: nothing is read back."""
    return PackedTexts(
        input_ids=torch.cat([first.input_ids, second.input_ids]),
        position_ids=torch.cat([first.position_ids, second.position_ids]),
        end=torch.cat([first.end, second.end + first.input_ids.numel()]),
        max_length=first.max_length,
        pad_id=first.pad_id,
    )


def _best_fit(lengths: Sequence[int], row_length: int) -> tuple[int, list[int]]:
    """(number of rows, where each text starts in the flattened rows): longest first, each where least room is left."""
    rows_with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # by number of free tokens
    start = [0] * len(lengths)
    num_rows = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((n for n in range(lengths[i], row_length + 1) if rows_with_room[n]), None)
        if room is None:
            row, room, num_rows = num_rows, row_length, num_rows + 1
        else:
            row = rows_with_room[room].pop()
        start[i] = row * row_length + row_length - room
        rows_with_room[room - lengths[i]].append(row)
    return num_rows, start
