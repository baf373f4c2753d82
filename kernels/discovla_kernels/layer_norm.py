"""Residual sum and layer norm with frozen gain and shift, a row in registers from load to store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import accumulator, unsupported_tensors

ELEMENTS = 4096  # of a tile: 32 of each thread of four warps


def unsupported(*tensors: Tensor | None) -> str:
    """Return why the kernels cannot take these tensors, whose dtypes may differ, or ""."""
    present = [x for x in tensors if x is not None]
    for x in present:
        if x.device != present[0].device:
            return f"expected all tensors on {present[0].device}, found one on {x.device}"
        if reason := unsupported_tensors(x):
            return reason
    return ""


@triton.jit
def load_row(ptr, W, BLOCK_W: tl.constexpr, ACC: tl.constexpr):
    """Load a row of W entries for every row of a tile, zeros beyond."""
    w = tl.arange(0, BLOCK_W)
    return tl.load(ptr + w, mask=w < W, other=0.0).to(ACC)[None, :]


@triton.jit
def _layer_norm_forward(
    x_ptr, u_ptr, added_ptr, index_ptr, gain_ptr, shift_ptr, sum_ptr, y_ptr, stat_ptr, R, W, FIRST,
    eps, HAS_U: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_AFFINE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x' = x + u + added[index], mu = mean x', r = 1 / sqrt(var x' + eps), y = (x' - mu) r (gain + shift).

    Tile: BLOCK_R whole rows in registers.  x' is rounded to the dtype of x before the norm, so that backward
    sees the same row.  HAS_ADDED: indices count from FIRST; rows with a smaller one get nothing added.
    Traffic: x and u read, x' and y written, 8 bytes of (mu, r) a row; without u, x read and y written.
    Backward: `_layer_norm_backward`.
    """
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    w = tl.arange(0, BLOCK_W)
    place, here = r[:, None] * W + w[None, :], (r < R)[:, None] & (w < W)[None, :]
    x = tl.load(x_ptr + place, mask=here, other=0.0)
    if HAS_U:
        total = x.to(ACC) + tl.load(u_ptr + place, mask=here, other=0.0).to(ACC)
        if HAS_ADDED:
            index = tl.load(index_ptr + r, mask=r < R, other=-1).to(tl.int64) - FIRST
            more = here & (index >= 0)[:, None]
            total += tl.load(added_ptr + index[:, None] * W + w[None, :], mask=more, other=0.0).to(ACC)
        x = total.to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, x, mask=here)
    x = x.to(ACC)
    mean = tl.sum(x, axis=1) / W
    centred = tl.where(here, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / W + eps)
    y = centred * rstd[:, None]
    if HAS_AFFINE:
        y = y * load_row(gain_ptr, W, BLOCK_W, ACC) + load_row(shift_ptr, W, BLOCK_W, ACC)
    tl.store(y_ptr + place, y, mask=here)
    tl.store(stat_ptr + r, mean, mask=r < R)
    tl.store(stat_ptr + R + r, rstd, mask=r < R)


@triton.jit
def _layer_norm_backward(
    dy_ptr, dsum_ptr, x_ptr, stat_ptr, index_ptr, gain_ptr, dx_ptr, du_ptr, dadded_ptr, R, W, FIRST,
    HAS_DSUM: tl.constexpr, HAS_DU: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_AFFINE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = r (dy - mean(dy) - y mean(dy y)) + dx', y = (x' - mu) r; du = dx, dadded[index] = dx.

    With a gain, dy is multiplied by it.  Tile: BLOCK_R whole rows in registers; nothing is summed over rows,
    since the gain is frozen.
    Traffic: dy, x' and dx' read, dx written, and du if its dtype differs.
    """
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    w = tl.arange(0, BLOCK_W)
    place, here = r[:, None] * W + w[None, :], (r < R)[:, None] & (w < W)[None, :]
    mean = tl.load(stat_ptr + r, mask=r < R, other=0.0)[:, None]
    rstd = tl.load(stat_ptr + R + r, mask=r < R, other=0.0)[:, None]
    dy = tl.load(dy_ptr + place, mask=here, other=0.0).to(ACC)
    if HAS_AFFINE:
        dy *= load_row(gain_ptr, W, BLOCK_W, ACC)
    x = tl.load(x_ptr + place, mask=here, other=0.0).to(ACC)
    y = tl.where(here, (x - mean) * rstd, 0.0)
    slope = (tl.sum(dy * y, axis=1) / W)[:, None]
    dx = rstd * (dy - (tl.sum(dy, axis=1) / W)[:, None] - y * slope)
    if HAS_DSUM:
        dx += tl.load(dsum_ptr + place, mask=here, other=0.0).to(ACC)
    tl.store(dx_ptr + place, dx, mask=here)
    if HAS_DU:
        tl.store(du_ptr + place, dx, mask=here)
    if HAS_ADDED:
        index = tl.load(index_ptr + r, mask=r < R, other=-1).to(tl.int64) - FIRST
        more = here & (index >= 0)[:, None]
        tl.store(dadded_ptr + index[:, None] * W + w[None, :], dx, mask=more)


def forward(
    x: Tensor,
    u: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    added: Tensor | None = None,
    added_index: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x' (empty without u), y in `dtype`, and mean and 1 / deviation of every row; x: r w.

    added, added_index: n w and r: row i of u also gets added[added_index[i] - first], if that is not below 0.
    """
    rows, width = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0) if u is None else torch.empty_like(x)
    y, stats = x.new_empty(rows, width, dtype=dtype), x.new_empty(2, rows, dtype=acc)
    tile = _tile(width)
    _layer_norm_forward[(triton.cdiv(rows, tile["BLOCK_R"]),)](
        x, x if u is None else u, x if added is None else added, x if added_index is None else added_index,
        x if gain is None else gain, x if shift is None else shift, total, y, stats, rows, width, first, eps,
        HAS_U=u is not None, HAS_ADDED=added is not None, HAS_AFFINE=gain is not None, ACC=accumulator(x),
        **tile,
    )  # fmt: skip
    return total, y, stats


def backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    stats: Tensor,
    gain: Tensor | None,
    du: Tensor,
    *,
    dadded: Tensor | None = None,
    added_index: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Return the gradient by x; write it to `du` too, unless that is empty, and its rows to `dadded`.

    total: x' of `forward`.  The others: as there.
    """
    rows, width = total.shape
    dx, tile = torch.empty_like(total), _tile(width)
    _layer_norm_backward[(triton.cdiv(rows, tile["BLOCK_R"]),)](
        grad_y, total if grad_total is None else grad_total, total, stats,
        total if added_index is None else added_index, total if gain is None else gain, dx, du,
        total if dadded is None else dadded, rows, width, first, HAS_DSUM=grad_total is not None,
        HAS_DU=du.numel() > 0, HAS_ADDED=dadded is not None, HAS_AFFINE=gain is not None,
        ACC=accumulator(total), **tile,
    )  # fmt: skip
    return dx


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    return {"BLOCK_R": rows, "BLOCK_W": block, "num_warps": 4 if block <= ELEMENTS else 8}
