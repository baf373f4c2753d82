"""Matrix products that apply the activation, or its derivative, to a tile before it is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import accumulator, precision, unsupported_tensors

ROOT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0
QUICK = tl.constexpr(1.702)


def unsupported(*tensors: Tensor | None) -> str:
    """Return why the kernels cannot take these tensors, or ""."""
    return unsupported_tensors(*tensors)


@triton.jit
def activate(h, GELU: tl.constexpr):
    """Return h Phi(h) with GELU, else h sigmoid(1.702 h)."""
    return h * 0.5 * (1 + tl.erf(h * ROOT_HALF)) if GELU else h * tl.sigmoid(h * QUICK)


@triton.jit
def activation_slope(h, GELU: tl.constexpr):
    """Return the derivative of `activate`."""
    if GELU:
        slope = 0.5 * (1 + tl.erf(h * ROOT_HALF)) + h * DENSITY * tl.exp(-0.5 * h * h)
    else:
        s = tl.sigmoid(h * QUICK)
        slope = s * (1 + h * QUICK * (1 - s))
    return slope


@triton.jit
def _place(R, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return rows and columns of a program's tile; GROUP row tiles pass through the columns together."""
    down, across = tl.cdiv(R, BLOCK_R), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * across)
    within = tl.program_id(0) % (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    r = (group * GROUP + within % height).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return r, (within // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _product(
    x_ptr, weight_ptr, r, n, R, N, K, stride_wn, stride_wk, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return sum_k x[r, k] weight[n, k] for a contiguous x and a weight of any strides."""
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + r[:, None] * K + k[None, :]
    w_ptrs = weight_ptr + n[None, :] * stride_wn + k[:, None].to(tl.int64) * stride_wk
    product = tl.zeros((r.shape[0], n.shape[0]), dtype=ACC)
    for start in range(0, K, BLOCK_K):
        here = k < K - start
        x = tl.load(x_ptrs, mask=(r < R)[:, None] & here[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(n < N)[None, :] & here[:, None], other=0.0)
        product = tl.dot(x, w, product, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    return product


@triton.jit
def _mlp_forward(
    x_ptr, weight_ptr, bias_ptr, h_ptr, g_ptr, R, N, K, stride_wn, stride_wk, GELU: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """h = x Wᵀ + b, g = act(h).

    Tile: BLOCK_R rows x BLOCK_N hidden units in registers; act is applied before h is rounded.  KEEP also
    writes h, for backward; g serves the product that follows and is not kept.
    Traffic: R N K (1 / BLOCK_R + 1 / BLOCK_N) elements, mostly from L2; R N written once or twice.
    Backward: `_mlp_backward`.
    """
    r, n = _place(R, N, BLOCK_R, BLOCK_N, GROUP)
    h = _product(x_ptr, weight_ptr, r, n, R, N, K, stride_wn, stride_wk, BLOCK_K, PRECISION, ACC)
    h += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(ACC)[None, :]
    place, here = r[:, None] * N + n[None, :], (r < R)[:, None] & (n < N)[None, :]
    if KEEP:
        tl.store(h_ptr + place, h, mask=here)
    tl.store(g_ptr + place, activate(h, GELU), mask=here)


@triton.jit
def _mlp_backward(
    dz_ptr, weight_ptr, h_ptr, dh_ptr, R, N, K, stride_wn, stride_wk, GELU: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dh = (dz W) act'(h), W: K x N, the second weight, and h of forward.

    Tile: BLOCK_R rows x BLOCK_N hidden units in registers; the tile of h is loaded after the product.
    """
    r, n = _place(R, N, BLOCK_R, BLOCK_N, GROUP)
    dg = _product(dz_ptr, weight_ptr, r, n, R, N, K, stride_wn, stride_wk, BLOCK_K, PRECISION, ACC)
    place, here = r[:, None] * N + n[None, :], (r < R)[:, None] & (n < N)[None, :]
    h = tl.load(h_ptr + place, mask=here, other=0.0).to(ACC)
    tl.store(dh_ptr + place, dg * activation_slope(h, GELU), mask=here)


def hidden(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """Return h (empty unless `keep`) and act(h), h = x weightᵀ + bias; x: r k, contiguous, weight: n k."""
    (rows, k), n = x.shape, len(weight)
    g = x.new_empty(rows, n)
    h = torch.empty_like(g) if keep else x.new_empty(0)
    tile = _tile(x, rows, n)
    _mlp_forward[_grid(tile, rows, n)](
        x, weight, bias, h, g, rows, n, k, weight.stride(0), weight.stride(1), GELU=gelu, KEEP=keep,
        PRECISION=precision(x), ACC=accumulator(x), **tile,
    )  # fmt: skip
    return h, g


def hidden_gradient(grad: Tensor, weight: Tensor, h: Tensor, gelu: bool) -> Tensor:
    """Return (grad weight) act'(h); grad: r k, contiguous, weight: k n, h: r n."""
    (rows, k), n = grad.shape, weight.shape[1]
    dh = torch.empty_like(h)
    tile = _tile(grad, rows, n)
    _mlp_backward[_grid(tile, rows, n)](
        grad, weight, h, dh, rows, n, k, weight.stride(1), weight.stride(0), GELU=gelu,
        PRECISION=precision(grad), ACC=accumulator(grad), **tile,
    )  # fmt: skip
    return dh


def _grid(tile: dict[str, int], rows: int, n: int) -> tuple[int]:
    return (triton.cdiv(rows, tile["BLOCK_R"]) * triton.cdiv(n, tile["BLOCK_N"]),)


def _tile(x: Tensor, rows: int, n: int) -> dict[str, int]:
    """Return large tiles if they still fill the processors, else small ones.

    With 256 columns the registers of activation and product would spill.
    """
    half = x.element_size() == 2
    large = rows * n >= 1 << 21
    return {
        "BLOCK_R": 128 if large else 32,
        "BLOCK_N": 128 if large else 64,
        "BLOCK_K": 64 if half else 32,
        "GROUP": 8,
        "num_warps": 8 if large else 4,
        "num_stages": 3,
    }
