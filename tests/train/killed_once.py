"""A training that dies by kill -9 after its first checkpoint, once; under torchrun its second rank does."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from opencloc.config import TrainConfig, from_json
from opencloc.train import loop
from opencloc.train.checkpoint import list_checkpoints, save_checkpoint


def save_and_die(root: Path, *arguments: Any, **options: Any) -> None:
    save_checkpoint(root, *arguments, **options)
    while not list_checkpoints(root):  # the first rank writes it
        time.sleep(0.002)
    (root.parent / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    config = from_json(TrainConfig, Path(sys.argv[1]).read_text(), sys.argv[1])
    if os.environ.get("RANK", "1") == "1" and not (Path(config.out) / "killed").exists():
        loop.save_checkpoint = save_and_die  # pyright: ignore[reportAttributeAccessIssue]
    loop.train(config)
