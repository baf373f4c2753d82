"""Memory modes of a transformer block: what it keeps for backward, and what backward recomputes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from discovla.ops.dispatch import Memory

# Numbers kept for each token and block, in widths of its row, if the MLP is four times as wide: x and the
# MLP's input (1 each) in all modes but the last, q, k and v in the first two, the MLP's hidden in the first.
WIDTHS: dict[Memory, int] = {
    "keep": 9,
    "recompute_mlp": 5,
    "recompute_projections": 2,
    "recompute_blocks": 1,
}
SHARE = 0.8  # of the free memory, for the kept rows of a tower

_RECOMPUTING: ContextVar[bool] = ContextVar("_RECOMPUTING", default=False)


def in_memory_mode(
    mode: Memory, attention: Callable[..., Any], mlp: Callable[..., Any], *inputs: Tensor | None
) -> Any:
    """Return mlp(*attention(*inputs)); backward recomputes what `mode` names.

    Args:
        attention: projections and attention of a block.  mlp: its second half.
    """
    match mode:
        case "recompute_mlp":
            return checkpointed(mlp, *attention(*inputs))
        case "recompute_projections":
            return checkpointed(mlp, *checkpointed(attention, *inputs))
        case "recompute_blocks":
            return checkpointed(lambda *inputs: mlp(*attention(*inputs)), *inputs)
    return mlp(*attention(*inputs))


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Return function(*inputs) and keep only the inputs; backward recomputes the rest.

    Args:
        function: without randomness; parameters in its closure get gradients.
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
    """Return True while backward recomputes a `checkpointed` function, whose result is then not read."""
    return not torch.compiler.is_compiling() and _RECOMPUTING.get()


@contextmanager
def _set_recomputing() -> Iterator[None]:
    token = _RECOMPUTING.set(True)
    try:
        yield
    finally:
        _RECOMPUTING.reset(token)


def choose_memory(width_bytes: int, free: int) -> Memory:
    """The first mode of WIDTHS that takes at most SHARE of the free bytes, or the last.

    Args:
        width_bytes: bytes of one row of every token in every block.
    """
    for mode, widths in WIDTHS.items():
        if widths * width_bytes <= SHARE * free:
            return mode
    return "recompute_blocks"


class MemoryPlan:
    """The memory mode of a tower of `layers` blocks, chosen again only for a larger batch than before."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.largest = 0
        self.mode: Memory = "keep"

    def choose(self, memory: Memory, x: Tensor) -> Memory:
        """The mode for rows x (... w); "auto" is "keep" on a CPU and without backward."""
        if memory != "auto":
            return memory
        if not x.is_cuda or not torch.is_grad_enabled():
            return "keep"
        if x.numel() > self.largest:
            self.largest = x.numel()
            self.mode = choose_memory(self.layers * x.numel() * x.element_size(), free_bytes(x.device))
        return self.mode


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a GPU, torch's cached and unused memory included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
