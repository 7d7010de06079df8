"""Checkpoints: a folder that `ClocModel.from_pretrained` loads, with the optimizer's state beside the weights.

    checkpoints/step_0000500/   config.json model.safetensors + tokenizer and processor files
                                optimizer.safetensors train_state.json

Only safetensors and JSON are written and read, no pickle.  A checkpoint appears atomically under its name: what
carries a step's name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from opencloc.model.cloc import ClocModel
from opencloc.model.processor import ClocProcessor


def save_model(folder: Path, model: ClocModel, processor: ClocProcessor, **files: Any) -> None:
    """Writes model and processor to `folder`, atomically, replacing what was there.

    `files`: name -> dict of tensors (safetensors) or anything else (JSON), written beside them.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    for name, content in files.items():
        if name == "optimizer":
            save_file(content, partial / "optimizer.safetensors")
        else:
            (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        os.replace(partial, folder)


def save_checkpoint(
    root: Path,
    step: int,
    model: ClocModel,
    processor: ClocProcessor,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Writes the state after `step` steps and removes all but the newest `keep` checkpoints."""
    folder = root / f"step_{step:07d}"
    save_model(folder, model, processor, optimizer=_optimizer_tensors(model, optimizer), train_state=state)
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    for leftover in root.glob(".*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    return folder


def list_checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints under `root`, oldest first."""
    return sorted(path for path in root.glob("step_*") if (path / "train_state.json").is_file())


def load_checkpoint(folder: Path, model: ClocModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Loads weights and optimizer state in place and returns the saved `state`.

    Raises ValueError if the checkpoint belongs to another architecture.
    """
    weights = load_file(folder / "model.safetensors")
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the checkpoint does not fit this model: {error}") from None
    tied = set(model.all_tied_weights_keys or ())
    if unexpected or set(missing) - tied:
        raise ValueError(f"{folder}: the checkpoint does not fit this model (missing {missing}, unknown {unexpected})")
    tensors = load_file(folder / "optimizer.safetensors")
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"{names[parameter]}."
            saved = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            # `step` stays a CPU scalar unless the fused kernel wants it where the parameter is
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in saved.items()}
    return json.loads((folder / "train_state.json").read_text())


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value.contiguous()
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }
