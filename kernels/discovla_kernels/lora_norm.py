"""Residual sum, frozen layer norm and the first factor of LoRA, a row in registers from load to store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.layer_norm import load_row
from discovla_kernels.layer_norm import unsupported as norm_unsupported
from discovla_kernels.tiles import accumulator, precision

MAX_RANK = 64  # of an update; its part of a tile lives in registers
MAX_WIDTH = 1024
BLOCK_R = 16  # rows of a tile
PROGRAMS = 264  # of backward: two a multiprocessor of an H200, each with a partial sum of its own


def unsupported(x: Tensor, a: Tensor, z: Tensor, *others: Tensor | None) -> str:
    """Return why the kernels cannot take these tensors, or "".  a: p k w.  z: any tensor of its dtype."""
    rank, width = a.shape[1:]
    if rank > MAX_RANK or width > MAX_WIDTH:
        return f"expected rank and width of at most {MAX_RANK} and {MAX_WIDTH}, found {(rank, width)}"
    if z.is_cuda and z.element_size() > 2 and width > MAX_WIDTH // 2:
        return f"expected float32 rows of at most {MAX_WIDTH // 2} in shared memory, found {width}"
    return norm_unsupported(x, a, z, *others)


def programs(rows: int) -> int:
    """Return how many programs backward has for this many rows, each with a partial sum of a's gradient."""
    return max(1, min(PROGRAMS, triton.cdiv(rows, BLOCK_R)))


