"""Mean of unit rows: norm, division and mean of a sample's rows in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import accumulator, mask_pointer, unsupported_tensors

MAX_WIDTH = 8192  # of a row, which lives in registers


def unsupported(x: Tensor, *others: Tensor | None) -> str:
    """Return why the kernels cannot take rows n k d, or ""."""
    if x.shape[-1] > MAX_WIDTH:
        return f"expected rows of at most {MAX_WIDTH} numbers, found {x.shape[-1]}"
    return unsupported_tensors(x, *others)


@triton.jit
def _row(x_ptr, mask_ptr, row, D, HAS_MASK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Return x / ‖x‖ of a row, 1 / ‖x‖, and 1 if the row counts; all three are 0 if it does not."""
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(ACC)
    real = row >= 0
    if HAS_MASK:
        real = tl.load(mask_ptr + row) != 0
    inverse = tl.where(real, 1 / tl.sqrt(tl.sum(x * x, axis=0)), 0.0)
    return tl.where(real, x * inverse, 0.0), inverse, tl.where(real, 1.0, 0.0)


@triton.jit
def _unit_mean_forward(
    x_ptr, mask_ptr, out_ptr, K, D, HAS_MASK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr
):
    """out = sum_k m_k x_k / ‖x_k‖ / max(1, sum_k m_k).

    Tile: one sample, row after row, with the sum in registers.  Traffic: each row read once.
    Backward: `_unit_mean_backward`.
    """
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    total, count = tl.zeros((BLOCK_D,), dtype=ACC), tl.full((), 0.0, dtype=ACC)
    for k in range(0, K):
        unit, _, real = _row(x_ptr, mask_ptr, n * K + k, D, HAS_MASK, BLOCK_D, ACC)
        total += unit
        count += real
    tl.store(out_ptr + n * D + d, total / tl.maximum(count, 1.0), mask=d < D)


@triton.jit
def _unit_mean_backward(
    grad_ptr, x_ptr, mask_ptr, dx_ptr, K, D, HAS_MASK: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr
):
    """dx_k = m_k (g - u (u·g)) / ‖x_k‖ / max(1, sum_k m_k), u = x_k / ‖x_k‖. Tile: as forward."""
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    count = tl.full((), 0.0, dtype=ACC)
    for k in range(0, K):
        real = n >= 0
        if HAS_MASK:
            real = tl.load(mask_ptr + n * K + k) != 0
        count += tl.where(real, 1.0, 0.0)
    grad = tl.load(grad_ptr + n * D + d, mask=d < D, other=0.0).to(ACC) / tl.maximum(count, 1.0)
    for k in range(0, K):
        unit, inverse, _ = _row(x_ptr, mask_ptr, n * K + k, D, HAS_MASK, BLOCK_D, ACC)
        dx = (grad - unit * tl.sum(unit * grad, axis=0)) * inverse
        tl.store(dx_ptr + (n * K + k) * D + d, dx, mask=d < D)


def forward(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the means, n d, of rows n k d, contiguous; mask: n k, bool."""
    n, k, d = x.shape
    out = x.new_empty(n, d)
    _unit_mean_forward[(n,)](x, mask_pointer(mask, x), out, k, d, **_settings(x, mask))
    return out


def backward(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the gradient by x from that by the means, n d, contiguous."""
    (n, k, d), dx = x.shape, torch.empty_like(x)
    _unit_mean_backward[(n,)](grad, x, mask_pointer(mask, x), dx, k, d, **_settings(x, mask))
    return dx


def _settings(x: Tensor, mask: Tensor | None) -> dict[str, object]:
    return {
        "HAS_MASK": mask is not None,
        "BLOCK_D": triton.next_power_of_2(x.shape[2]),
        "ACC": accumulator(x),
        "num_warps": 4,
    }
