"""One process or many, on CPU or GPU: who we are, and the few collectives that training needs."""

from __future__ import annotations

import logging
import os
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, it would hold the process group for good
from torch import Tensor

logger = logging.getLogger(__name__)

GradScale = Literal["exact", "official"]

_LET_GO = 0.1  # seconds; on an idle machine microseconds are enough


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all that train together.

    rank: 0 .. size - 1.  local_rank: rank on this machine, the index of its GPU.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0


def start(device: str = "auto", *, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the processes that a launcher started (deepspeed, torchrun), or be the only one.

    Args:
        device: "auto" (GPU where there is one), "cpu", "cuda".
        timeout: of every collective; a rank that died is noticed after it at the latest.

    Returns:
        The world. Ranks > 0 are silenced: their log records below ERROR and their warnings are dropped.

    Raises:
        ValueError: half of a launcher's variables, or fewer GPUs than processes on this machine.
    """
    rank, size, local_rank = _launched()
    world = World(rank=rank, size=size, local_rank=local_rank, device=_device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(_backend(world), timeout=timeout)
    if not world.first:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    return world


def stop() -> None:
    """Leave the process group, if one was joined.

    A thread of gloo that still lets go of a tensor when the interpreter ends aborts the process, after all of
    its work.  The threads end with the last reference to the group; where a model or DeepSpeed holds one,
    they get the time that this takes.
    """
    logging.disable(logging.NOTSET)
    if dist.is_initialized():
        gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if gloo:
            time.sleep(_LET_GO)


def group_of_one(world: World) -> None:
    """Give a lone process the process group that DeepSpeed asks for; no port is opened.

    The launcher's variables are set beside it, for the library that reads them.
    """
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(value))
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage], it is documented
        dist.init_process_group(_backend(world), store=store, rank=0, world_size=1)


def gather(x: Tensor, world: World, *, grad_scale: GradScale = "exact") -> Tensor:
    """Concatenate the ranks' tensors in rank order, differentiably.

    Every rank computes the whole loss from the result, so the gradient it receives is the whole one; its own
    slice goes on. Averaged over W ranks that alone is 1/W of the gradient that one process would have found:
    `official` leaves it so, as released; `exact` multiplies the slice by W.

    Args:
        x: n ..., any dtype, the same shape on every rank. What is not floating point carries no gradient.
        world: of this process.
        grad_scale: "exact" or "official".

    Returns:
        (W n) ..., in x's dtype; x itself where W = 1.

    Source: DiscoVLA's released AllGather, read in the specification's section 5.
    """
    if world.size == 1:
        return x
    if not x.is_floating_point():
        return _gather(x, world)
    return _Gather.apply(x, world, float(world.size) if grad_scale == "exact" else 1.0)  # type: ignore[return-value]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(x: Tensor, world: World) -> Tensor:
    """The sum of x over ranks as a new tensor, without gradient; a copy of x where there is one rank."""
    x = x.detach().clone()
    if world.size > 1:
        dist.all_reduce(x)
    return x


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        all_reduce_sum(torch.zeros(1, device=world.device), world).item()


class _Gather(torch.autograd.Function):
    """Concatenation over ranks; backward keeps this rank's slice, times `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World, scale: float) -> Tensor:
        ctx.rows, ctx.start, ctx.scale = x.shape[0], x.shape[0] * world.rank, scale
        return _gather(x, world)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.start : ctx.start + ctx.rows] * ctx.scale, None, None


def _gather(x: Tensor, world: World) -> Tensor:
    """Concatenate x over ranks, outside of autograd."""
    x = x.detach().contiguous()
    wire = x.view(torch.uint8) if x.dtype == torch.bool else x  # gloo knows no bool
    parts = [torch.empty_like(wire) for _ in range(world.size)]
    dist.all_gather(parts, wire)
    return torch.cat(parts).view(x.dtype)


def _launched() -> tuple[int, int, int]:
    """Rank, size and local rank from the launcher's variables; (0, 1, 0) without them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = [name for name in names if name in os.environ]
    if "RANK" not in found and "WORLD_SIZE" not in found:
        return 0, 1, 0
    if len(found) < len(names):
        missing = ", ".join(name for name in names if name not in found)
        raise ValueError(f"expected a launcher's RANK, WORLD_SIZE and LOCAL_RANK, found no {missing}")
    rank, size, local_rank = (int(os.environ[name]) for name in names)
    return rank, size, local_rank


def _device(device: str, local_rank: int) -> torch.device:
    """The device of this process."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, found {device!r}")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and present == 0):
        return torch.device("cpu")
    if local_rank >= present:
        raise ValueError(f"device: expected a GPU for local rank {local_rank}, found {present} GPUs here")
    return torch.device("cuda", local_rank)


def _backend(world: World) -> str:
    """gloo everywhere, and nccl for what lies on GPUs."""
    return "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
