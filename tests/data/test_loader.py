"""Loader processes end with the process that they load for."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from opencloc.data.loader import make_loader

NUM_WORKERS = 2


class Large(Dataset[np.ndarray]):
    """Examples larger than a pipe holds, so that a worker waits until they are read; workers leave their number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, number: int) -> np.ndarray:
        (self.folder / str(os.getpid())).touch()
        return np.full(1_000_000, number)


def test_batches_come_in_order_whatever_the_number_of_workers(tmp_path: Path) -> None:
    batches = [[0, 1], [2], [3, 4]]
    for num_workers in (0, 2):
        loaded = make_loader(Large(tmp_path), batches, num_workers=num_workers, ahead=4)
        assert [[int(example[0]) for example in batch] for batch in loaded] == batches


def test_workers_of_a_killed_process_end(tmp_path: Path) -> None:
    reading, writing = os.pipe()  # workers inherit its end; it can be read when the last of them is gone

    def load_and_die() -> None:
        os.close(reading)
        made = iter(make_loader(Large(tmp_path), [[i] for i in range(100)], num_workers=NUM_WORKERS))
        for _ in range(2 * NUM_WORKERS):
            next(made)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=load_and_die)
    process.start()
    os.close(writing)
    process.join()
    assert wait([reading], timeout=60), "workers go on"
    os.close(reading)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == NUM_WORKERS
