"""What is trained and how fast: the parts, the groups of their parameters, and the learning-rate schedule.

AdamW is the paper's optimizer (section 4.1); Muon, for the layers' matrices, is in `opencloc.train.muon`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from opencloc.config import LrFactors, OptimConfig
from opencloc.model.towers import VISION_PARTS
from opencloc.train.muon import Muon


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Linear warm-up to the peak over `warmup_steps`, then a cosine to 0 at `total_steps`.  `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group the rate times the factor of its part."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def lr_factor(name: str, factors: LrFactors) -> float:
    """The factor of the learning rate of a parameter of `ClocModel`, by its name.

    Whatever is neither a tower's nor a box head's is the Prompter's: its prompts and the temperature of regions too.
    The temperature of images is both towers', and trains if one of them does.
    """
    if "box_head." in name:
        return factors.heads
    if "clip." not in name:
        return factors.prompter
    if any(part in name for part in VISION_PARTS):
        return factors.vision_tower
    if "text_model." in name or "text_projection." in name:
        return factors.text_tower
    return max(factors.vision_tower, factors.text_tower)


def set_trained_parts(model: nn.Module, factors: LrFactors) -> None:
    """Puts the model into training mode but for the parts with factor 0, which are frozen, in place.

    Their parameters ask for no gradient and their modules are in evaluation mode.  So a frozen tower keeps nothing for
    a backward pass, and nothing of it is exchanged between ranks.  Before the model is spread over ranks.  Raises
    ValueError if only prompts and temperatures were left: `pool` has no weights of its own, and uses neither.
    """
    learning = set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lr_factor(name, factors) > 0)
        learning |= {name.partition(".")[0]} if parameter.requires_grad else set()
    if learning.isdisjoint({"clip", "prompter", "box_head"}):
        raise ValueError("nothing is left to train: optim.lr_factors freezes every part of this model that has weights")
    model.train()
    for module in model.modules():
        if (own := list(module.parameters())) and not any(parameter.requires_grad for parameter in own):
            module.eval()


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of the trainable parameters: weight decay on matrices, none on vectors, positions and scales.

    With `name` "muon" the matrices of the towers' transformer layers are Muon's; embeddings, projections into the joint
    space, the region parts and all vectors are AdamW's.
    """
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.ndim == 0:
                kind = "scalar"  # sharded and whole parameters cannot share a group
            elif parameter.ndim == 1 or "position_embedding" in name or "_kind" in name:
                kind = "vector"
            else:
                kind = "muon" if config.name == "muon" and parameter.ndim == 2 and ".layers." in name else "matrix"
            groups.setdefault((kind, lr_factor(name, config.lr_factors)), []).append(parameter)
    listed: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if kind in ("matrix", "muon") else 0.0,
            "lr_factor": factor,
            "muon": kind == "muon",
        }
        for (kind, factor), parameters in groups.items()
    ]
    return Muon(listed, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
