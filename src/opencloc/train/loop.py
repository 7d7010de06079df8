"""The training loop: `train(config)` runs a whole pre-training, or goes on where it stopped.

Read it top to bottom.  The run's folder holds config.json, log.jsonl (one JSON object per logged step), checkpoints/
and, at the end, model/.  Running the same configuration again resumes from the newest checkpoint; the result equals
the uninterrupted run bit for bit on CPU.

Under torchrun every process runs this same file: each has its share of the rows of every batch, the losses and their
gradients are the whole batch's, and the first rank alone writes (`opencloc.train.distributed`).
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from opencloc import files
from opencloc.config import LossConfig, RunConfig, TrainConfig, to_json
from opencloc.data.batch import Batch
from opencloc.data.sources.spec import open_source
from opencloc.data.stream import TrainingExamples, check_skipped, training_batches
from opencloc.devices import choose_device, computes_in_bf16
from opencloc.loss import ClocLoss, cloc_loss
from opencloc.model.cloc import ClocOutput
from opencloc.train.build import build_model, image_size
from opencloc.train.checkpoint import load_checkpoint, save_checkpoint, save_model, step_of
from opencloc.train.distributed import (
    ALONE,
    Agreement,
    Ranks,
    average_scalars,
    clip_gradients,
    gradient_sync,
    process_ranks,
    spread,
)
from opencloc.train.features import check_features
from opencloc.train.folder import run_folder
from opencloc.train.log import RunLog
from opencloc.train.optim import learning_rate, make_optimizer, set_learning_rate, set_trained_parts

Run = TypeVar("Run", bound=RunConfig)


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); it has saved a checkpoint and can be resumed."""


def train(config: TrainConfig) -> Path:
    """Runs (or resumes) the training and returns the folder of the final model; a finished run is left as it is.

    Raises ValueError if the folder holds another run or is in use, or the batch cannot be shared out among the ranks;
    FloatingPointError if the loss is no number any more; `Interrupted` after Ctrl-C or SIGTERM.
    """
    return in_its_folder(config, run)


def in_its_folder(config: Run, run: Callable[[Run, Ranks, torch.device, Path | None], None]) -> Path:
    """The folder of the final model, which `run(config, ranks, device, checkpoint)` leaves, if it is not there yet."""
    with process_ranks(choose_device(config.device)) as (ranks, device), run_folder(config, ranks) as found:
        final = Path(config.out) / "model"
        if found != final:
            run(config, ranks, device, found)
        elif ranks.is_first:
            tell(f"{config.out} is finished: nothing is left to do")
        return final


