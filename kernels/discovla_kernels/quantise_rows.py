"""Round rows to FP8 in one pass, each with the scale by which it fills the range."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.mlp import activate, activation_slope
from discovla_kernels.tiles import unsupported_tensors

MAX_WIDTH = 16384  # columns of a row that one program holds
ELEMENTS = 4096  # of a tile of narrower rows


def unsupported(x: Tensor, hidden: Tensor | None = None) -> str:
    """Return why the kernel cannot take these rows, or ""."""
    if x.dtype == torch.float64:
        return "float64 has no kernel: impl='reference' computes it"
    if x.shape[-1] > MAX_WIDTH:
        return f"expected rows of at most {MAX_WIDTH} numbers, found {x.shape[-1]}"
    return unsupported_tensors(x, hidden)


@triton.jit
def _e4m3(x):
    """Return float32 numbers of -448..448 as bytes of e4m3, rounded to nearest, ties to even; NaN stays NaN.

    With q = 2^(e - 3) the step of e4m3 at |x| in [2^e, 2^(e + 1)), e at least -6, the last bits of
    |x| + 2^23 q are |x| / q as an integer, rounded; that counts the numbers of e4m3 from 2^(e - 3) 8 on.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    exponent = tl.maximum(size >> 23, 121)  # 127 more than e
    large = (exponent + 20) << 23
    rounded = size.to(tl.float32, bitcast=True) + large.to(tl.float32, bitcast=True)
    code = (exponent - 121) * 8 + (rounded.to(tl.int32, bitcast=True) - large)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantise_rows_forward(
    x_ptr, hidden_ptr, columns_ptr, bytes_ptr, scale_ptr, T, W, LARGEST: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, ACTIVATES: tl.constexpr, HAS_HIDDEN: tl.constexpr, GELU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """bytes[t, w] = y[t, w] / scale[t] in e4m3; scale[t] = max |y[t]| / LARGEST, or 1 for a row of zeros.

    y = columns x; with ACTIVATES columns act(x); with HAS_HIDDEN columns x act'(hidden).
    Tile: BLOCK_T whole rows in registers, in float32.  Traffic: each entry read once, one byte written.
    """
    t, w = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_W)
    here = (t < T)[:, None] & (w < W)[None, :]
    place = t[:, None] * W + w[None, :]
    x = tl.load(x_ptr + place, mask=here, other=0).to(tl.float32)
    if HAS_HIDDEN:
        hidden = tl.load(hidden_ptr + place, mask=here, other=0).to(tl.float32)
        x *= activation_slope(hidden, GELU)
    elif ACTIVATES:
        x = activate(x, GELU)
    if HAS_COLUMNS:
        x *= tl.load(columns_ptr + w, mask=w < W, other=0)[None, :]
    largest = tl.max(tl.abs(x), axis=1)
    nonzero, limit = largest > LARGEST / 3.4028234e38, tl.full((BLOCK_T,), LARGEST, tl.float32)
    out = x * tl.where(nonzero, tl.div_rn(limit, tl.where(nonzero, largest, 1.0)), 1.0)[:, None]
    out = tl.clamp(out, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(bytes_ptr + place, _e4m3(out), mask=here)
    tl.store(scale_ptr + t, tl.where(nonzero, tl.div_rn(largest, limit), 1.0), mask=t < T)


def quantise_rows(
    x: Tensor, column_scale: Tensor | None, activation: str, hidden: Tensor | None, largest: float
) -> tuple[Tensor, Tensor]:
    """Return bytes of e4m3, t w, uint8, and scales, t 1, float32, of contiguous rows t w.

    activation: "" for none.  hidden: t w, where its derivative is taken; None to apply the activation.
    """
    rows, width = x.shape
    out, scale = torch.empty_like(x, dtype=torch.uint8), x.new_empty(rows, 1, dtype=torch.float32)
    block_w = triton.next_power_of_2(width)
    block_t = max(1, ELEMENTS // block_w)
    _quantise_rows_forward[(triton.cdiv(rows, block_t),)](
        x, x if hidden is None else hidden.contiguous(), x if column_scale is None else column_scale, out,
        scale, rows, width, LARGEST=largest, HAS_COLUMNS=column_scale is not None, ACTIVATES=activation != "",
        HAS_HIDDEN=hidden is not None, GELU=activation == "gelu", BLOCK_T=block_t, BLOCK_W=block_w,
        num_warps=8 if block_w > ELEMENTS else 4,
    )  # fmt: skip
    return out, scale
