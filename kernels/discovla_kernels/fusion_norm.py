"""The adapter of fused readout rows: both products and the activation between them in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.layer_norm import unsupported as norm_unsupported
from discovla_kernels.mlp import activate, activation_slope
from discovla_kernels.tiles import accumulator, precision, product_tile

MAX_RANK = 64  # of a bottleneck, which lives in registers


def unsupported(
    x: Tensor,
    u: Tensor,
    readout_index: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    down: Tensor,
    *weights: Tensor,
) -> str:
    """Return why the kernels cannot take these tensors, or "".  The adapter's weights have any dtype."""
    if len(down) > MAX_RANK:
        return f"expected a rank of at most {MAX_RANK}, found {len(down)}"
    if other := next((w.device for w in (down, *weights) if w.device != x.device), None):
        return f"expected all tensors on {x.device}, found one on {other}"
    return norm_unsupported(x, u, readout_index, gain, shift)


@triton.jit
def _wide_product(
    z, x_ptr, matrix_ptr, rank, real, out_ptr, bias_ptr, more_ptr, n, N, W, RANK, stride_k, stride_w,
    FORWARD: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Write rows n of z matrix, n W; z: n rank, matrix: rank W through strides.

    FORWARD: add a bias, and copy x to more_ptr; else write zᵀ x, rank W, to more_ptr.
    """
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        place, here = n[:, None] * W + w[None, :], (n < N)[:, None] & (w < W)[None, :]
        weight = rank[:, None] * stride_k + w[None, :] * stride_w
        matrix = tl.load(matrix_ptr + weight, mask=real[:, None] & (w < W)[None, :], other=0.0)
        matrix, half = matrix.to(x_ptr.dtype.element_ty), z.to(x_ptr.dtype.element_ty)
        out = tl.dot(half, matrix, input_precision=PRECISION, out_dtype=ACC)
        if FORWARD:
            out += tl.load(bias_ptr + w, mask=w < W, other=0.0).to(ACC)[None, :]
        tl.store(out_ptr + place, out, mask=here)
        x = tl.load(x_ptr + place, mask=here, other=0.0)
        if FORWARD:
            tl.store(more_ptr + place, x, mask=here)
        else:
            grad = tl.dot(tl.trans(half), x, input_precision=PRECISION, out_dtype=ACC)
            tl.store(more_ptr + rank[:, None] * W + w[None, :], grad, mask=real[:, None] & (w < W)[None, :])


@triton.jit
def _adapter_forward(
    x_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, out_ptr, copy_ptr, N, W, RANK,
    BLOCK_N: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z = U quick_gelu(D x + d) + u, D: rank w, U: w rank; and a copy of x.

    Tile: BLOCK_N rows, with the bottleneck in registers.  Traffic: x read, z and the copy written, once each.
    Backward: `_adapter_backward`, from the copy of x.
    """
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rank = tl.arange(0, BLOCK_RANK).to(tl.int64)
    real = rank < RANK
    h = product_tile(x_ptr, down_ptr, n, rank, n < N, real, W, BLOCK_W, PRECISION, ACC)
    h += tl.load(down_bias_ptr + rank, mask=real, other=0.0).to(ACC)[None, :]
    _wide_product(
        activate(h, False), x_ptr, up_ptr, rank, real, out_ptr, up_bias_ptr, copy_ptr, n, N, W, RANK, 1, RANK,
        True, BLOCK_W, PRECISION, ACC,
    )  # fmt: skip


@triton.jit
def _adapter_backward(
    dz_ptr, x_ptr, down_ptr, down_bias_ptr, up_ptr, dx_ptr, part_ptr, N, W, RANK,
    BLOCK_N: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """h = D x + d computed again, g = quick_gelu(h), dh = (dz U) quick_gelu'(h), dx = dh D.

    A program writes its partial sums dD = dhᵀ x, dd = sum dh, dU = dzᵀ g and du = sum dz, which the caller
    adds, so the result does not depend on the order of programs.
    """
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rank = tl.arange(0, BLOCK_RANK).to(tl.int64)
    real = rank < RANK
    h = product_tile(x_ptr, down_ptr, n, rank, n < N, real, W, BLOCK_W, PRECISION, ACC)
    h += tl.load(down_bias_ptr + rank, mask=real, other=0.0).to(ACC)[None, :]
    g = activate(h, False).to(x_ptr.dtype.element_ty)
    part_ptr += tl.program_id(0).to(tl.int64) * (2 * RANK * W + RANK + W)
    up_part_ptr = part_ptr + RANK * W + RANK
    dh = tl.zeros((BLOCK_N, BLOCK_RANK), dtype=ACC)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        dz = tl.load(
            dz_ptr + n[:, None] * W + w[None, :], mask=(n < N)[:, None] & (w < W)[None, :], other=0.0
        )
        up = tl.load(
            up_ptr + w[:, None] * RANK + rank[None, :], mask=(w < W)[:, None] & real[None, :], other=0.0
        )
        dh = tl.dot(dz, up.to(dz.dtype), dh, input_precision=PRECISION, out_dtype=ACC)
        dup = tl.dot(tl.trans(dz), g, input_precision=PRECISION, out_dtype=ACC)
        place, here = w[:, None] * RANK + rank[None, :], (w < W)[:, None] & real[None, :]
        tl.store(up_part_ptr + place, dup, mask=here)
        tl.store(up_part_ptr + RANK * W + w, tl.sum(dz.to(ACC), axis=0), mask=w < W)
    dh = tl.where((n < N)[:, None], dh * activation_slope(h, False), 0.0)
    tl.store(part_ptr + RANK * W + rank, tl.sum(dh, axis=0), mask=real)
    _wide_product(
        dh, x_ptr, down_ptr, rank, real, dx_ptr, dx_ptr, part_ptr, n, N, W, RANK, W, 1, False, BLOCK_W,
        PRECISION, ACC,
    )  # fmt: skip


def forward(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, *, copy: Tensor
) -> Tensor:
    """Return adapter(x), n w, and write a copy of x to `copy`; all contiguous, weights of any dtype."""
    out, (n, width), rank = torch.empty_like(x), x.shape, len(down)
    tile = _tile(x, rank)
    _adapter_forward[(triton.cdiv(n, tile["BLOCK_N"]),)](
        x, down, down_bias, up, up_bias, out, copy, n, width, rank,
        PRECISION=precision(x), ACC=accumulator(x), **tile,
    )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, dx: Tensor) -> Tensor:
    """Write the gradient by x to `dx`; return those by all weights, flat, one partial sum a program."""
    (n, width), rank = x.shape, len(down)
    tile = _tile(x, rank)
    programs = triton.cdiv(n, tile["BLOCK_N"])
    acc = torch.promote_types(x.dtype, torch.float32)
    parts = x.new_empty(programs, 2 * rank * width + rank + width, dtype=acc)
    _adapter_backward[(programs,)](
        grad,
        x,
        down,
        down_bias,
        up,
        dx,
        parts,
        n,
        width,
        rank,
        PRECISION=precision(x),
        ACC=accumulator(x),
        **tile,
    )
    return parts


def _tile(x: Tensor, rank: int) -> dict[str, int]:
    return {
        "BLOCK_N": 16,
        "BLOCK_RANK": max(16, triton.next_power_of_2(rank)),
        "BLOCK_W": 128 if x.element_size() == 2 else 64,
        "num_warps": 4,
    }
