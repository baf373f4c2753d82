"""The processes of a run, one or many, on CPU or GPU, and the collectives that training needs."""

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
import torch.distributed.nn.functional  # imported later, it would keep the process group alive
from torch import Tensor

from discovla.engine.lifecycle.peers import Peers, find_peers

GradScale = Literal["exact", "official"]
CommDtype = Literal["compute", "fp32"]

_GLOO_EXIT_SECONDS = 0.1  # for gloo's threads to end; they need microseconds on an idle machine


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that train together.

    rank: 0 .. size - 1.  local_rank: rank on this machine, the index of its GPU.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on rank 0, which writes files and logs."""
        return self.rank == 0


def join_world(
    device: str = "auto",
    *,
    timeout: timedelta = timedelta(minutes=30),
    rendezvous_timeout: float | None = None,
    on_peers: Callable[[World, Peers], None] | None = None,
) -> World:
    """Join the processes that a launcher started (deepspeed, torchrun), or return a world of one.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda".
        timeout: of every collective.
        rendezvous_timeout: seconds to wait for all processes; default: `timeout`.
        on_peers: called once all processes are known and before the first collective.

    Returns:
        The world. On ranks > 0 log records below ERROR and warnings are dropped.

    Raises:
        ValueError: incomplete launcher variables, or fewer GPUs than processes on this machine.
        TimeoutError: processes are missing; names them.
    """
    rank, size, local_rank = _launched_ranks()
    world = World(rank=rank, size=size, local_rank=local_rank, device=choose_device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size > 1 and not dist.is_initialized():
        seconds = timeout.total_seconds() if rendezvous_timeout is None else rendezvous_timeout
        peers = find_peers(rank, size, seconds)
        if on_peers is not None:
            on_peers(world, peers)
        peers.store.set_timeout(timeout)
        dist.init_process_group(
            _backend(world), store=peers.store, rank=rank, world_size=size, timeout=timeout
        )
    if not world.first:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    return world


def leave_world() -> None:
    """Leave the process group, if one was joined.

    gloo's threads end with the last reference to the group.  One that still releases a tensor while the
    interpreter exits aborts the process, so they get time to end if a model or DeepSpeed keeps a reference.
    """
    logging.disable(logging.NOTSET)
    if dist.is_initialized():
        gloo = dist.get_backend() == "gloo"
        dist.destroy_process_group()
        if gloo:
            time.sleep(_GLOO_EXIT_SECONDS)


def init_single_process_group(world: World) -> None:
    """Make the process group of one process that DeepSpeed needs, without opening a port.

    Also sets the launcher's variables, which DeepSpeed reads.
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
    """Start to concatenate the ranks' tensors, differentiably; return a function that waits for the result.

    Each rank computes its part of one loss from the result.  Backward sums the gradients over ranks and gives
    each rank its own rows.  That exchange starts when the result's gradient is known and is waited for when
    the gradient of x is needed, so computation between start and wait overlaps with it in both directions.

    Args:
        x: n ..., any dtype, the same shape on every rank. Integers and booleans carry no gradient.
        world: of this process.
        comm_dtype: dtype in which wider floating point is sent, rounded once in each direction; gradients are
            summed in x's dtype.  None: send x as it is.
    """
    if world.size == 1:
        return lambda: x
    narrower = comm_dtype is not None and x.is_floating_point() and comm_dtype.itemsize < x.itemsize
    short = comm_dtype if narrower else None
    pending: list[Callable[[], Any]] = []
    own = _WaitInBackward.apply(x, pending) if x.requires_grad else x
    rows = own.detach().to(short or x.dtype).contiguous()
    rows = rows.view(torch.uint8) if x.dtype == torch.bool else rows  # gloo knows no bool
    buffers = [rows.new_empty((world.size * len(rows), *rows.shape[1:]))]
    work = _collective("all_gather_single", "all_gather_into_tensor")(buffers[0], rows, async_op=True)

    def wait() -> Tensor:
        work.wait()
        gathered = buffers.pop()
        gathered = gathered.view(x.dtype) if short is None else gathered.to(x.dtype)
        if not x.requires_grad:
            return gathered
        return _ScatterInBackward.apply(own, gathered, pending, short)  # type: ignore[return-value]

    return wait


def add_over_ranks(*tensors: Tensor) -> Sequence[Tensor]:
    """Sum each of these tensors of one dtype over ranks, in one all-reduce.

    Backward is the identity: it is the derivative by this rank's tensors if every rank computes the same loss
    from the sums.
    """
    return _Add.apply(*tensors)  # type: ignore[return-value]


def largest_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise maximum over ranks, as a new tensor without gradient."""
    x = x.detach().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x with a gradient that is multiplied by `factor`."""
    return x if factor == 1 or not x.requires_grad else _ScaleGradient.apply(x, factor)  # type: ignore[return-value]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return every rank's picklable value, in rank order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(x: Tensor, world: World) -> Tensor:
    """Return the sum of x over ranks as a new tensor without gradient."""
    x = x.detach().clone()
    if world.size > 1:
        dist.all_reduce(x)
    return x


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        all_reduce_sum(torch.zeros(1, device=world.device), world).item()


class _WaitInBackward(torch.autograd.Function):
    """Identity; backward waits for the exchange that `_ScatterInBackward` started."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: list[Callable[[], Any]]) -> Tensor:
        ctx.pending = pending
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.pending.pop()()
        return grads[0], None


class _ScatterInBackward(torch.autograd.Function):
    """Return the gathered rows; backward starts the sum of their gradients over ranks.

    In a dtype narrower than x's, ranks exchange their rows (the same number of bytes) and each sums its own:
    a reduce-scatter would round the sum W - 1 times."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor, gathered: Tensor, pending: list[Callable[[], Any]], short: torch.dtype | None
    ) -> Tensor:
        ctx.shape, ctx.pending, ctx.short = own.shape, pending, short
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        own = grads[0].new_empty(ctx.shape)
        if ctx.short is None:
            scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
            ctx.pending.append(scatter(own, grads[0].contiguous(), async_op=True).wait)
            return own, None, None, None
        parts = grads[0].to(ctx.short).contiguous()
        received = torch.empty_like(parts)
        work = dist.all_to_all_single(received, parts, async_op=True)
        assert work is not None

        def add() -> None:
            work.wait()
            torch.sum(received.view(-1, *ctx.shape), 0, dtype=own.dtype, out=own)

        ctx.pending.append(add)
        return own, None, None, None


class _Add(torch.autograd.Function):
    """Sum over ranks; backward is the identity."""

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
    """Return a collective of torch by its name since 2.13 or by its older one."""
    return getattr(dist, name if hasattr(dist, name) else older)


def _launched_ranks() -> tuple[int, int, int]:
    """Read rank, size and local rank from the launcher's variables; (0, 1, 0) without them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(
            f"expected a launcher's RANK, WORLD_SIZE and LOCAL_RANK, found no {', '.join(missing)}"
        )
    rank, size, local_rank = (int(os.environ[name]) for name in names)
    return rank, size, local_rank


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """Return the device of this process."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, found {device!r}")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and present == 0):
        return torch.device("cpu")
    if local_rank >= present:
        raise ValueError(f"device: expected a GPU for local rank {local_rank}, found {present} GPUs here")
    return torch.device("cuda", local_rank)


def _backend(world: World) -> str:
    """Return gloo, with nccl for tensors on GPUs."""
    return "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
