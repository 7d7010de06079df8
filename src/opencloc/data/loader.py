"""Loader processes: torch's, but for that they end when the process that they load for does, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import DataLoader, Dataset


def make_loader(
    examples: Dataset[Any],
    batches: Iterable[Sequence[int]],
    collate: Callable[[list[Any]], Any] = list,
    *,
    num_workers: int,
    ahead: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Loads the examples of every batch in turn, by `num_workers` processes (0: this one).

    `collate` makes of them what the loader gives.  All workers together make `ahead` batches in advance, each at least
    two.  `pin_memory`: the tensors in them are ready to go to a GPU.
    """
    return DataLoader(
        examples,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_end_with_parent,
        prefetch_factor=max(2, ahead // num_workers) if num_workers else None,
        pin_memory=pin_memory,
    )


def _end_with_parent(_worker: int) -> None:
    """Has this worker end with its parent.

    torch's notices by itself that the parent is gone, but then waits to be rid of its last batch, which nobody reads:
    for ever, if the batch is larger than what a pipe holds.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_await_end, args=(parent.sentinel,), daemon=True).start()


def _await_end(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
