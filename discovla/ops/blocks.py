"""How a streamed op cuts its work into blocks of pairs, and the unit rows it works on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# logit of a pair left out of a softmax: its probability is exactly 0, yet 0 * log(0) stays finite
EXCLUDED = -1e9
ELEMENTS = 1 << 22  # of one block: 16 MB in float32, so that a few temporaries of that size do not matter


def pair_blocks(rows: int, columns: int, pairs: int) -> Iterator[tuple[slice, list[slice]]]:
    """Runs of rows, and for each the runs of columns: blocks of at most `pairs`, as square as they fit."""
    height = max(1, min(rows, math.isqrt(pairs)))
    width = max(1, min(columns, pairs // height))
    height = max(1, min(rows, pairs // width))
    across = list(_runs(columns, width))
    for down in _runs(rows, height):
        yield down, across


def _runs(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def expect_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError if x has another shape: a kernel would read out of bounds.  None passes."""
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {tuple(x.shape)}")


def expect_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the mask is bool and has this shape: a kernel reads its bytes."""
    expect_shape(name, mask, shape)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{name}: expected bool, found {mask.dtype}")


def wide(x: Tensor) -> torch.dtype:
    """What similarities of `x` are held and added up in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def multiplied_dtype(x: Tensor, pairs: int) -> torch.dtype:
    """What rows like `x` are multiplied in.

    Half-precision inputs are multiplied in bfloat16 from 4096 x 4096 pairs on, where similarities are no
    longer a small part of a step; below that, and for float32 inputs, products are as good as float32's.
    """
    half = pairs >= 4096**2 and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    return torch.bfloat16 if half else wide(x)


def unit_rows(x: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """x / ‖x‖ over the last axis, in the dtype that is multiplied, and 1 / ‖x‖."""
    inverse = 1 / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x))
    return (x * inverse).to(multiplied_dtype(x, pairs)), inverse


def row_runs(x: Tensor) -> Iterator[slice]:
    """Runs of the rows of x, an eighth of ELEMENTS each, where a copy of all would not be small."""
    return _runs(len(x), max(1, ELEMENTS // 8 // max(1, x[:1].numel())))


def inverse_norms(x: Tensor) -> Tensor:
    """1 / ‖x‖ of the rows of x, n d -> n, float32 at least."""
    norms = [torch.linalg.vector_norm(x[rows], dim=-1, dtype=wide(x)) for rows in row_runs(x)]
    return torch.cat(norms).reciprocal_()


def through_unit(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient by x of what has `grad` by the unit rows x / ‖x‖."""
    return (grad - unit * (unit * grad).sum(-1, keepdim=True)) * inverse


def product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x y, added up and returned in `dtype`."""
    return x @ y if x.dtype == dtype else torch.mm(x, y, out_dtype=dtype)


def numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers side by side, written on the device: a copy from the host waits for a GPU."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
