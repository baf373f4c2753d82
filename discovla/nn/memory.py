"""What a transformer block keeps for backward, and what it computes again instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from discovla.ops.dispatch import Memory

# What is kept of a token in a block, in widths of its rows, the MLP hiding four: x and the MLP's input in all
# but the last mode, q, k and v in the first two, what the MLP hides in the first.
WIDTHS: dict[Memory, int] = {
    "keep": 9,
    "recompute_mlp": 5,
    "recompute_projections": 2,
    "recompute_blocks": 1,
}
SHARE = 0.8  # of the free memory that a tower may fill


_RECOMPUTING: ContextVar[bool] = ContextVar("_RECOMPUTING", default=False)


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), of which backward computes again what it needs; the inputs alone are kept.

    Args:
        function: without randomness; parameters it uses get their gradients.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _set_recomputing()),
    )


def recomputing() -> bool:
    """Return True while backward recomputes a `checkpointed` function, whose result is then never read."""
    return _RECOMPUTING.get()


@contextmanager
def _set_recomputing() -> Iterator[None]:
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


def choose_memory(needed: int, free: int) -> Memory:
    """The first mode of WIDTHS whose share of `needed` bytes is at most SHARE of `free` ones, or the last.

    needed: one width of every token in every block.
    """
    for mode, widths in WIDTHS.items():
        if widths * needed <= SHARE * free:
            return mode
    return "recompute_blocks"


class MemoryPlan:
    """The mode of a tower, chosen by the GPU's free memory and kept until more tokens come than it is for.

    Args:
        layers: blocks of the tower.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.largest = 0
        self.mode: Memory = "keep"

    def of(self, wanted: Memory, x: Tensor) -> Memory:
        """The mode for rows x (... w); "auto" keeps all on a CPU, and where there is no backward."""
        if wanted != "auto":
            return wanted
        if not x.is_cuda or not torch.is_grad_enabled():
            return "keep"
        if x.numel() > self.largest:
            self.largest = x.numel()
            self.mode = choose_memory(self.layers * x.numel() * x.element_size(), free_bytes(x.device))
        return self.mode


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a GPU, what torch holds without using it included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
