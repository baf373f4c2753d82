"""How a streamed op cuts its work, and what its blocks share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = (
    1 << 22
)  # of one block: 16 MB in float32, so that a handful of temporaries stays far below a batch's size


def row_blocks(rows: int, per_row: int) -> Iterator[slice]:
    """Runs of rows that hold at most ELEMENTS, `per_row` in each row; at least one row a run."""
    size = max(1, ELEMENTS // max(1, per_row))
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def unit_rows(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last axis in float32 at least; a zero row is a fault that must show, so no epsilon."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.norm(dim=-1, keepdim=True)


def operand(unit: Tensor, given: torch.dtype, pairs: int) -> Tensor:
    """Unit rows in the dtype tensor cores multiply them in.

    Half-precision inputs are multiplied in bfloat16 from 4096 x 4096 pairs on, where the similarity is no
    longer a small part of a step; below that, and for float32 inputs, products are as good as float32's.
    """
    large = pairs >= 4096**2 and unit.is_cuda
    return unit.to(torch.bfloat16) if large and given in (torch.float16, torch.bfloat16) else unit