def set_up(config: RunConfig, ranks: Ranks, device: torch.device, resume_from: Path | None, unit: str) -> bool:
    """Says what begins or goes on, sets the process up, and returns whether it computes in bf16.

    `unit`: what a batch consists of.
    """
    if ranks.is_first and resume_from is not None:
        tell(f"resuming {config.out} from step {step_of(resume_from)} of {config.steps}")
    elif ranks.is_first:
        tell(f"training {config.out}: {config.steps:,} steps of {config.batch_size:,} {unit} on {device}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers and forked workers do not mix
    bf16 = computes_in_bf16(config.precision, device)
    if bf16 and device.type == "cuda":  # what stays float32, as the losses do, is multiplied as TF32
        torch.set_float32_matmul_precision("high")
    disable_progress_bar()  # transformers' own, one for every checkpoint
    return bf16


def run(config: TrainConfig, ranks: Ranks, device: torch.device, resume_from: Path | None) -> None:
    """The training as one of `ranks`, on `device`, from a checkpoint or the beginning."""
    # -- set-up ------------------------------------------------------------------------------------------------------
    out = Path(config.out)
    bf16 = set_up(config, ranks, device, resume_from, "images")
    side = image_size(config, resume_from)
    sources = [open_source(spec, image_px=side, features=True) for spec in config.data.train]
    model, processor = build_model(config, sources, resume_from)
    check_features(sources, config, model, processor, is_start=resume_from is None)
    set_trained_parts(model, config.optim.lr_factors)
    model.to(device)  # pyright: ignore[reportArgumentType]
    parallel = spread(model, ranks, config.sharding)  # computes; `model` holds the parameters
    num_patches = model.grid[0] * model.grid[1]
    examples = TrainingExamples(
        sources,
        config.data.weights,
        num_regions=config.data.num_regions,
        image_size=processor.image_size,
        seed=config.seed,
        lanes=config.data.lanes,
        keep_patches=(config.data.kept_patches(num_patches), num_patches) if config.data.patch_dropout else None,
    )
    optimizer = make_optimizer(model, config.optim)
    # between two frozen towers the image-text loss has no gradient: it is neither computed nor reported
    learns_captions = model.clip.logit_scale.requires_grad
    step, skipped = 0, Counter[str]()  # every rank counts what it skips; a checkpoint holds the sum
    if resume_from is not None:
        state = load_checkpoint(resume_from, model, optimizer)
        step, skipped = state["step"], Counter(state["skipped"] if ranks.is_first else ())
        check_data(state["data"], examples.fingerprint, resume_from)
        if ranks.is_first and state.get("labels") not in (None, examples.labels_fingerprint):
            warnings.warn(
                f"{resume_from}: captions or regions have changed since; the run goes on with them", stacklevel=2
            )
    batches = training_batches(
        examples,
        processor,
        batch_size=config.batch_size,
        start=step,
        stop=config.steps,
        num_workers=config.data.num_workers,
        rank=ranks.rank,
        world_size=ranks.size,
        device=device,
    )

    def all_skipped() -> Counter[str]:
        return sum(map(Counter, ranks.gather_json(skipped)), Counter())

    def save() -> None:
        state = {"step": step, "skipped": dict(all_skipped()), "data": examples.fingerprint}
        state["labels"] = examples.labels_fingerprint
        keep = config.keep_checkpoints
        save_checkpoint(out / "checkpoints", step, model, processor, optimizer, state, keep=keep, ranks=ranks)

    if ranks.is_first:  # all is open now: a start that failed before leaves the folder free
        files.write_text(out / "config.json", to_json(config))

    # -- the loop ----------------------------------------------------------------------------------------------------
    with RunLog(out, config, start=step, quiet=not ranks.is_first) as log, stop_requests(ranks) as stop:
        while step < config.steps:
            started = time.perf_counter()
            batch = next(batches)
            skipped += batch.skipped
            waited = time.perf_counter() - started

            lr = learning_rate(step, config.steps, config.optim)
            set_learning_rate(optimizer, lr)
            loss, output = backward(
                parallel, batch, config.loss, config.micro_batch_size, bf16=bf16, ranks=ranks, captions=learns_captions
            )
            average_scalars(parallel, ranks)
            grad_norm = clip_gradients(model, config.optim.grad_clip)
            optimizer.step()
            model.bound_scales()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            log.step(waited)
            if log.due(step):
                check_finite(step, vars(loss) | {"grad_norm": grad_norm})
                total = all_skipped()
                check_skipped(total, step * config.batch_size, config.data.max_skipped_share)
                log.write(step, loss, output, grad_norm, lr=lr, skipped=total)
            stopping = stop.agreed()
            if stopping or step % config.checkpoint_every == 0 or step == config.steps:
                check_finite(step, vars(loss) | {"grad_norm": grad_norm})
                save()
            if stopping:
                raise Interrupted(f"stopped after step {step} of {config.steps}; run the same command again to go on")

    # -- the end -----------------------------------------------------------------------------------------------------
    save_model(out / "model", model, processor, ranks)
    ranks.wait()


def backward(
    model: nn.Module,
    batch: Batch,
    config: LossConfig,
    micro_batch_size: int | None,
    *,
    bf16: bool = False,
    ranks: Ranks = ALONE,
    captions: bool = True,
) -> tuple[ClocLoss, ClocOutput]:
    """Loss of the batch (of all ranks); its gradients are added to the model's.  Without `captions`, of its regions.

    In micro-batches the contrastive batch stays whole (gradient caching, Gao et al. 2021): embeddings of all
    micro-batches first, without a graph; the loss of the whole batch and its gradients with respect to them; then each
    micro-batch again, with a graph, fed with its share of those gradients.  A batch in one piece keeps its graph.
    """
    size = min(micro_batch_size or len(batch), len(batch))
    pieces = [batch] if (one := size == len(batch)) else batch.split(size)
    with torch.set_grad_enabled(one):
        outputs = [fields(forward(model, piece, config, bf16, captions)) for piece in pieces]
    cached = {
        name: (torch.cat([o[name].detach() for o in outputs]) if value.ndim else value.detach()).requires_grad_()
        for name, value in outputs[0].items()
    }
    output = ClocOutput(**cached)
    loss = cloc_loss(output, batch.boxes, batch.valid, batch.text_hash, config, ranks.group)
    loss.total.backward()
    # every rank has its share of the gradient, and DDP and FSDP take the mean over ranks where a sum is wanted
    gradients = {name: value.grad * ranks.size for name, value in cached.items() if value.grad is not None}
    rows = [len(piece) for piece in pieces]
    for i, piece in enumerate(pieces):
        with gradient_sync(model, wanted=i == len(pieces) - 1):
            part = outputs[i] if one else fields(forward(model, piece, config, bf16, captions))
            # a scale belongs to all pieces alike
            given = {name: g.split(rows)[i] if g.ndim else g / len(pieces) for name, g in gradients.items()}
            learns = [name for name in given if part[name].requires_grad]  # not what frozen towers give
            torch.autograd.backward([part[name] for name in learns], [given[name] for name in learns])
    return loss, output


def forward(
    model: nn.Module, batch: Batch, config: LossConfig, bf16: bool = False, captions: bool = True
) -> ClocOutput:
    """The model's output for a batch; without regions if they have no weight."""
    seen = {"kept": batch.kept, "features": batch.features}
    # a context for every pass: casts that autocast keeps from a pass without a graph would have none in the next
    with torch.autocast(batch.boxes.device.type, torch.bfloat16, enabled=bf16):
        if config.region_weight == 0:
            return model(batch.pixel_values, batch.input_ids, **seen)
        ids = batch.input_ids if captions else None
        return model(batch.pixel_values, ids, batch.boxes, batch.text_ids, batch.text_index, **seen)


def fields(output: ClocOutput) -> dict[str, Tensor]:
    """The tensors of an output by name, without those that were not computed."""
    return {name: value for name, value in vars(output).items() if value is not None}


def check_finite(step: int, values: Mapping[str, Tensor | None], advice: str = "a lower optim.lr") -> None:
    """Raises FloatingPointError if a loss of a step or its gradient is NaN or infinite.  Waits for the device."""
    found = {name: value.item() for name, value in values.items() if value is not None}
    if not all(map(math.isfinite, found.values())):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        raise FloatingPointError(
            f"the loss is not finite at step {step} ({shown}); start again with {advice} or more optim.warmup_steps"
        )


def check_data(saved: str, now: str, checkpoint: Path) -> None:
    """Raises ValueError if the samples would come in another order than when the checkpoint was made."""
    if saved != now:
        raise ValueError(
            f"{checkpoint}: the training data has changed since (sources, sizes, tars or shares), so the run cannot go "
            "on where it stopped; bring the data back, or start a new run with model.init_from"
        )


def tell(message: str) -> None:
    """Says something to the person watching."""
    print(message, file=sys.stderr, flush=True)


class StopRequest:
    """Whether somebody asked this rank to stop, and whether the ranks have agreed to."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.requested, self.agreement = ranks, False, Agreement(ranks)

    def agreed(self) -> bool:
        """Whether to stop after this step: the same answer on every rank."""
        return self.agreement.exchange(self.requested)


@contextmanager
def stop_requests(ranks: Ranks) -> Iterator[StopRequest]:
    """Turns Ctrl-C and SIGTERM into a request that the loop reads between steps.

    A second one stops at once.  Not under torchrun, which passes on a signal that the ranks may have had from the
    terminal already, and which kills the ranks that do not end.
    """
    stop = StopRequest(ranks)

    def handle(number: int, _frame: object) -> None:
        if stop.requested and ranks.size == 1:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's business
        old = {}
    try:
        yield stop
        stop.agreement.close()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
