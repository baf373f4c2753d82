"""The bottleneck of fused readout rows: both its products and the activation between them in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.mlp import activate, activation_slope
from discovla_kernels.tiles import accumulator, precision, product_tile, unsupported

MAX_RANK = 64  # of a bottleneck: it lives in registers


def supports(x: Tensor, down: Tensor, *others: Tensor) -> str:
    """Why the kernels do not take these tensors; empty where they do."""
    if len(down) > MAX_RANK:
        return f"expected a rank of at most {MAX_RANK}, found {len(down)}"
    return unsupported(x, down, *others)


@triton.jit
def _wide_product(
    z, matrix_ptr, rank, real, out_ptr, bias_ptr, n, N, W, RANK, stride_k, stride_w, HAS_BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes rows n of z matrix (+ bias), z: n rank, rank by W through strides, W in steps."""
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        place = rank[:, None] * stride_k + w[None, :] * stride_w
        matrix = tl.load(matrix_ptr + place, mask=real[:, None] & (w < W)[None, :], other=0.0)
        out = tl.dot(z.to(matrix.dtype), matrix, input_precision=PRECISION, out_dtype=ACC)
        if HAS_BIAS:
            out += tl.load(bias_ptr + w, mask=w < W, other=0.0).to(ACC)[None, :]
        tl.store(out_ptr + n[:, None] * W + w[None, :], out, mask=(n < N)[:, None] & (w < W)[None, :])


@triton.jit
def _adapter_forward(
    x_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, out_ptr, N, W, RANK, BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z = U quick_gelu(D x + d) + u, D: rank w, U: w rank.

    Tile: BLOCK_N rows; the bottleneck stays in registers. Traffic: x read and z written once.
    Backward: `_adapter_backward`, from x alone.
    """
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rank = tl.arange(0, BLOCK_RANK).to(tl.int64)
    real = rank < RANK
    h = product_tile(x_ptr, down_ptr, n, rank, n < N, real, W, BLOCK_W, PRECISION, ACC)
    h += tl.load(down_bias_ptr + rank, mask=real, other=0.0).to(ACC)[None, :]
    _wide_product(
        activate(h, False), up_ptr, rank, real, out_ptr, up_bias_ptr, n, N, W, RANK, 1, RANK, True, BLOCK_W,
        PRECISION, ACC,
    )  # fmt: skip


@triton.jit
def _adapter_backward(
    dz_ptr, x_ptr, down_ptr, down_bias_ptr, up_ptr, dx_ptr, g_ptr, dh_ptr, N, W, RANK,
    BLOCK_N: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """h = D x + d again, g = quick_gelu(h), dh = (dz U) quick_gelu'(h), dx = dh D.

    g and dh, n rank, are written for the weights' gradients: dU = dzᵀ g, dD = dhᵀ x.
    """
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rank = tl.arange(0, BLOCK_RANK).to(tl.int64)
    real = rank < RANK
    h = product_tile(x_ptr, down_ptr, n, rank, n < N, real, W, BLOCK_W, PRECISION, ACC)
    h += tl.load(down_bias_ptr + rank, mask=real, other=0.0).to(ACC)[None, :]
    dh = tl.zeros((BLOCK_N, BLOCK_RANK), dtype=ACC)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        dz = tl.load(
            dz_ptr + n[:, None] * W + w[None, :], mask=(n < N)[:, None] & (w < W)[None, :], other=0.0
        )
        up = tl.load(
            up_ptr + w[:, None] * RANK + rank[None, :], mask=(w < W)[:, None] & real[None, :], other=0.0
        )
        dh = tl.dot(dz, up, dh, input_precision=PRECISION, out_dtype=ACC)
    dh *= activation_slope(h, False)
    place, here = n[:, None] * RANK + rank[None, :], (n < N)[:, None] & real[None, :]
    tl.store(g_ptr + place, activate(h, False), mask=here)
    tl.store(dh_ptr + place, dh, mask=here)
    _wide_product(
        dh, down_ptr, rank, real, dx_ptr, dx_ptr, n, N, W, RANK, W, 1, False, BLOCK_W, PRECISION, ACC
    )


def forward(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """n w to n w; all contiguous."""
    out, (n, width) = torch.empty_like(x), x.shape
    tile = _tile(x, len(down))
    _adapter_forward[(triton.cdiv(n, tile["BLOCK_N"]),)](
        x, down, down_bias, up, up_bias, out, n, width, len(down), PRECISION=precision(x),
        ACC=accumulator(x), **tile,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient by x, n w, the activated bottleneck and the gradient before it, n rank each."""
    dx, (n, width), rank = torch.empty_like(x), x.shape, len(down)
    g, dh = x.new_empty(n, rank), x.new_empty(n, rank)
    tile = _tile(x, rank)
    _adapter_backward[(triton.cdiv(n, tile["BLOCK_N"]),)](
        grad, x, down, down_bias, up, dx, g, dh, n, width, rank, PRECISION=precision(x), ACC=accumulator(x),
        **tile,
    )  # fmt: skip
    return dx, g, dh


def _tile(x: Tensor, rank: int) -> dict[str, int]:
    return {
        "BLOCK_N": 16,
        "BLOCK_RANK": max(16, triton.next_power_of_2(rank)),
        "BLOCK_W": 128 if x.element_size() == 2 else 64,
        "num_warps": 4,
    }
