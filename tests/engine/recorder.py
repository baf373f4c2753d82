"""A recorder of steps for machines without a GPU: it runs the function again, and sees what that touches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from discovla.engine.capture import Found

# ops whose result depends on numbers that the host reads, or that bring numbers of the host to the device
READING = {"nonzero", "masked_select", "_unique2", "unique_dim", "lift_fresh", "_local_scalar_dense", "equal"}
CHECKS = {"check_mask", "expect"}  # on a GPU these two do not read


class Touched(TorchDispatchMode):
    """Fails where an op takes a tensor that is neither known nor made by an op before, or reads a number."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = {x.untyped_storage()._cdata: x.untyped_storage() for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        filled = name == "lift_fresh" and tensors[0].dim() == 0  # x[2:] = 0 writes its number on the device
        if not checking() and not filled:
            assert name not in READING, f"{func} reads"
            masks = [x for x in tensors[1:] if x.dtype == torch.bool]
            assert not (name.startswith("index") and masks), f"{func} by a mask reads"
        for x in [] if name == "lift_fresh" else tensors:
            assert x.untyped_storage()._cdata in self.held, (
                f"{func} takes a tensor {tuple(x.shape)} of others"
            )
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.held[x.untyped_storage()._cdata] = x.untyped_storage()
        return out


def checking() -> bool:
    """Whether this is called while a mask is checked."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in CHECKS:
            return True
        frame = frame.f_back
    return False


class Rerun:
    """Runs what it is given once to record it, and at every replay, with results in the same tensors.

    known: what it may read besides what it made itself.
    """

    def __init__(self, known: Callable[[], Iterable[Tensor]]) -> None:
        self.known, self.recorded, self.replayed = known, 0, 0

    def __call__(self, function: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
        self.recorded += 1
        found = self.run(function)

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(results(found), results(self.run(function)), strict=True):
                old.copy_(new)

        for x in results(found):  # a recording does not run
            x.fill_(torch.nan)
        return found, replay

    def run(self, function: Callable[[], Found]) -> Found:
        with Touched(self.known()):
            losses, gradients = function()
        return replace(losses, total=losses.total.detach()), gradients


class Unwatched(Rerun):
    """The same, of whatever the function touches."""

    def __init__(self) -> None:
        super().__init__(tuple)

    def run(self, function: Callable[[], Found]) -> Found:
        losses, gradients = function()
        return replace(losses, total=losses.total.detach()), gradients


def results(found: Found) -> list[Tensor]:
    """All tensors that a step gives."""
    losses, gradients = found
    return [losses.total, *losses.terms.values(), *(x for x in gradients if x is not None)]
