"""What a run reports: log.jsonl always, a progress line for the person watching, TensorBoard if asked for."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from opencloc.config import TrainConfig
from opencloc.loss import ClocLoss
from opencloc.model.cloc import ClocOutput


class RunLog:
    """Collects steps and writes one record per `log_every` of them.  Values are read off the device only then.

    `quiet`: nothing is written or shown, as on all ranks but the first.
    """

    def __init__(self, out: Path, config: TrainConfig, *, start: int, quiet: bool = False) -> None:
        self.out, self.config, self.console, self.quiet = out, config, Console(stderr=True), quiet
        self.waited, self.since_step, self.since = 0.0, start, time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.progress.add_task(out.name, total=config.steps, completed=start, status="")
        self.tensorboard: Any = None

    def __enter__(self) -> RunLog:
        if self.quiet:
            return self
        self.file = (self.out / "log.jsonl").open("a")
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("tensorboard=True needs the extra: pip install 'opencloc[tensorboard]'") from error
            self.tensorboard = SummaryWriter(str(self.out / "tensorboard"))
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.quiet:
            return
        self.progress.stop()
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def step(self, step: int, waited: float) -> None:
        """Notes that a step (counted from 1) is done, and how long it waited for its data in seconds."""
        self.waited += waited
        self.progress.update(self.task, completed=step)

    def due(self, step: int) -> bool:
        """Whether the step is one whose record is written: the same answer on every rank."""
        return step % self.config.log_every == 0 or step == self.config.steps

    def write(
        self, step: int, loss: ClocLoss, output: ClocOutput, grad_norm: Tensor, *, lr: float, skipped: Counter[str]
    ) -> None:
        """Writes the record of a step."""
        if self.quiet:
            return
        now = time.perf_counter()
        seconds, steps = now - self.since, step - self.since_step
        record: dict[str, Any] = {"step": step, "images": step * self.config.batch_size, "lr": lr}
        record |= {name: round(value.item(), 6) for name, value in vars(loss).items() if value is not None}
        for name in ("logit_scale", "region_logit_scale"):
            if (value := getattr(output, name)) is not None:
                record[name] = round(value.item(), 4)
        record["grad_norm"] = round(grad_norm.item(), 4)
        record["images_per_s"] = round(steps * self.config.batch_size / seconds, 2)
        record["data_wait"] = round(self.waited / seconds, 4)  # share of the time spent waiting for the loader
        record["skipped"] = dict(skipped)
        self.waited, self.since_step, self.since = 0.0, step, now
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self.tensorboard.add_scalar(name, value, step)
        parts = [f"{name} {record[name]:.3f}" for name in ("image_text", "region_text", "grounding") if name in record]
        status = f"loss {record['total']:.3f} ({', '.join(parts)}) {record['images_per_s']:.0f} images/s"
        self.progress.update(self.task, status=status)
        if not self.console.is_terminal:
            left = (self.config.steps - step) * seconds / steps
            self.console.print(
                f"step {step}/{self.config.steps}  {status}  ETA {left:.0f} s", highlight=False, soft_wrap=True
            )
