"""The optimizers and the learning-rate schedule: AdamW (paper section 4.1), or Muon for the layers' matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opencloc.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Linear warm-up to the peak over `warmup_steps`, then a cosine to 0 at `total_steps`.  `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of the trainable parameters: weight decay on matrices, none on vectors, positions and scales.

    Scalars are a group of their own: sharded and whole parameters cannot share one.  With `name` "muon" the matrices of
    the transformer layers are one too, the last.
    """
    decayed, plain, scalars, layers = [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and "position_embedding" not in name and "_kind" not in name
            in_layer = config.name == "muon" and parameter.ndim == 2 and ".layers." in name
            (layers if in_layer else decayed if matrix else plain if parameter.ndim else scalars).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": scalars, "weight_decay": 0.0},
    ]
    make = torch.optim.AdamW
    if layers:
        make = Muon
        groups.append({"params": layers, "weight_decay": config.weight_decay})
    return make(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


class Muon(torch.optim.AdamW):
    """AdamW whose last group of parameters, all matrices, takes the steps of Muon (Jordan et al. 2024) instead.

    A step of Muon has the direction of the momentum, but all its singular values near 1; scaled by 0.2 times the root
    of the longer side it is as long as one of AdamW, and the learning rate the same (Liu et al. 2025).  In the
    precision of the parameters: `torch.optim.Muon` multiplies in bfloat16, which many CPUs only emulate.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        *others, layers = groups = self.param_groups
        self.param_groups = others
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for parameter in layers["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - self.momentum)
            update = orthogonalize(parameter.grad.lerp(momentum, self.momentum))  # Nesterov's
            parameter.mul_(1 - layers["lr"] * layers["weight_decay"])
            parameter.add_(update, alpha=-layers["lr"] * 0.2 * max(parameter.shape) ** 0.5)
        return loss


def orthogonalize(matrix: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
    """The matrix with its singular vectors and, but for the very small ones, singular values between 0.6 and 1.3.

    Five quintic Newton-Schulz iterations with the coefficients of Jordan et al. (2024).  The product of their factors
    is found from the Gram matrix of the shorter side, so that only two products touch the longer one.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T.contiguous()).T
    x = matrix / (torch.linalg.matrix_norm(matrix) + 1e-7)
    gram, product = x @ x.T, None
    for left in reversed(range(5)):
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        product = factor if product is None else product @ factor
        if left:
            gram = factor @ gram @ factor
    return product @ x
