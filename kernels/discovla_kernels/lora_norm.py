"""Residual sum, frozen layer norm, and the first half of LoRA, beside each other in one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.layer_norm import load_row
from discovla_kernels.layer_norm import unsupported as norm_unsupported
from discovla_kernels.tiles import accumulator, precision

MAX_RANK = 64  # of an update: its part of a tile lives in registers
MAX_WIDTH = 1024
BLOCK_R = 16  # rows of a tile
PROGRAMS = 264  # of backward: two for each processor of an H200, each with a sum of its own


def unsupported(x: Tensor, a: Tensor, z: Tensor, *others: Tensor | None) -> str:
    """Why the kernels do not take these tensors, a: p k w, z: of its dtype; empty where they do."""
    rank, width = a.shape[1:]
    if rank > MAX_RANK or width > MAX_WIDTH:
        return f"expected rank and width of at most {MAX_RANK} and {MAX_WIDTH}, found {(rank, width)}"
    if z.is_cuda and z.element_size() > 2 and width > MAX_WIDTH // 2:
        return f"expected float32 rows of at most {MAX_WIDTH // 2} in shared memory, found {width}"
    return norm_unsupported(x, a, z, *others)


def programs(rows: int) -> int:
    """How many programs of backward share so many rows, each with a sum of a's gradient."""
    return max(1, min(PROGRAMS, triton.cdiv(rows, BLOCK_R)))


@triton.jit
def _lora_norm_forward(
    x_ptr, u_ptr, a_ptr, gain_ptr, shift_ptr, sum_ptr, z_ptr, low_ptr, stat_ptr, slot_ptr, read_ptr,
    z_read_ptr, R, W, RANK, eps, HAS_U: tl.constexpr, HAS_AFFINE: tl.constexpr, HAS_READ: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_RANK: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x' = x + u, y = (x' - mu) r or y gain + shift as in `layer_norm`, z = [y | y Aᵀ | 0], A: rank w.

    low: y Aᵀ by itself, since backward of the projection needs it without y. HAS_READ: rows with a slot of 0
    or more write x' and z there too.

    Tile: BLOCK_R whole rows in registers; y is rounded to the dtype of z before it is multiplied. z has
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
    if HAS_READ:
        slot = tl.load(slot_ptr + r, mask=r < R, other=-1).to(tl.int64)[:, None]
        total = x.to(read_ptr.dtype.element_ty)
        tl.store(read_ptr + slot * W + w[None, :], total, mask=here & (slot >= 0))
        z_ptrs = z_read_ptr + slot * (W + BLOCK_RANK)
        tl.store(z_ptrs + w[None, :], y, mask=here & (slot >= 0))
        tl.store(z_ptrs + W + rank[None, :], low, mask=(slot >= 0) & (rank >= 0)[None, :])
    tl.store(stat_ptr + r, mean, mask=r < R)
    tl.store(stat_ptr + R + r, rstd, mask=r < R)


