"""A recorder for machines without a GPU: a replay runs the function again and checks its accesses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from discovla.engine.capture import StepResult

# ops whose result depends on values that the host reads, or that copy values of the host to the device
READING = {"nonzero", "masked_select", "_unique2", "unique_dim", "lift_fresh", "_local_scalar_dense", "equal"}
CHECKS = {"check_mask", "expect"}  # on a GPU these do not read


class Touched(TorchDispatchMode):
    """Fails if an op takes a tensor that is neither known nor made by an earlier op, or reads a number."""

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
    """Return True if called while a mask is checked."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in CHECKS:
            return True
        frame = frame.f_back
    return False


class Rerun:
    """Runs a function once to record it and again at every replay, with results in the same tensors.

    known: tensors that the function may read besides those it made.
    """

    def __init__(self, known: Callable[[], Iterable[Tensor]]) -> None:
        self.known, self.recorded, self.replayed = known, 0, 0

    def __call__(self, function: Callable[[], StepResult]) -> tuple[StepResult, Callable[[], None]]:
        self.recorded += 1
        result = self.run(function)

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(tensors_of(result), tensors_of(self.run(function)), strict=True):
                old.copy_(new)

        for x in tensors_of(result):  # recording does not run the step
            x.fill_(torch.nan)
        return result, replay

    def run(self, function: Callable[[], StepResult]) -> StepResult:
        with Touched(self.known()):
            losses, gradients = function()
        return replace(losses, total=losses.total.detach()), gradients


class Unwatched(Rerun):
    """A recorder that does not check accesses."""

    def __init__(self) -> None:
        super().__init__(tuple)

    def run(self, function: Callable[[], StepResult]) -> StepResult:
        losses, gradients = function()
        return replace(losses, total=losses.total.detach()), gradients


def tensors_of(result: StepResult) -> list[Tensor]:
    """Return all tensors of a step's result."""
    losses, gradients = result
    scalars = [losses.total, *losses.terms.values(), losses.grad_norm]
    return [x for x in (*scalars, *gradients) if x is not None]
