"""The parts of a multimodal model: which are trained, how fast, and by LoRA where that is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opencloc.mllm.config import MllmOptimConfig, Rates
from opencloc.train.muon import Muon

LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of all allowed families
_PARTS = (  # the first prefix that fits; the rest is the language model's
    ("model.vision_tower.", "tower"),
    ("model.multi_modal_projector.", "projector"),
    ("model.patch_positions", "projector"),
    ("model.sampler.prompter.", "prompter"),
    ("model.sampler.prompt_encoder.", "prompter"),
    ("model.sampler.", "sampler"),
)
_HIDDEN = (".layers.", "multi_modal_projector")  # whose matrices Muon trains, if it is chosen


def part_of(name: str) -> str:
    """The field of `Rates` that a parameter of `RegionLlava` belongs to, by its name."""
    return next((part for prefix, part in _PARTS if name.startswith(prefix)), "language_model")


def set_trained_parts(model: nn.Module, rates: Rates) -> None:
    """Puts the model into training mode, with gradients for the parts that have a rate; of LoRA for its own alone."""
    has_lora = any("lora_" in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        part = part_of(name)
        wanted = getattr(rates, part) > 0 and (part != "language_model" or not has_lora or "lora_" in name)
        parameter.requires_grad_(wanted)
    model.train()


def make_optimizer(model: nn.Module, rates: Rates, config: MllmOptimConfig) -> Muon:
    """The optimizer of the trainable parameters; a group's `rate` is the peak of its part.

    Weight decay on matrices, none on vectors and positions.  Raises ValueError if no parameter is trainable.
    """
    groups: dict[tuple[str, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or "position" in name or "_kind" in name:
            kind = "vector" if parameter.ndim else "scalar"  # sharded and whole parameters cannot share a group
        else:
            hidden = parameter.ndim == 2 and any(part in name for part in _HIDDEN) and "lora_" not in name
            kind = "muon" if config.name == "muon" and hidden else "matrix"
        groups.setdefault((part_of(name), kind), []).append(parameter)
    if not groups:
        raise ValueError("nothing is left to train: rates are 0 for every part that this model has")
    listed: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if kind in ("matrix", "muon") else 0.0,
            "rate": getattr(rates, part),
            "muon": kind == "muon",
        }
        for (part, kind), parameters in groups.items()
    ]
    return Muon(listed, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def add_lora(model: Any, rank: int, seed: int) -> None:
    """Adds LoRA matrices to the linear layers of the language model, in place: at first they change nothing.

    Raises ValueError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora_rank needs the extra: pip install 'opencloc[mllm]'") from error
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_LAYERS)
    inject_adapter_in_model(config, model.model.language_model)


def merge_lora(model: Any) -> None:
    """Adds the LoRA matrices into the layers that they belong to, in place, and takes them out."""
    from peft.tuners.lora import LoraLayer

    language = model.model.language_model
    for name, module in list(language.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            language.set_submodule(name, module.get_base_layer())
    if hasattr(language, "peft_config"):
        del language.peft_config
