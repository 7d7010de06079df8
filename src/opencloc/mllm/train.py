"""The training loop of multimodal models: `train(config)` runs a stage, or goes on where it stopped.

Ranks, checkpoints, logs and the run's folder are those of pre-training (`opencloc.train`), and so are their promises:
the resumed run is the uninterrupted one, and any number of ranks, sharded or not, computes what one process does.  The
loss is the sum over all learned tokens of the global batch divided by their number, however they are spread over ranks
and micro-batches.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opencloc import files
from opencloc.collectives import sum_ranks
from opencloc.config import OptimConfig, to_json
from opencloc.data.stream import check_skipped
from opencloc.mllm.config import MllmTrainConfig
from opencloc.mllm.model import RegionLlava
from opencloc.mllm.parts import add_lora, make_optimizer, merge_lora, set_trained_parts
from opencloc.mllm.processor import RegionLlavaProcessor, Row
from opencloc.mllm.readers import open_conversations
from opencloc.mllm.stream import ConversationExamples, micro_batches, training_rows
from opencloc.train.checkpoint import load_checkpoint, save_checkpoint, save_model
from opencloc.train.distributed import Ranks, clip_gradients, gradient_sync, spread
from opencloc.train.log import RunLog
from opencloc.train.loop import Interrupted, check_data, check_finite, in_its_folder, set_up, stop_requests
from opencloc.train.optim import learning_rate


def train(config: MllmTrainConfig) -> Path:
    """Runs (or resumes) the training and returns the folder of the final model; a finished run is left as it is.

    Raises ValueError if the folder holds another run or is in use, or the batch cannot be shared out among the ranks;
    FloatingPointError if the loss is no number any more; `Interrupted` after Ctrl-C or SIGTERM.
    """
    return in_its_folder(config, run)


def run(config: MllmTrainConfig, ranks: Ranks, device: torch.device, resume_from: Path | None) -> None:
    """The training as one of `ranks`, on `device`, from a checkpoint or the beginning."""
    # -- set-up ------------------------------------------------------------------------------------------------------
    out = Path(config.out)
    bf16 = set_up(config, ranks, device, resume_from, "conversations")
    model, processor = load_trainable(config)
    model.to(device)
    parallel = spread(model, ranks, config.sharding)  # computes; `model` holds the parameters
    sources = [open_conversations(spec, image_px=processor.image_size) for spec in config.data.train]
    examples = ConversationExamples(
        sources,
        config.data.weights,
        processor,
        questions=config.data.questions,
        max_turns=config.data.max_turns,
        seed=config.seed,
        lanes=config.data.lanes,
    )
    optimizer = make_optimizer(model, config.rates, config.optim)
    schedule = OptimConfig(lr=1.0, warmup_steps=config.optim.warmup_steps)
    step, skipped = 0, Counter[str]()  # every rank counts what it skips; a checkpoint holds the sum
    if resume_from is not None:
        state = load_checkpoint(resume_from, model, optimizer)
        step, skipped = state["step"], Counter(state["skipped"] if ranks.is_first else ())
        check_data(state["data"], examples.fingerprint, resume_from)
    batches = training_rows(
        examples,
        batch_size=config.batch_size,
        start=step,
        stop=config.steps,
        num_workers=config.data.num_workers,
        rank=ranks.rank,
        world_size=ranks.size,
    )

    def all_skipped() -> Counter[str]:
        return sum(map(Counter, ranks.gather_json(skipped)), Counter())

    def save() -> None:
        state = {"step": step, "skipped": dict(all_skipped()), "data": examples.fingerprint}
        keep = config.keep_checkpoints
        save_checkpoint(out / "checkpoints", step, model, processor, optimizer, state, keep=keep, ranks=ranks)

    if ranks.is_first:  # all is open now: a start that failed before leaves the folder free
        files.write_text(out / "config.json", to_json(config))

    # -- the loop ----------------------------------------------------------------------------------------------------
    with RunLog(out, config, start=step, quiet=not ranks.is_first) as log, stop_requests(ranks) as stop:
        while step < config.steps:
            started = time.perf_counter()
            rows, left_out = next(batches)
            skipped += left_out
            waited = time.perf_counter() - started

            factor = learning_rate(step, config.steps, schedule)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["rate"]
            loss, tokens = backward(parallel, rows, config.micro_batch_size, processor, bf16=bf16, ranks=ranks)
            grad_norm = clip_gradients(model, config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            log.step(waited)
            if log.due(step):
                check_finite(step, {"loss": loss, "grad_norm": grad_norm}, "lower rates")
                total = all_skipped()
                check_skipped(total, step * config.batch_size, config.data.max_skipped_share)
                values = {"loss": loss.item(), "tokens": tokens.item(), "grad_norm": grad_norm.item()}
                log.write_values(step, values, lr=factor * max(vars(config.rates).values()), skipped=total)
                log.meter.note = f"loss {values['loss']:.3f}"
            stopping = stop.agreed()
            if stopping or step % config.checkpoint_every == 0 or step == config.steps:
                check_finite(step, {"loss": loss, "grad_norm": grad_norm}, "lower rates")
                save()
            if stopping:
                raise Interrupted(f"stopped after step {step} of {config.steps}; run the same command again to go on")

    # -- the end -----------------------------------------------------------------------------------------------------
    write_final(config, model, processor, ranks)
    ranks.wait()


def load_trainable(config: MllmTrainConfig) -> tuple[Any, RegionLlavaProcessor]:
    """Model and processor to start from, in float32, with LoRA if asked for and the parts that are trained marked."""
    model = RegionLlava.from_pretrained(config.model).float()
    model.set_attn_implementation(config.attention)
    processor = RegionLlavaProcessor.from_pretrained(config.model)
    if config.lora_rank is not None:
        add_lora(model, config.lora_rank, config.seed)
    set_trained_parts(model, config.rates)
    if config.activation_checkpointing:
        # transformers renamed the method in the course of version 5
        older: Any = getattr(model, "gradient_checkpointing_enable", None)
        getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    return model, processor


def write_final(config: MllmTrainConfig, model: Any, processor: RegionLlavaProcessor, ranks: Ranks) -> None:
    """Writes the final model, LoRA merged into it."""
    folder = Path(config.out) / "model"
    if config.lora_rank is None:
        save_model(folder, model, processor, ranks)
        return
    newest = Path(config.out) / "checkpoints" / f"step_{config.steps:07d}"
    if ranks.is_first:  # from the checkpoint, which holds whole matrices whatever the sharding
        alone, _ = load_trainable(config)
        load_checkpoint(newest, alone, make_optimizer(alone, config.rates, config.optim))
        merge_lora(alone)
        save_model(folder, alone, processor)


def backward(
    model: nn.Module,
    rows: list[Row],
    micro_batch_size: int | None,
    processor: RegionLlavaProcessor,
    *,
    bf16: bool,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """(loss of the batch of all ranks, how many tokens it is over); its gradients are added to the model's."""
    device = next(model.parameters()).device
    total = sum_ranks(torch.tensor(sum(row.num_supervised for row in rows), device=device), ranks.group)
    count = -(-len(rows) // (micro_batch_size or len(rows)))
    loss = torch.zeros((), device=device)
    for i, batch in enumerate(micro_batches(rows, micro_batch_size, processor, device)):
        with gradient_sync(model, wanted=i == count - 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                part = model(**batch, num_items_in_batch=total, loss_only=True).loss
            (part * ranks.size).backward()  # DDP and FSDP take the mean over ranks where the sum is wanted
            loss += part.detach()
    return sum_ranks(loss, ranks.group), total
