"""Many processes, one run: the ranks that torchrun starts, the model spread over them, and what they agree on.

DDP or FSDP2 is put around the model from outside.  In a single process everything here does nothing.  Nothing is
pickled: ranks tell each other tensors, or JSON as bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opencloc.collectives import gather_rows, sum_ranks

T = TypeVar("T")

# Gloo's threads let go of a collective's tensors a moment after it is over, for which they need the interpreter.  FSDP2
# keeps the group, and with it these threads, alive; where the interpreter has ended by then, they abort the process.
LET_GO_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: a single process

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's `value`, which is anything JSON can hold."""
        if self.group is None:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = gather_rows(torch.tensor([len(content)]), self.group).tolist()
        padded = torch.zeros(1, max(lengths), dtype=torch.uint8)
        padded[0, : len(content)] = content
        rows = gather_rows(padded, self.group)
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)]

    def from_first(self, do: Callable[[], T]) -> T:
        """What `do` gives on the first rank, which alone does it: anything JSON can hold.

        Its ValueError or OSError is a ValueError on the other ranks, so that none of them waits in vain.
        """
        result, error = None, None
        if self.is_first:
            try:
                result = do()
            except (ValueError, OSError) as caught:
                error = caught
        result, message = self.gather_json([result, None if error is None else str(error)])[0]
        if message is not None:
            raise error or ValueError(message)
        return result

    def wait(self) -> None:
        """Returns once all ranks have come here."""
        self.gather_json(None)


ALONE = Ranks()


@contextmanager
def process_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started (or the group that exists already) and this rank's device.

    GPUs talk by NCCL, and CPU tensors by Gloo beside it, so that small agreements need no GPU.
    """
    created = not dist.is_initialized()
    if created and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if created:
        _check_restarts()
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size(), group=dist.group.WORLD), device
    finally:
        if created:
            dist.destroy_process_group()
            time.sleep(LET_GO_S)


def _check_restarts() -> None:
    """Raises RuntimeError where ranks that torchrun starts again would wait for ever.

    torchrun's ranks find each other by a store that, unless told otherwise, outlives them: a restarted rank may read a
    dead one's address there (pytorch issue 135712).
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise RuntimeError(
            f"torchrun --max-restarts {restarts} needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment: "
            "without it, restarted ranks find the addresses of dead ones and wait for them in vain"
        )


def spread(model: nn.Module, ranks: Ranks, sharding: Literal["ddp", "fsdp"]) -> nn.Module:
    """The model as the ranks compute it together: call this one, and go on reading parameters off `model`.

    Both ways average gradients over ranks.  FSDP2 shards the layers that the model names in `_no_split_modules` one by
    one and the rest together; scalars (the scales of logits) cannot be sharded and stay whole on every rank, outside
    its reach: `average_scalars` does it.
    """
    if ranks.group is None:
        return model
    if sharding == "ddp":
        # a configuration leaves some parameters unused: point prompts always, all region parts in the CLIP baseline
        return DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.size,))
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=scalars)  # in place
    return model


def gradient_sync(model: nn.Module, *, wanted: bool) -> AbstractContextManager[None]:
    """Around a forward and backward pass: whether DDP averages the gradients now or lets them add up until it does.

    FSDP2 always does: to let them add up, every rank would need room for all of them.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not wanted else nullcontext()


def average_scalars(model: nn.Module, ranks: Ranks) -> None:
    """Averages over ranks the gradients of the scalars that FSDP2 leaves alone; after the backward pass."""
    if isinstance(model, FSDPModule):
        parameters = [p for p in model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
        if gradients := [p.grad for p in parameters]:
            mean = sum_ranks(torch.stack(gradients), ranks.group) / ranks.size  # pyright: ignore[reportArgumentType]
            for parameter, gradient in zip(parameters, mean, strict=True):
                parameter.grad = gradient


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients down to a global norm of at most `max_norm`; the norm before."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    kinds = [[p for p in parameters if isinstance(p.grad, DTensor) is sharded] for sharded in (False, True)]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in kind])) for kind in kinds if kind]  # pyright: ignore
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one; every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Agreement:
    """A flag that any rank may raise and that all see at the same step.

    Each step's flags travel while the step computes and are read at the next one, so nobody waits for them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.group, self.flag = ranks.group, torch.zeros(1)
        self.work: Any = None

    def exchange(self, raised: bool) -> bool:
        """Sends this rank's flag; whether any rank had raised its own at the step before (in one process: now)."""
        if self.group is None:
            return raised
        if self._received():
            return True
        self.flag = torch.tensor([float(raised)])
        self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)
        return False

    def close(self) -> None:
        """Receives what is still on its way; the last step's flags are nobody's business."""
        self._received()

    def _received(self) -> bool:
        if self.work is not None:
            self.work.wait()
        return bool(self.flag.item())
