"""AdamW groups and the learning-rate schedule (paper section 4.1).  Pure functions of the configuration."""

from __future__ import annotations

import math

import torch
from torch import nn

from opencloc.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Linear warm-up to the peak over `warmup_steps`, then a cosine to 0 at `total_steps`.  `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: weight decay on matrices, none on vectors, positions and scales.

    Scalars are a group of their own: sharded and whole parameters cannot share one.
    """
    decayed, plain, scalars = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and "position_embedding" not in name and "_kind" not in name
            (decayed if matrix else plain if parameter.ndim else scalars).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": scalars, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
