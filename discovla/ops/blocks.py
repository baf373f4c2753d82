"""Helpers that ops share: shape checks, blocks of pairs, unit rows and dtypes of products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# logit of a pair left out of a softmax: its probability is exactly 0, yet 0 * log(0) stays finite
EXCLUDED = -1e9
ELEMENTS = 1 << 22  # of one block: 16 MB in float32, small beside a batch even with a few temporaries


def expect_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError if x has another shape: a kernel would read out of bounds.  None passes."""
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {tuple(x.shape)}")


def expect_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the mask is bool and has this shape: a kernel reads its bytes.  None passes."""
    expect_shape(name, mask, shape)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{name}: expected bool, found {mask.dtype}")


def row_strips(rows: int, columns: int, pairs: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield strips of rows, each with its slices of columns: blocks of at most `pairs`, nearly square."""
    height = max(1, min(rows, math.isqrt(pairs)))
    width = max(1, min(columns, pairs // height))
    height = max(1, min(rows, pairs // width))
    across = list(_slices(columns, width))
    for strip in _slices(rows, height):
        yield strip, across


def pair_blocks(rows: int, columns: int, pairs: int) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks of `row_strips` one by one: slices of rows and of columns."""
    for strip, across in row_strips(rows, columns, pairs):
        for block in across:
            yield strip, block


def row_chunks(x: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of x with an eighth of ELEMENTS each, for temporaries of x's size."""
    return _slices(len(x), max(1, ELEMENTS // 8 // max(1, x[:1].numel())))


def _slices(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def select_rows(x: Tensor | None, rows: slice) -> Tensor | None:
    """Return x[rows], or None for no tensor."""
    return None if x is None else x[rows]


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which similarities of `x` are held and summed: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def norm_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which torch's layer norm takes rows like `x`.

    On a CPU float32 at least.  Elsewhere their own: torch's kernel for GPUs computes halves in float32.
    """
    return sum_dtype(x) if x.device.type == "cpu" else x.dtype


def product_dtype(x: Tensor, pairs: int) -> torch.dtype:
    """Return the dtype in which rows like `x` are multiplied.

    On a GPU half-precision inputs are multiplied in bfloat16 from 4096 x 4096 pairs on, where similarities
    become a large part of a step; below that, and for float32 inputs, in float32 at least.
    """
    half = pairs >= 4096**2 and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    return torch.bfloat16 if half else sum_dtype(x)


def unit_rows(x: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Return x / ‖x‖ over the last axis, in `product_dtype`, and 1 / ‖x‖."""
    inverse = 1 / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sum_dtype(x))
    return (x * inverse).to(product_dtype(x, pairs)), inverse


def unit_rows_backward(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Turn the gradient by unit rows x / ‖x‖ into that by x; inverse: 1 / ‖x‖."""
    return (grad - unit * (unit * grad).sum(-1, keepdim=True)) * inverse


def inverse_norms(x: Tensor) -> Tensor:
    """Return 1 / ‖x‖ of the rows of x, n d -> n, float32 at least."""
    norms = [torch.linalg.vector_norm(x[rows], dim=-1, dtype=sum_dtype(x)) for rows in row_chunks(x)]
    return torch.cat(norms).reciprocal_()


def matmul(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x y, summed and returned in `dtype`."""
    return x @ y if x.dtype == dtype else torch.mm(x, y, out_dtype=dtype)


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a few numbers as a tensor filled on the device: a copy from the host would sync."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
