"""Helpers of all kernels: a tile of products, dtypes and precisions of products, checks, traffic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

# below any logit: exp(LOWEST - m) is 0 for every finite m, and LOWEST - LOWEST is no NaN
LOWEST = tl.constexpr(-1e30)
# logit of a pair left out of a softmax, as in the reference
EXCLUDED = tl.constexpr(-1e9)


@triton.jit
def product_tile(
    x_ptr, y_ptr, x_rows, y_rows, x_real, y_real, D,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return x[x_rows] y[y_rows]ᵀ of contiguous matrices with D columns; rows that are not real count as 0.

    Products are taken in the dtype of x.  x_rows, y_rows: int64.  An element is summed in the same order in
    every tile, so equal rows give equal products.
    """
    product = tl.zeros((x_rows.shape[0], y_rows.shape[0]), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        real = d < D
        x = tl.load(x_ptr + x_rows[:, None] * D + d[None, :], mask=x_real[:, None] & real[None, :], other=0.0)
        y = tl.load(y_ptr + y_rows[None, :] * D + d[:, None], mask=y_real[None, :] & real[:, None], other=0.0)
        product = tl.dot(x, y.to(x.dtype), product, input_precision=PRECISION, out_dtype=ACC)
    return product


@triton.jit
def part_rows(n, LENGTH: tl.constexpr, OFFSET: tl.constexpr, mask_ptr, N, PARTS, HAS_MASK: tl.constexpr):
    """Return for LENGTH parts from OFFSET of samples n: their rows, which exist, which are unmasked."""
    i = OFFSET + tl.arange(0, LENGTH)
    rows = tl.reshape(n[:, None] * PARTS + i[None, :], (n.shape[0] * LENGTH,))
    exists = tl.reshape((n < N)[:, None] & (i < PARTS)[None, :], (n.shape[0] * LENGTH,))
    real = exists
    if HAS_MASK:
        real = exists & (tl.load(mask_ptr + rows, mask=exists, other=0) != 0)
    return rows, exists, real


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Elements that a kernel loads and stores, at any level of memory."""

    loads: int
    stores: int


def capability(x: Tensor) -> int:
    """Return the compute capability of the GPU of a launch, as 90; 0 for the interpreter on a CPU."""
    return 0 if x.device.type == "cpu" else int(driver.active.get_current_target().arch)


def operands_in_registers(x: Tensor) -> bool:
    """Tell if tensor cores take operands from registers, which are then few: all GPUs but 9.0 and 10.0."""
    return 0 < (number := capability(x)) < 90 or number >= 120


def accumulator(x: Tensor) -> tl.dtype:
    """Return the dtype in which products of `x` are summed."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def precision(x: Tensor) -> str:
    """Return how tensor cores multiply float32: three TF32 products, or one if torch allows TF32."""
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def dense_matmul(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x y by the vendor's library, summed and returned in `dtype`."""
    if x.dtype == dtype:
        return x @ y
    return torch.mm(x, y, out_dtype=dtype)


def mask_pointer(mask: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return a mask as bytes; without one, a pointer that is never read."""
    return stand_in if mask is None else mask.contiguous().view(torch.uint8)


def unsupported_tensors(*tensors: Tensor | None) -> str:
    """Return why no kernel can take these tensors, or ""."""
    present = [x for x in tensors if x is not None]
    on_gpu = present[0].is_cuda
    if len(dtypes := {x.dtype for x in present if x.is_floating_point() and x.ndim}) > 1:
        return f"expected all embeddings in one dtype, found {sorted(map(str, dtypes))}"
    for x in present:
        if x.device != present[0].device:
            return f"expected all tensors on {present[0].device}, found one on {x.device}"
        if x.dtype == torch.float64 and x.ndim and on_gpu:
            return "float64 has no kernel on a GPU: impl='torch' computes it"
        if x.dtype == torch.bfloat16 and x.device.type == "cpu":
            return "triton's interpreter computes bfloat16 wrongly: use float32"
    return ""