@triton.jit
def _lora_norm_forward(
    x_ptr, u_ptr, a_ptr, gain_ptr, shift_ptr, sum_ptr, z_ptr, low_ptr, stat_ptr, index_ptr, readout_x_ptr,
    readout_z_ptr, R, W, RANK, eps, HAS_U: tl.constexpr, HAS_AFFINE: tl.constexpr, HAS_READOUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_RANK: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x' = x + u, y = (x' - mu) r (gain + shift) as in `layer_norm`, z = [y | y Aᵀ | 0], A: rank w.

    low: a copy of y Aᵀ, since backward of the projection needs it without y.  HAS_READOUT: rows with an index
    of 0 or more write x' and z to that readout row too.
    Tile: BLOCK_R whole rows in registers; y is rounded to the dtype of z before the product.  z has
    BLOCK_RANK columns after y, so that its rows stay aligned.
    Traffic: as `layer_norm`, and BLOCK_RANK + RANK entries written a row; A comes from L2.
    Backward: `_lora_norm_backward`.
    """
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    w, rank = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_RANK)
    place, here = r[:, None] * W + w[None, :], (r < R)[:, None] & (w < W)[None, :]
    x = tl.load(x_ptr + place, mask=here, other=0.0)
    if HAS_U:
        total = x.to(ACC) + tl.load(u_ptr + place, mask=here, other=0.0).to(ACC)
        x = total.to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, x, mask=here)
    x = x.to(ACC)
    mean = tl.sum(x, axis=1) / W
    centred = tl.where(here, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / W + eps)
    y = centred * rstd[:, None]
    if HAS_AFFINE:
        y = y * load_row(gain_ptr, W, BLOCK_W, ACC) + load_row(shift_ptr, W, BLOCK_W, ACC)
    y = y.to(z_ptr.dtype.element_ty)
    a = tl.load(
        a_ptr + rank[:, None] * W + w[None, :], mask=(rank < RANK)[:, None] & (w < W)[None, :], other=0.0
    )
    low = tl.dot(y, tl.trans(a.to(y.dtype)), input_precision=PRECISION, out_dtype=ACC)
    z_ptrs = z_ptr + r[:, None] * (W + BLOCK_RANK)
    tl.store(z_ptrs + w[None, :], y, mask=here)
    tl.store(z_ptrs + W + rank[None, :], low, mask=(r < R)[:, None])
    tl.store(low_ptr + r[:, None] * RANK + rank[None, :], low, mask=(r < R)[:, None] & (rank < RANK)[None, :])
    if HAS_READOUT:
        index = tl.load(index_ptr + r, mask=r < R, other=-1).to(tl.int64)[:, None]
        total = x.to(readout_x_ptr.dtype.element_ty)
        tl.store(readout_x_ptr + index * W + w[None, :], total, mask=here & (index >= 0))
        z_ptrs = readout_z_ptr + index * (W + BLOCK_RANK)
        tl.store(z_ptrs + w[None, :], y, mask=here & (index >= 0))
        tl.store(z_ptrs + W + rank[None, :], low, mask=(index >= 0) & (rank >= 0)[None, :])
    tl.store(stat_ptr + r, mean, mask=r < R)
    tl.store(stat_ptr + R + r, rstd, mask=r < R)


@triton.jit
def _lora_norm_backward(
    dz_ptr, dsum_ptr, x_ptr, stat_ptr, a_ptr, gain_ptr, shift_ptr, dx_ptr, du_ptr, da_ptr, index_ptr,
    dreadout_x_ptr, dreadout_z_ptr, R, W, RANK, HAS_DSUM: tl.constexpr, HAS_DU: tl.constexpr,
    HAS_AFFINE: tl.constexpr, HAS_READOUT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_RANK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz = [dy' | U | -]; dy = dy' + U A, dA = Uᵀ y; dx = r (dy - mean(dy) - y mean(dy y)) + dx'; du = dx.

    With a gain, dy is multiplied by it, and dA = Uᵀ (y gain + shift).
    Tile: BLOCK_R whole rows; each of p programs takes every p-th tile and holds its sum of dA in registers,
    so partial sums are few and added in one order.  The padding of dz is not read.  HAS_READOUT: rows with an
    index of 0 or more add the gradients dx' and dz of that readout row.
    """
    w, rank = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_RANK)
    a = tl.load(
        a_ptr + rank[:, None] * W + w[None, :], mask=(rank < RANK)[:, None] & (w < W)[None, :], other=0.0
    )
    a = a.to(dz_ptr.dtype.element_ty)
    da = tl.zeros((BLOCK_RANK, BLOCK_W), dtype=ACC)
    for tile in range(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        r = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        place, here = r[:, None] * W + w[None, :], (r < R)[:, None] & (w < W)[None, :]
        mean = tl.load(stat_ptr + r, mask=r < R, other=0.0)[:, None]
        rstd = tl.load(stat_ptr + R + r, mask=r < R, other=0.0)[:, None]
        dz_ptrs = dz_ptr + r[:, None] * (W + BLOCK_RANK)
        low = tl.load(dz_ptrs + W + rank[None, :], mask=(r < R)[:, None] & (rank < RANK)[None, :], other=0.0)
        dy = tl.load(dz_ptrs + w[None, :], mask=here, other=0.0).to(ACC)
        if HAS_READOUT:
            index = tl.load(index_ptr + r, mask=r < R, other=-1).to(tl.int64)[:, None]
            read, dz_ptrs = here & (index >= 0), dreadout_z_ptr + index * (W + BLOCK_RANK)
            dy += tl.load(dz_ptrs + w[None, :], mask=read, other=0.0).to(ACC)
            more = tl.load(dz_ptrs + W + rank[None, :], mask=(index >= 0) & (rank < RANK)[None, :], other=0.0)
            low = (low.to(ACC) + more.to(ACC)).to(low.dtype)
        dy = tl.dot(low, a, dy, input_precision=PRECISION, out_dtype=ACC)
        x = tl.load(x_ptr + place, mask=here, other=0.0).to(ACC)
        y = tl.where(here, (x - mean) * rstd, 0.0)
        normed = y
        if HAS_AFFINE:
            gain = load_row(gain_ptr, W, BLOCK_W, ACC)
            dy *= gain
            normed = y * gain + load_row(shift_ptr, W, BLOCK_W, ACC)
        da = tl.dot(tl.trans(low), normed.to(low.dtype), da, input_precision=PRECISION, out_dtype=ACC)
        slope = (tl.sum(dy * y, axis=1) / W)[:, None]
        dx = rstd * (dy - (tl.sum(dy, axis=1) / W)[:, None] - y * slope)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + place, mask=here, other=0.0).to(ACC)
        if HAS_READOUT:
            dx += tl.load(dreadout_x_ptr + index * W + w[None, :], mask=read, other=0.0).to(ACC)
        tl.store(dx_ptr + place, dx, mask=here)
        if HAS_DU:
            tl.store(du_ptr + place, dx, mask=here)
    here = (rank < RANK)[:, None] & (w < W)[None, :]
    da_ptr += tl.program_id(0).to(tl.int64) * RANK * W
    tl.store(da_ptr + rank[:, None] * W + w[None, :], da, mask=here)


