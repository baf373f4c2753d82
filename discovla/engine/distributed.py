"""One process or many, on CPU or GPU: who we are, and the few collectives that training needs."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, it would hold the process group for good
from torch import Tensor

from discovla.engine.lifecycle.peers import Peers, meet

logger = logging.getLogger(__name__)

GradScale = Literal["exact", "official"]
CommDtype = Literal["compute", "fp32"]

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


def start(
    device: str = "auto",
    *,
    timeout: timedelta = timedelta(minutes=30),
    within: float | None = None,
    met: Callable[[World, Peers], None] | None = None,
) -> World:
    """Join the processes that a launcher started (deepspeed, torchrun), or be the only one.

    Args:
        device: "auto" (GPU where there is one), "cpu", "cuda".
        timeout: of every collective; a rank that died is noticed after it at the latest.
        within: seconds for all processes to come; default: as `timeout`.
        met: called once all have come and before they wait for each other in anything else.

    Returns:
        The world. Ranks > 0 are silenced: their log records below ERROR and their warnings are dropped.

    Raises:
        ValueError: half of a launcher's variables, or fewer GPUs than processes on this machine.
        TimeoutError: not all processes have come; says which.
    """
    rank, size, local_rank = _launched()
    world = World(rank=rank, size=size, local_rank=local_rank, device=_device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size > 1 and not dist.is_initialized():
        found = meet(rank, size, timeout.total_seconds() if within is None else within)
        if met is not None:
            met(world, found)
        found.store.set_timeout(timeout)
        dist.init_process_group(
            _backend(world), store=found.store, rank=rank, world_size=size, timeout=timeout
        )
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


def gather(x: Tensor, world: World) -> Tensor:
    """Concatenate the ranks' tensors in rank order, without gradient.

    Args:
        x: n ..., any dtype, the same shape on every rank.

    Returns:
        (W n) ..., in x's dtype; x itself where W = 1.
    """
    return x if world.size == 1 else start_gather(x.detach(), world)()


def start_gather(x: Tensor, world: World, comm_dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    """Begin to concatenate the ranks' tensors, differentiably; what is returned waits and gives the result.

    Each rank goes on with the result to its part of one loss.  Backward adds up the parts' gradients and
    gives each rank its own rows: it begins where the result's gradient is known and is waited for where that
    of x is asked for, so that what is computed between begin and wait runs beside it, forward and backward.

    Args:
        x: n ..., any dtype, the same shape on every rank. What is not floating point carries no gradient.
        world: of this process.
        comm_dtype: dtype in which wider floating point is sent, rounded once in each direction; gradients are
            summed in x's dtype.  None: send x as it is.
    """
    if world.size == 1:
        return lambda: x
    narrower = comm_dtype is not None and x.is_floating_point() and comm_dtype.itemsize < x.itemsize
    short = comm_dtype if narrower else None
    coming: list[Callable[[], Any]] = []
    own = _Wait.apply(x, coming) if x.requires_grad else x
    rows = own.detach().to(short or x.dtype).contiguous()
    rows = rows.view(torch.uint8) if x.dtype == torch.bool else rows  # gloo knows no bool
    everyones = [rows.new_empty((world.size * len(rows), *rows.shape[1:]))]
    sent = _collective("all_gather_single", "all_gather_into_tensor")(everyones[0], rows, async_op=True)

    def wait() -> Tensor:
        sent.wait()
        found = everyones.pop()
        found = found.view(x.dtype) if short is None else found.to(x.dtype)
        return _Whole.apply(own, found, coming, short) if x.requires_grad else found  # type: ignore[return-value]

    return wait


def add_over_ranks(*tensors: Tensor) -> Sequence[Tensor]:
    """The sum over ranks of each of these tensors of one dtype, in one all-reduce.

    Every rank must compute the same loss of the sums: a gradient passes as it is, and is then the derivative
    by this rank's tensors.
    """
    return _Add.apply(*tensors)  # type: ignore[return-value]


def largest_over_ranks(x: Tensor) -> Tensor:
    """The elementwise maximum over ranks, as a new tensor without gradient."""
    x = x.detach().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by `factor`."""
    return x if factor == 1 or not x.requires_grad else _ScaleGradient.apply(x, factor)  # type: ignore[return-value]


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


class _Wait(torch.autograd.Function):
    """The identity, whose gradient is still being added up over ranks when backward comes here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coming: list[Callable[[], Any]]) -> Tensor:
        ctx.coming = coming
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.coming.pop()()
        return grads[0], None


class _Whole(torch.autograd.Function):
    """The gathered rows; backward starts to add up their gradients, of which `_Wait` takes this rank's.

    In a short dtype ranks exchange their parts, as many bytes, and each adds up its own rows: on the way from
    rank to rank the sum would be rounded W - 1 times.
    """

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, whole: Tensor, coming: list[Callable[[], Any]], short: torch.dtype | None
    ) -> Tensor:
        ctx.shape, ctx.coming, ctx.short = own.shape, coming, short
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        own = grads[0].new_empty(ctx.shape)
        if ctx.short is None:
            scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
            ctx.coming.append(scatter(own, grads[0].contiguous(), async_op=True).wait)
            return own, None, None, None
        parts = grads[0].to(ctx.short).contiguous()
        received = torch.empty_like(parts)
        sent = dist.all_to_all_single(received, parts, async_op=True)
        assert sent is not None

        def add() -> None:
            sent.wait()
            torch.sum(received.view(-1, *ctx.shape), 0, dtype=own.dtype, out=own)

        ctx.coming.append(add)
        return own, None, None, None


class _Add(torch.autograd.Function):
    """Sums over ranks; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([x.reshape(-1) for x in tensors])
        dist.all_reduce(flat)
        parts = flat.split([x.numel() for x in tensors])
        return tuple(part.view(x.shape).clone() for part, x in zip(parts, tensors, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _collective(name: str, older: str) -> Callable[..., Any]:
    """A collective of torch by the first of two names that it knows: 2.13 renamed them."""
    return getattr(dist, name if hasattr(dist, name) else older)


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