@triton.jit
def _lora_norm_backward(
    dz_ptr, dsum_ptr, x_ptr, stat_ptr, a_ptr, gain_ptr, shift_ptr, dx_ptr, du_ptr, da_ptr, slot_ptr,
    dread_ptr, dz_read_ptr, R, W, RANK, HAS_DSUM: tl.constexpr, HAS_DU: tl.constexpr,
    HAS_AFFINE: tl.constexpr, HAS_READ: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_RANK: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz = [dy' | U | -]; dy = dy' + U A, dA = Uᵀ y; dx = r (dy - mean(dy) - y mean(dy y)) + dx'; du = dx.

    Tile: BLOCK_R whole rows; of p programs one takes every p-th tile and holds its sum of dA in registers, so
    that the sums are few and added in one order. The padding of dz counts for nothing. With a gain y is
    (x' - mu) r, in dA y gain + shift, and dy that of y gain. HAS_READ: rows with a slot of 0 or more get what
    stands there of dx' and dz.
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
        if HAS_READ:
            slot = tl.load(slot_ptr + r, mask=r < R, other=-1).to(tl.int64)[:, None]
            read, dz_ptrs = here & (slot >= 0), dz_read_ptr + slot * (W + BLOCK_RANK)
            dy += tl.load(dz_ptrs + w[None, :], mask=read, other=0.0).to(ACC)
            more = tl.load(dz_ptrs + W + rank[None, :], mask=(slot >= 0) & (rank < RANK)[None, :], other=0.0)
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
        if HAS_READ:
            dx += tl.load(dread_ptr + slot * W + w[None, :], mask=read, other=0.0).to(ACC)
        tl.store(dx_ptr + place, dx, mask=here)
        if HAS_DU:
            tl.store(du_ptr + place, dx, mask=here)
    here = (rank < RANK)[:, None] & (w < W)[None, :]
    da_ptr += tl.program_id(0).to(tl.int64) * RANK * W
    tl.store(da_ptr + rank[:, None] * W + w[None, :], da, mask=here)


def padding(rank: int) -> int:
    """Columns of z after y."""
    return max(16, triton.next_power_of_2(rank))


def forward(
    x: Tensor,
    u: Tensor | None,
    a: Tensor,
    affine: tuple[Tensor, Tensor] | None,
    how: tuple[float, torch.dtype],
    readout: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, ...]:
    """x' (empty without u), z, r (w + padding), y aᵀ by itself, r rank, and (mean, 1 / deviation) of rows.

    a: rank w.  affine: gain and shift.  how: epsilon, and the dtype of z.
    readout: of every row its slot among n or -1, int32, and n: then also x' and z of the n rows.
    """
    (rows, width), rank, (eps, dtype) = x.shape, len(a), how
    acc = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0) if u is None else torch.empty_like(x)
    z, low = (x.new_empty(rows, columns, dtype=dtype) for columns in (width + padding(rank), rank))
    gain, shift = (x, x) if affine is None else affine
    stats, tile = x.new_empty(2, rows, dtype=acc), _tile(width, rank)
    slots, count = (x, 0) if readout is None else readout
    read, z_read = x.new_empty(count, width), z.new_empty(count, z.shape[1])
    _lora_norm_forward[(triton.cdiv(rows, tile["BLOCK_R"]),)](
        x, x if u is None else u, a, gain, shift, total, z, low, stats, slots, read, z_read, rows, width,
        rank, eps, HAS_U=u is not None, HAS_AFFINE=affine is not None, HAS_READ=readout is not None,
        PRECISION=precision(z), ACC=accumulator(x), **tile,
    )  # fmt: skip
    return (total, z, low, stats) if readout is None else (total, z, low, stats, read, z_read)


def backward(
    grads: tuple[Tensor, Tensor | None],
    x: Tensor,
    stats: Tensor,
    a: Tensor,
    affine: tuple[Tensor, Tensor] | None,
    read: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by u in the dtype of z (empty where it is that by x), and by a, in parts to be added.

    grads: by z and by the sum, contiguous.  x: the sum that was normed.  a: p rank w, p times the same: there
    are p programs, and parts.  read: gradients by x' and z of the n rows by themselves, and every row's slot.
    """
    (rows, width), (count, rank), (grad, grad_of_sum) = x.shape, a.shape[:2], grads
    gain, shift = (x, x) if affine is None else affine
    tile = _tile(width, rank)
    dx, parts = torch.empty_like(x), stats.new_empty(count, rank, width)
    du = x.new_empty(0) if grad.dtype == x.dtype else torch.empty_like(x, dtype=grad.dtype)
    *reads, slots = (x, grad, x) if read is None else read
    _lora_norm_backward[(count,)](
        grad, x if grad_of_sum is None else grad_of_sum, x, stats, a, gain, shift, dx, du, parts, slots,
        *reads, rows, width, rank, HAS_DSUM=grad_of_sum is not None, HAS_DU=du.numel() > 0,
        HAS_AFFINE=affine is not None, HAS_READ=read is not None, PRECISION=precision(grad),
        ACC=accumulator(x), **tile,
    )  # fmt: skip
    return dx, du, parts


def _tile(width: int, rank: int) -> dict[str, int]:
    return {
        "BLOCK_R": BLOCK_R,
        "BLOCK_W": max(16, triton.next_power_of_2(width)),
        "BLOCK_RANK": padding(rank),
        "num_warps": 16,
        "num_stages": 1,
    }