def padded_rank(rank: int) -> int:
    """Return the number of columns of z after y."""
    return max(16, triton.next_power_of_2(rank))


def forward(
    x: Tensor,
    u: Tensor | None,
    a: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    readout_index: Tensor | None = None,
    readout_count: int = 0,
) -> tuple[Tensor, ...]:
    """Return x' (empty without u), z, r (w + p), H, r k, and mean and 1 / deviation of every row, 2 r.

    x: r w.  a: k w.  dtype: of z.  readout_index: r, int32, -1 or the place of a row among `readout_count`
    readout rows, whose x' and z are then returned too.
    """
    (rows, width), rank = x.shape, len(a)
    acc = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0) if u is None else torch.empty_like(x)
    z, low = (x.new_empty(rows, columns, dtype=dtype) for columns in (width + padded_rank(rank), rank))
    stats, tile = x.new_empty(2, rows, dtype=acc), _tile(width, rank)
    readout_x, readout_z = x.new_empty(readout_count, width), z.new_empty(readout_count, z.shape[1])
    _lora_norm_forward[(triton.cdiv(rows, tile["BLOCK_R"]),)](
        x, x if u is None else u, a, x if gain is None else gain, x if shift is None else shift, total, z,
        low, stats, x if readout_index is None else readout_index, readout_x, readout_z, rows, width, rank,
        eps, HAS_U=u is not None, HAS_AFFINE=gain is not None, HAS_READOUT=readout_index is not None,
        PRECISION=precision(z), ACC=accumulator(x), **tile,
    )  # fmt: skip
    if readout_index is None:
        return total, z, low, stats
    return total, z, low, stats, readout_x, readout_z


def backward(
    grad_z: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    stats: Tensor,
    a: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    *,
    readout_index: Tensor | None = None,
    grad_readout_x: Tensor | None = None,
    grad_readout_z: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients by x, by u (empty if it equals that by x) and by a, p partial sums.

    grad_z, grad_total: by z and x', contiguous.  total: x' of `forward`.  a: p k w, p copies, one a program.
    grad_readout_x, grad_readout_z: by the readout rows' x' and z.
    """
    (rows, width), (programs, rank) = total.shape, a.shape[:2]
    tile = _tile(width, rank)
    dx, parts = torch.empty_like(total), stats.new_empty(programs, rank, width)
    du = total.new_empty(0) if grad_z.dtype == total.dtype else torch.empty_like(total, dtype=grad_z.dtype)
    _lora_norm_backward[(programs,)](
        grad_z, total if grad_total is None else grad_total, total, stats, a,
        total if gain is None else gain, total if shift is None else shift, dx, du, parts,
        total if readout_index is None else readout_index,
        total if grad_readout_x is None else grad_readout_x,
        grad_z if grad_readout_z is None else grad_readout_z, rows, width, rank,
        HAS_DSUM=grad_total is not None, HAS_DU=du.numel() > 0, HAS_AFFINE=gain is not None,
        HAS_READOUT=readout_index is not None, PRECISION=precision(grad_z), ACC=accumulator(total), **tile,
    )  # fmt: skip
    return dx, du, parts


def _tile(width: int, rank: int) -> dict[str, int]:
    return {
        "BLOCK_R": BLOCK_R,
        "BLOCK_W": max(16, triton.next_power_of_2(width)),
        "BLOCK_RANK": padded_rank(rank),
        "num_warps": 16,
        "num_stages": 1,
    }
