"""Tensor operations over the ranks of a process group; with `group=None`, a single process, each is the identity.

Only what the losses need, and nothing that autograd sees but `sum_shares`.  Starting ranks and sharding a model is
`opencloc.train.distributed`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

Group = dist.ProcessGroup | None

# torch 2.13 has renamed them
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def size(group: Group) -> int:
    """Number of ranks."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    """Number of this rank, from 0."""
    return 0 if group is None else dist.get_rank(group)


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """The rows of all ranks, in the order of ranks; all have equally many."""
    if group is None:
        return x
    gathered = x.new_empty(size(group) * len(x), *x.shape[1:])
    _all_gather(gathered, x.contiguous(), group)
    return gathered


def scatter_sum(x: Tensor, group: Group) -> Tensor:
    """This rank's rows of the sum over ranks: what `gather_rows` is in reverse."""
    if group is None:
        return x
    rows = x.new_empty(len(x) // size(group), *x.shape[1:])
    _reduce_scatter(rows, x.contiguous(), group=group)
    return rows


def sum_ranks(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks."""
    if group is None:
        return x
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def sum_log_ranks(x: Tensor, group: Group) -> Tensor:
    """log of the sum over ranks of exp(x), elementwise; not all of an element's x may be -inf."""
    if group is None:
        return x
    top = x.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    return top + sum_ranks((x - top).exp(), group).log()


def sum_shares(x: Float[Tensor, ""], group: Group) -> Float[Tensor, ""]:
    """The sum over ranks, with the gradient of this rank's share alone: those of all ranks add up to the whole."""
    return _SumShares.apply(x, group)  # pyright: ignore[reportReturnType]


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return x.clone() if group is None else sum_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None
