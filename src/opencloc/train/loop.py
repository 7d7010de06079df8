"""THE training loop: `train(config)` runs a whole pre-training from a configuration, or goes on where it stopped.

Read it top to bottom.  The run's folder holds config.json, log.jsonl (one JSON object per logged step), checkpoints/
and, at the end, model/.  Running the same configuration again resumes from the newest checkpoint; the result equals
the uninterrupted run bit for bit on CPU.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from opencloc.config import LossConfig, TrainConfig, from_json, to_json
from opencloc.data.loader import Batch, TrainingExamples, training_batches
from opencloc.data.source import open_source
from opencloc.loss import ClocLoss, cloc_loss
from opencloc.model.cloc import ClocModel, ClocOutput
from opencloc.train.build import build_model
from opencloc.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, save_model
from opencloc.train.log import RunLog
from opencloc.train.optim import learning_rate, make_optimizer


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); it has saved a checkpoint and can be resumed."""


def train(config: TrainConfig) -> Path:
    """Runs (or resumes) the training and returns the folder of the final model.

    Raises ValueError if the folder holds another run's configuration, `Interrupted` after Ctrl-C or SIGTERM.
    """
    # -- set-up ------------------------------------------------------------------------------------------------------
    out = Path(config.out)
    claim_folder(out, config)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers and forked workers do not mix
    bf16 = config.precision == "bf16" or (config.precision == "auto" and has_native_bf16(device))
    disable_progress_bar()  # transformers' own, one for every checkpoint
    checkpoints = out / "checkpoints"
    resume_from = next(reversed(list_checkpoints(checkpoints)), None)

    model, processor = build_model(config, resume_from)
    model.train()
    model.to(device)  # pyright: ignore[reportArgumentType]
    sources = [open_source(spec, image_px=processor.image_size) for spec in config.data.train]
    examples = TrainingExamples(
        sources,
        config.data.weights,
        num_regions=config.data.num_regions,
        image_size=processor.image_size,
        seed=config.seed,
    )
    optimizer = make_optimizer(model, config.optim)
    step, skipped = 0, Counter[str]()
    if resume_from is not None:
        state = load_checkpoint(resume_from, model, optimizer)
        step, skipped = state["step"], Counter(state["skipped"])
    batches = training_batches(
        examples,
        processor,
        batch_size=config.batch_size,
        start=step,
        stop=config.steps,
        num_workers=config.data.num_workers,
    )

    def save() -> None:
        state = {"step": step, "skipped": dict(skipped)}
        save_checkpoint(checkpoints, step, model, processor, optimizer, state, keep=config.keep_checkpoints)

    # -- the loop ----------------------------------------------------------------------------------------------------
    with RunLog(out, config, start=step) as log, stop_requests() as stop:
        while step < config.steps:
            started = time.perf_counter()
            batch = next(batches)
            skipped += batch.skipped
            batch = batch.to(device)
            waited = time.perf_counter() - started

            lr = learning_rate(step, config.steps, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, output = backward(model, batch, config.loss, config.micro_batch_size)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            log.step(step, loss, output, grad_norm, lr=lr, waited=waited, skipped=skipped)
            if step % config.checkpoint_every == 0 or step == config.steps:
                save()
            if stop.requested:
                save()
                raise Interrupted(f"stopped after step {step} of {config.steps}; run the same command again to go on")

    # -- the end -----------------------------------------------------------------------------------------------------
    save_model(out / "model", model, processor)
    return out / "model"


def backward(
    model: ClocModel, batch: Batch, config: LossConfig, micro_batch_size: int | None
) -> tuple[ClocLoss, ClocOutput]:
    """Loss of the batch; its gradients are added to the model's.

    In micro-batches the contrastive batch stays whole (gradient caching, Gao et al. 2021): embeddings of all
    micro-batches first, without a graph; the loss of the whole batch and its gradients with respect to them; then each
    micro-batch again, with a graph, fed with its share of those gradients.
    """
    if micro_batch_size is None or micro_batch_size >= len(batch.pixels):
        output = forward(model, batch, config)
        loss = cloc_loss(output, batch.boxes, batch.valid, batch.text_hash, config)
        check_finite(loss)
        loss.total.backward()
        return loss, output
    pieces = batch.split(micro_batch_size)
    with torch.no_grad():
        cached = [fields(forward(model, piece, config)) for piece in pieces]
    whole = {
        name: (torch.cat([c[name] for c in cached]) if value.ndim else value.clone()).requires_grad_()
        for name, value in cached[0].items()
    }
    output = ClocOutput(**whole)
    loss = cloc_loss(output, batch.boxes, batch.valid, batch.text_hash, config)
    check_finite(loss)
    loss.total.backward()
    for i, piece in enumerate(pieces):
        rows = slice(i * micro_batch_size, (i + 1) * micro_batch_size)
        parts = [
            (value * (grad[rows] if value.ndim else grad / len(pieces))).sum()
            for name, value in fields(forward(model, piece, config)).items()
            if (grad := whole[name].grad) is not None
        ]
        torch.stack(parts).sum().backward()
    return loss, output


def forward(model: ClocModel, batch: Batch, config: LossConfig) -> ClocOutput:
    """The model's output for a batch; without regions if they have no weight."""
    if config.region_weight == 0:
        return model(batch.pixels, batch.caption_ids)
    return model(batch.pixels, batch.caption_ids, batch.boxes, batch.text_ids, batch.text_index)


def fields(output: ClocOutput) -> dict[str, Tensor]:
    """The tensors of an output by name, without those that were not computed."""
    return {name: value for name, value in vars(output).items() if value is not None}


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_finite(loss: ClocLoss) -> None:
    """Raises FloatingPointError if the loss is NaN or infinite (checked on CPU only: a GPU would have to wait)."""
    if loss.total.device.type == "cpu" and not torch.isfinite(loss.total):
        parts = {k: v.item() for k, v in vars(loss).items() if v is not None}
        raise FloatingPointError(f"the loss is not finite: {parts}; lower optim.lr or raise optim.warmup_steps")


def claim_folder(out: Path, config: TrainConfig) -> None:
    """Writes config.json, or checks that the run found there is this one.

    What may differ on resuming: where and how it runs, not what is computed.  Raises ValueError naming the rest.
    """
    path = out / "config.json"
    if path.exists():
        free = {"out", "device", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard"}
        found = from_json(TrainConfig, path.read_text(), path)
        old, new = (flatten(asdict(replace(c, data=replace(c.data, num_workers=0)))) for c in (found, config))
        changed = [f"{k}: {old[k]!r} there, {new[k]!r} asked for" for k in old if k not in free and old[k] != new[k]]
        if changed:
            raise ValueError(
                f"{out} holds a run with another configuration; choose another --out.\n" + "\n".join(changed)
            )
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(to_json(config))
    os.replace(partial, path)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@dataclass
class StopRequest:
    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between steps; a second one stops at once."""
    stop = StopRequest()

    def handle(number: int, _frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
