"""A rank of an elastic run, for torchrun: the second rank dies by kill -9 after the first checkpoint, once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from opencloc.config import TrainConfig, from_json
from opencloc.train.checkpoint import list_checkpoints
from opencloc.train.loop import train


def die_after_the_first_checkpoint(out: Path) -> None:
    while not list_checkpoints(out / "checkpoints"):
        time.sleep(0.002)
    (out / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    config = from_json(TrainConfig, Path(sys.argv[1]).read_text(), sys.argv[1])
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        threading.Thread(target=die_after_the_first_checkpoint, args=(Path(config.out),), daemon=True).start()
    train(config)
