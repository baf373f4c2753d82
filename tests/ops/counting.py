"""Counts of what kernels do, taken in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder


@dataclass
class Counts:
    """Elements loaded and stored (or added atomically), lanes that are masked off left out, and the
    floating-point operations of products of tiles, padding and all."""

    loads: int = 0
    stores: int = 0
    flops: int = 0


@contextmanager
def counted(rows: Sequence[Tensor] | None = None) -> Iterator[Counts]:
    """Counts of every kernel that runs meanwhile.

    rows: count loads from these only, and not those of weights, which stay in caches.
    """
    actual = Counts()
    ranges = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in rows or ()]
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    add, dot = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_dot

    def counting_load(self, pointers, mask, *rest):
        within = rows is None or sum((pointers.data >= a) & (pointers.data < b) for a, b in ranges)
        actual.loads += int((mask.data * within).sum())
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        actual.stores += int(mask.data.sum())
        return store(self, pointers, value, mask, *rest)

    def counting_add(self, kind, pointers, value, mask, *rest):
        actual.stores += int(mask.data.sum())
        return add(self, kind, pointers, value, mask, *rest)

    def counting_dot(self, a, b, *rest):
        actual.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", counting_add)
        patch.setattr(InterpreterBuilder, "create_dot", counting_dot)
        yield actual
