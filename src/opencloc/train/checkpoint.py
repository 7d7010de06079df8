"""Checkpoints: a folder that `ClocModel.from_pretrained` loads, with the optimizer's state beside the weights.

    checkpoints/step_0000500/   config.json model.safetensors + tokenizer and processor files
                                optimizer.safetensors train_state.json

Only safetensors and JSON are written and read, no pickle.  A checkpoint gets its name when it is complete and on the
disk.

A sharded run writes the same folder: the shards are put together, tensor by tensor, in the memory of the first rank,
which writes.  When it is read, every rank takes its own shard of each tensor.  So any number of ranks, sharded or not,
goes on from any checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from opencloc import files
from opencloc.train.distributed import ALONE, Ranks, whole


def save_model(
    folder: Path, model: PreTrainedModel, processor: ProcessorMixin, ranks: Ranks = ALONE, **beside: Mapping[str, Any]
) -> None:
    """Writes model and processor to `folder`, atomically, replacing what was there; every rank has to call it.

    `beside`: name -> dict of tensors (`optimizer`, as safetensors) or anything else (JSON), written beside them.
    """
    tied = set(model.all_tied_weights_keys or ())  # the same tensors by another name
    weights = _whole_tensors({name: x for name, x in model.state_dict().items() if name not in tied}, ranks)
    beside = {name: _whole_tensors(f, ranks) if name == "optimizer" else f for name, f in beside.items()}
    if not ranks.is_first:
        return
    try:
        with files.new_folder(folder) as partial:
            model.save_pretrained(partial, state_dict=weights)
            processor.save_pretrained(partial)
            for name, content in beside.items():
                if name == "optimizer":
                    save_file(dict(content), partial / "optimizer.safetensors")
                else:
                    files.write_json(partial / f"{name}.json", content)
    except SafetensorError as error:  # what a full disk is to safetensors
        raise OSError(f"{folder} cannot be written: {error}") from error


def save_checkpoint(
    root: Path,
    step: int,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Writes the state after `step` steps and removes all but the newest `keep` checkpoints.

    Raises FloatingPointError on all ranks, and writes nothing, if a weight is NaN or infinite.
    """
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    if not all(ranks.gather_json(bool(torch.stack([p.detach().isfinite().all() for p in local]).all()))):
        raise FloatingPointError(f"weights are not finite after step {step}: no checkpoint is written")
    folder = root / f"step_{step:07d}"
    tensors = _optimizer_tensors(model, optimizer)
    save_model(folder, model, processor, ranks, optimizer=tensors, train_state=state)
    if ranks.is_first:
        for old in list_checkpoints(root)[:-keep]:
            files.remove_folder(old)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first."""
    return sorted((path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step_"))


def problem_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be read, with the file's name; None if it can, as far as lengths and syntax tell."""
    for name in ("config.json", "model.safetensors", "optimizer.safetensors", "train_state.json"):
        if not (checkpoint / name).is_file():
            return f"{checkpoint / name} is missing"
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
        except (ValueError, OSError, SafetensorError) as error:
            return f"{path} is broken ({error})"
    return None


def set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint so that it is none any more; its new path."""
    aside = checkpoint.with_name(f"{checkpoint.name}.broken")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


@torch.no_grad()
def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads weights and optimizer state in place, sharded as the model is, and returns the saved `state`.

    Raises ValueError if the checkpoint belongs to another architecture.
    """
    with safe_open(folder / "model.safetensors", "pt") as file:
        own, saved = model.state_dict(), set(file.keys())
        missing = own.keys() - saved - set(model.all_tied_weights_keys or ())
        if missing or saved - own.keys():
            raise ValueError(
                f"{folder}: the checkpoint does not fit this model "
                f"(missing {sorted(missing)}, unknown {sorted(saved - own.keys())})"
            )
        for name in sorted(saved):
            value = file.get_tensor(name)
            if value.shape != own[name].shape:
                shapes = f"{tuple(value.shape)} there, {tuple(own[name].shape)} here"
                raise ValueError(f"{folder}: the checkpoint does not fit this model: {name} is {shapes}")
            own[name].copy_(_shard_like(value, own[name]))
    parameters = {p: p for group in optimizer.param_groups for p in group["params"]}
    names = {name: parameters[p] for name, p in model.named_parameters() if p in parameters}
    with safe_open(folder / "optimizer.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            owner, _, entry = name.rpartition(".")
            value, parameter = file.get_tensor(name), names[owner]
            # the counter of steps is one number for all shards; the fused kernel wants it where the parameter is
            value = _shard_like(value, parameter) if value.ndim else value.to(parameter.device)
            optimizer.state[parameter][entry] = value
    return json.loads((folder / "train_state.json").read_text())


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def _whole_tensors(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """All of the tensors, put together one by one, in the first rank's memory; the other ranks get none."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if ranks.is_first:
            gathered[name] = full.cpu().contiguous() if isinstance(tensor, DTensor) else full.contiguous()
    return gathered


def _shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`, or this rank's shard of it."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
