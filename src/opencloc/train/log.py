"""What a run reports: log.jsonl always, progress on stderr, TensorBoard if asked for."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from opencloc.config import RunConfig
from opencloc.loss import ClocLoss
from opencloc.model.cloc import ClocOutput
from opencloc.progress import Meter


class RunLog:
    """Collects steps and writes one record per `log_every` of them.  Values are read off the device only then.

    `quiet`: nothing is written or shown, as on all ranks but the first.
    """

    def __init__(self, out: Path, config: RunConfig, *, start: int, quiet: bool = False) -> None:
        self.path, self.config, self.start, self.quiet = out / "log.jsonl", config, start, quiet
        self.waited, self.since_step, self.since = 0.0, start, time.perf_counter()
        self.meter = Meter(str(out), config.steps, unit="steps", start=start)
        self.tensorboard: Any = None

    def __enter__(self) -> RunLog:
        if self.quiet:
            return self
        self.file = self.path.open("a" if self.start else "w")  # what a run that came to nothing has left goes
        if self.config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("tensorboard=True needs the extra: pip install 'opencloc[tensorboard]'") from error
            self.tensorboard = SummaryWriter(str(self.path.with_name("tensorboard")))
        self.meter.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.quiet:
            return
        self.meter.__exit__()
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def step(self, waited: float) -> None:
        """Notes that a step is done, and how long it waited for its data in seconds."""
        self.waited += waited
        if not self.quiet:
            self.meter.advance()

    def due(self, step: int) -> bool:
        """Whether the step (counted from 1) is one whose record is written: the same answer on every rank."""
        return step % self.config.log_every == 0 or step == self.config.steps

    def write(
        self, step: int, loss: ClocLoss, output: ClocOutput, grad_norm: Tensor, *, lr: float, skipped: Counter[str]
    ) -> None:
        """Writes the record of a step of pre-training."""
        if self.quiet:
            return
        values = {name: value.item() for name, value in vars(loss).items() if value is not None}
        for name in ("logit_scale", "region_logit_scale"):
            if (value := getattr(output, name)) is not None:
                values[name] = value.item()
        record = self.write_values(step, values | {"grad_norm": grad_norm.item()}, lr=lr, skipped=skipped)
        parts = [f"{name} {record[name]:.3f}" for name in ("image_text", "region_text", "grounding") if name in record]
        self.meter.note = f"{record['images_per_s']:,.0f} images/s, loss {record['total']:.3f} ({', '.join(parts)})"

    def write_values(self, step: int, values: dict[str, float], *, lr: float, skipped: Counter[str]) -> dict[str, Any]:
        """Writes the record of a step with these values; the record, which is empty on quiet ranks."""
        if self.quiet:
            return {}
        now = time.perf_counter()
        seconds, steps = now - self.since, step - self.since_step
        record: dict[str, Any] = {"step": step, "images": step * self.config.batch_size, "lr": lr}
        record |= {name: round(value, 6) for name, value in values.items()}
        record["images_per_s"] = round(steps * self.config.batch_size / seconds, 2)
        record["data_wait"] = round(self.waited / seconds, 4)  # share of the time spent waiting for the loader
        record["skipped"] = dict(skipped)
        self.waited, self.since_step, self.since = 0.0, step, now
        try:
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if self.tensorboard is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self.tensorboard.add_scalar(name, value, step)
        return record
