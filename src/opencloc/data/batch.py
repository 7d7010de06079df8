"""Batches for training, put together from samples made ready.

`collate` (in a worker) makes a part of some rows, its images still bytes.  `join` (in the training process) makes the
parts into one batch on its device and normalises the images there.

Symbols: B images, M regions per image, U distinct region texts, T tokens of a caption, W of a region text, S side of
the square, K patches kept of an image.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from opencloc.model.outputs import ImageFeatures
from opencloc.model.processor import ClocProcessor
from opencloc.texts import canonical


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample made ready: everything but tokenisation."""

    square: np.ndarray | None  # (S, S, 3) uint8
    caption: str
    boxes: np.ndarray  # (M, 4) in the square
    texts: list[str]  # at most M
    skipped: list[str]  # reasons of the samples that had to be replaced by this one
    kept: list[int] | None = None  # numbers of the K patches that training looks at; None: all
    features: ImageFeatures | None = None  # of this one image, in place of the square


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch, or a part of it.  Boxes are in the frame of the letterboxed square.

    It has either pixels or features.
    """

    pixel_values: Float[Tensor, "B 3 S S"] | UInt8[Tensor, "B S S 3"] | None  # bytes in a part, before `join`
    input_ids: Int[Tensor, "B T"]
    boxes: Float[Tensor, "B M 4"]
    valid: Bool[Tensor, "B M"]  # False where the image has fewer than M regions
    text_ids: Int[Tensor, "U W"]  # distinct region texts
    text_index: Int[Tensor, "B M"]  # row of text_ids; 0 where not valid
    text_hash: Int[Tensor, "B M"]  # identity of the text across batches and processes
    skipped: Counter[str] = field(default_factory=Counter)  # samples that could not be used, by reason
    kept: Int[Tensor, "B K"] | None = None  # numbers of the patches that are looked at; None: all
    features: ImageFeatures | None = None  # of the frozen vision tower, stored; float16 in a part

    def __len__(self) -> int:
        return len(self.boxes)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (the loader calls this by name)."""
        pinned = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **pinned, features=self.features and self.features.map(Tensor.pin_memory))

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of `size` images; distinct texts are kept per micro-batch."""
        pieces = []
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            used, index = torch.unique(self.text_index[rows], return_inverse=True)
            names = ["pixel_values", "input_ids", "boxes", "valid", "text_hash", "kept"]
            cut: dict[str, Any] = {
                name: None if (value := getattr(self, name)) is None else value[rows] for name in names
            }
            features = self.features and self.features.map(lambda x, rows=rows: x[rows])
            pieces.append(Batch(**cut, text_ids=self.text_ids[used], text_index=index, features=features))
        return pieces


def text_identity(text: str) -> int:
    """A 64-bit hash of a region text's canonical form, the same in every process."""
    digest = hashlib.blake2b(canonical(text).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def collate(examples: Sequence[Example], processor: ClocProcessor) -> Batch:
    """Examples as rows of a batch; every distinct region text becomes one row of `text_ids`.

    All of them have a square, or all have features.
    """
    num_regions = len(examples[0].boxes)
    rows: dict[str, int] = {}
    index, hashes = np.zeros((2, len(examples), num_regions), dtype=np.int64)
    valid = np.zeros((len(examples), num_regions), dtype=bool)
    for b, example in enumerate(examples):
        for m, text in enumerate(example.texts):
            index[b, m] = rows.setdefault(canonical(text), len(rows))
            hashes[b, m] = text_identity(text)
            valid[b, m] = True
    squares = [example.square for example in examples if example.square is not None]
    features = [example.features for example in examples if example.features is not None]
    return Batch(
        pixel_values=torch.from_numpy(np.stack(squares)) if squares else None,
        input_ids=processor.tokenize([example.caption for example in examples]),
        boxes=torch.from_numpy(np.stack([example.boxes for example in examples])),
        valid=torch.from_numpy(valid),
        text_ids=processor.tokenize(list(rows) or ["none"]),  # a row must exist for text_index 0 to point at
        text_index=torch.from_numpy(index),
        text_hash=torch.from_numpy(hashes),
        skipped=Counter(reason for example in examples for reason in example.skipped),
        kept=torch.tensor([example.kept for example in examples]) if examples[0].kept is not None else None,
        features=ImageFeatures.cat(features) if features else None,
    )


def join(parts: Sequence[Batch], processor: ClocProcessor, device: torch.device) -> Batch:
    """The parts as one batch on `device`, the same as if their examples had been collated at once."""
    pad_id = processor.tokenizer.pad_token_id
    text_ids, text_index = _merge_texts(parts, pad_id)
    squares = [part.pixel_values.to(device, non_blocking=True) for part in parts if part.pixel_values is not None]
    features = [
        part.features.map(lambda x: x.to(device, non_blocking=True).float())
        for part in parts
        if part.features is not None
    ]
    names = ["boxes", "valid", "text_hash", *(["kept"] if parts[0].kept is not None else [])]
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Batch(
        pixel_values=processor.normalize(torch.cat(squares)) if squares else None,
        input_ids=_stack([part.input_ids for part in parts], pad_id).to(device),
        text_ids=text_ids.to(device),
        text_index=text_index.to(device),
        **{name: value.to(device) for name, value in whole.items()},
        skipped=sum((part.skipped for part in parts), Counter()),
        features=ImageFeatures.cat(features) if features else None,
    )


def _merge_texts(parts: Sequence[Batch], pad_id: int) -> tuple[Int[Tensor, "U W"], Int[Tensor, "B M"]]:
    """`text_ids` and `text_index` over all parts; a text that several have becomes one row, in order of appearance."""
    valid = torch.cat([part.valid for part in parts])
    with_texts = [part for part in parts if part.valid.any()]
    if len(parts) == 1 or not with_texts:
        return parts[0].text_ids, torch.cat([part.text_index for part in parts])
    starts = np.cumsum([0, *(len(part.text_ids) for part in with_texts[:-1])]).tolist()
    rows = torch.cat([part.text_index[part.valid] + start for part, start in zip(with_texts, starts, strict=True)])
    hashes = torch.cat([part.text_hash[part.valid] for part in with_texts])
    _, first, which = np.unique(hashes.numpy(), return_index=True, return_inverse=True)
    order = np.argsort(first)  # of the distinct texts, by first appearance
    index = torch.zeros(valid.shape, dtype=torch.long)
    index[valid] = torch.from_numpy(np.argsort(order)[which])
    return _stack([part.text_ids for part in with_texts], pad_id)[rows[torch.from_numpy(first[order])]], index


def _stack(blocks: Sequence[Int[Tensor, "_ _"]], pad_id: int) -> Int[Tensor, "_ _"]:
    """Rows of token ids one below the other, padded to the widest."""
    width = max(block.shape[1] for block in blocks)
    return torch.cat([torch.nn.functional.pad(block, (0, width - block.shape[1]), value=pad_id) for block in blocks])
