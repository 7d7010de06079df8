"""Muon (Jordan et al. 2024) for the matrices of the layers beside AdamW for the rest, in one optimizer.

Why not `torch.optim.Muon`: it rounds every matrix to bfloat16, which many CPUs only emulate and in which a run on two
ranks is not that of one; it goes through the matrices one by one; and of sharded matrices it would multiply shards,
with communication in each of fifteen products.  The step is the same, and a test holds it to torch's.

Symbols: K matrices of R rows and C columns, W ranks that share them, r rows of a matrix on this rank, k matrices that
this rank works on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic iteration: the steepest at 0 (Jordan et al. 2024)
ITERATIONS = 5
RMS = 0.2  # of a step at learning rate 1, about that of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2)
AT_ONCE = 2**26  # elements of the matrices that are orthogonalized together, on every rank


class Muon(torch.optim.AdamW):
    """AdamW whose groups of parameters marked `muon`, all matrices, take the steps of Muon instead.

    A step has the direction of the momentum, but all its singular values near 1:

        m <- 0.95 m + 0.05 g,   u = 0.05 g + 0.95 m,   W <- (1 - lr wd) W - lr 0.2 sqrt(max(R, C)) orthogonalize(u)

    **The learning rate.**  An orthogonal R x C matrix has the root mean square 1 / sqrt(max(R, C)); so every step has
    that of 0.2 lr whatever the shape, which is what AdamW's steps have, and one learning rate and one weight decay
    serve both (Liu et al. 2025).

    The products are in bfloat16 on GPUs and in the precision of the parameters elsewhere.  Matrices of a shape are
    worked on together.  Where they are sharded (FSDP2), each rank puts its share of them together, orthogonalizes
    these and returns the rows: over all ranks the arithmetic of one, and two exchanges of 1/W of the parameters.  To
    gather them everywhere would take W times both.  Where every rank holds them whole (DDP) each does all of it: to
    share the work, ranks would have to exchange all parameters, which takes about as long as the arithmetic.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for parameters in batches([p for p in group["params"] if p.grad is not None]):
                    self._step(parameters, group["lr"], group["weight_decay"])
        return loss

    def _step(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """The step of matrices of one shape."""
        first = parameters[0]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [local(self.state[parameter]["momentum"]) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        direction = torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM))  # Nesterov's
        if first.device.type == "cuda":
            direction = direction.bfloat16()
        if isinstance(first, DTensor):
            update = orthogonalize_shards(direction, first.shape[0], first.device_mesh.get_group())
        else:
            update = orthogonalize(direction)
        values = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(values, 1 - lr * weight_decay)
        step = update.to(first.dtype) * (RMS * max(first.shape) ** 0.5)
        torch._foreach_add_(values, list(step), alpha=-lr)


def local(tensor: Any) -> Tensor:
    """This rank's shard of a tensor, or all of one that is not sharded; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def batches(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The matrices in lists of one shape, of so many that each rank has at most `AT_ONCE` elements of them."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, alike in by_shape.items():
        ranks = alike[0].device_mesh.size() if isinstance(alike[0], DTensor) else 1
        count = max(1, AT_ONCE * ranks // shape.numel())
        yield from (alike[start : start + count] for start in range(0, len(alike), count))


def orthogonalize(matrices: Float[Tensor, "K R C"]) -> Float[Tensor, "K R C"]:
    """The matrices with their singular vectors and, but for the very small ones, singular values between 0.6 and 1.3.

    Five quintic Newton-Schulz iterations.  For long matrices the product of their factors is found from the Gram matrix
    of the shorter side, so that only two products touch the longer one; not in bfloat16, where rounding makes Gram
    matrices indefinite.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT
    a, b, c = COEFFICIENTS
    norm = torch.linalg.matrix_norm(matrices, keepdim=True, dtype=torch.promote_types(matrices.dtype, torch.float32))
    x = matrices / (norm + 1e-7).to(matrices.dtype)
    if matrices.dtype == torch.bfloat16 or 2 * matrices.shape[2] < 3 * matrices.shape[1]:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    gram, product = x @ x.mT, None
    for left in reversed(range(ITERATIONS)):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else product @ factor
        if left:
            gram = factor @ gram @ factor
    return product @ x


def orthogonalize_shards(
    shards: Float[Tensor, "K r C"], num_rows: int, group: dist.ProcessGroup
) -> Float[Tensor, "K r C"]:
    """This rank's rows of the K orthogonalized matrices, from its rows of the matrices (FSDP2's shares of R rows).

    The first rank puts together and works on the first matrices, and so on.
    """
    ranks, columns = dist.get_world_size(group), shards.shape[-1]
    rows, counts = shares(num_rows, ranks), shares(len(shards), ranks)
    own, own_rows = counts[dist.get_rank(group)], shards.shape[1]
    here = [own * r * columns for r in rows]  # elements of this rank's matrices, by the rank that has the rows
    there = [k * own_rows * columns for k in counts]  # elements of this rank's rows, by the rank of their matrices
    received = shards.new_empty(sum(here))
    dist.all_to_all_single(received, shards.flatten(), here, there, group)
    pieces = [piece.view(own, r, columns) for piece, r in zip(received.split(here), rows, strict=True)]
    whole = orthogonalize(torch.cat(pieces, 1))
    returned = torch.empty_like(shards)
    send = torch.cat([piece.flatten() for piece in whole.split(rows, 1)])
    dist.all_to_all_single(returned.view(-1), send, there, here, group)
    return returned


def shares(count: int, ranks: int) -> list[int]:
    """How many of `count` things each rank has if all but the last ones have equally many, as `torch.chunk` does it."""
    most = -(-count // ranks)
    return [max(0, min(most, count - rank * most)) for rank in range(ranks)]
