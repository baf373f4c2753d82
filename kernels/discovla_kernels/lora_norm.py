"""Residual sum, frozen layer norm and the first factor of LoRA, a row in registers from load to store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.layer_norm import unsupported as norm_unsupported
from discovla_kernels.tiles import accumulator, capability

MAX_RANK = 16  # of an update: backward holds a sum for each of its rows and columns in registers
MAX_WIDTH = 1024
# rows of a tile, columns of a chunk, and how many a thread holds side by side
FORWARD = {"BLOCK_R": 2, "BLOCK_W": 256, "VECTOR": 8, "num_warps": 1}  # a row in one warp
BACKWARD = {"BLOCK_R": 4, "BLOCK_W": 256, "VECTOR": 2, "num_warps": 4}  # a column in one thread
PROGRAMS = 264  # of backward: two a multiprocessor of an H200, each with a partial sum of its own


def unsupported(x: Tensor, a: Tensor, z: Tensor, *others: Tensor | None) -> str:
    """Return why the kernels cannot take these tensors, or "".  a: p k w.  z: any tensor of its dtype."""
    rank, width = a.shape[1:]
    if rank > MAX_RANK or width > MAX_WIDTH:
        return f"expected rank and width of at most {MAX_RANK} and {MAX_WIDTH}, found {(rank, width)}"
    return norm_unsupported(x, a, z, *others)


def programs(rows: int) -> int:
    """Return how many programs backward has for this many rows, each with a partial sum of a's gradient."""
    return max(1, min(PROGRAMS, triton.cdiv(rows, BACKWARD["BLOCK_R"])))


@triton.jit
def _columns(CHUNK: tl.constexpr, BLOCK_W: tl.constexpr, VECTOR: tl.constexpr):
    """Return the columns of a chunk.

    A thread gets as many neighbours as the compiler knows to be contiguous; this sum shows it VECTOR of them.
    """
    w = tl.arange(0, BLOCK_W)
    return CHUNK * BLOCK_W + w // VECTOR * VECTOR + w % VECTOR


@triton.jit
def _load(ptr, rows, w, real, W, ACC: tl.constexpr):
    """Load some columns of rows at these offsets, zeros where a row is not real."""
    return tl.load(ptr + rows[:, None] + w[None, :], mask=real[:, None] & (w < W)[None, :], other=0.0).to(ACC)


@triton.jit
def _store(ptr, rows, w, real, W, x):
    """Store some columns of real rows."""
    tl.store(ptr + rows[:, None] + w[None, :], x, mask=real[:, None] & (w < W)[None, :])


@triton.jit
def _load_columns(ptr, w, W, ACC: tl.constexpr):
    """Load some columns of one row, for every row of a tile."""
    return tl.load(ptr + w, mask=w < W, other=0.0).to(ACC)[None, :]


@triton.jit
def _lora_norm_forward(
    x_ptr, u_ptr, a_ptr, gain_ptr, shift_ptr, sum_ptr, z_ptr, low_ptr, stat_ptr, index_ptr, readout_x_ptr,
    readout_z_ptr, R, W, eps, RANK: tl.constexpr, HAS_U: tl.constexpr, HAS_AFFINE: tl.constexpr,
    HAS_READOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_RANK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x' = x + u, y = (x' - mu) r (gain + shift) as in `layer_norm`, z = [y | y Aᵀ | 0], A: rank w.

    low: a copy of y Aᵀ, since backward of the projection needs it without y.  HAS_READOUT: rows with an index
    of 0 or more write x' and z to that readout row too.
    Tile: BLOCK_R whole rows in the registers of one warp, in CHUNKS of BLOCK_W columns, so that a width of
    768 has no padding and a sum along a row needs no shared memory; y is rounded to the dtype of z before the
    product, which is RANK multiplications and additions an entry.  z has BLOCK_RANK columns after y, so that
    its rows stay aligned.
    Traffic: as `layer_norm`, and BLOCK_RANK + RANK entries written a row; A comes from L1.
    Backward: `_lora_norm_backward`.
    """
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    rank = tl.arange(0, BLOCK_RANK)
    real = r < R
    xs = ()
    total = tl.zeros((BLOCK_R, BLOCK_W), dtype=ACC)
    for chunk in tl.static_range(CHUNKS):
        w = _columns(chunk, BLOCK_W, VECTOR)
        x = _load(x_ptr, r * W, w, real, W, ACC)
        if HAS_U:
            x = (x + _load(u_ptr, r * W, w, real, W, ACC)).to(x_ptr.dtype.element_ty)
            _store(sum_ptr, r * W, w, real, W, x)
            x = x.to(ACC)
        total += x
        xs = xs + (x,)
    mean = tl.sum(total, axis=1) / W
    squares = tl.zeros((BLOCK_R, BLOCK_W), dtype=ACC)
    for chunk in tl.static_range(CHUNKS):
        w = _columns(chunk, BLOCK_W, VECTOR)
        centred = tl.where((w < W)[None, :], xs[chunk] - mean[:, None], 0.0)
        squares += centred * centred
    rstd = 1 / tl.sqrt(tl.sum(squares, axis=1) / W + eps)
    tl.store(stat_ptr + r, mean, mask=real)
    tl.store(stat_ptr + R + r, rstd, mask=real)
    z_rows, read, read_rows, read_z_rows = r * (W + BLOCK_RANK), real, r, r
    if HAS_READOUT:
        index = tl.load(index_ptr + r, mask=real, other=-1).to(tl.int64)
        read, read_rows, read_z_rows = index >= 0, index * W, index * (W + BLOCK_RANK)
    ys = ()
    for chunk in tl.static_range(CHUNKS):
        w = _columns(chunk, BLOCK_W, VECTOR)
        y = tl.where((w < W)[None, :], (xs[chunk] - mean[:, None]) * rstd[:, None], 0.0)
        if HAS_AFFINE:
            y = y * _load_columns(gain_ptr, w, W, ACC) + _load_columns(shift_ptr, w, W, ACC)
        y = y.to(z_ptr.dtype.element_ty)
        _store(z_ptr, z_rows, w, real, W, y)
        if HAS_READOUT:
            _store(readout_x_ptr, read_rows, w, read, W, xs[chunk])
            _store(readout_z_ptr, read_z_rows, w, read, W, y)
        ys = ys + (y.to(ACC),)
    low = tl.zeros((BLOCK_R, BLOCK_RANK), dtype=ACC)
    for k in tl.static_range(RANK):
        product = tl.zeros((BLOCK_R, BLOCK_W), dtype=ACC)
        for chunk in tl.static_range(CHUNKS):
            product += ys[chunk] * _load_columns(a_ptr + k * W, _columns(chunk, BLOCK_W, VECTOR), W, ACC)
        low = tl.where((rank == k)[None, :], tl.sum(product, axis=1)[:, None], low)
    _store(z_ptr, z_rows + W, rank, real, BLOCK_RANK, low)
    _store(low_ptr, r * RANK, rank, real, RANK, low)
    if HAS_READOUT:
        _store(readout_z_ptr, read_z_rows + W, rank, read, BLOCK_RANK, low)


@triton.jit
def _lora_norm_backward(
    dz_ptr, dsum_ptr, x_ptr, stat_ptr, a_ptr, gain_ptr, shift_ptr, dx_ptr, du_ptr, da_ptr, index_ptr,
    dreadout_x_ptr, dreadout_z_ptr, R, W, RANK: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_DU: tl.constexpr,
    HAS_AFFINE: tl.constexpr, HAS_READOUT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
    CHUNKS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_RANK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz = [dy' | U | -]; dy = dy' + U A, dA = Uᵀ y; dx = r (dy - mean(dy) - y mean(dy y)) + dx'; du = dx.

    With a gain, dy is multiplied by it, and dA = Uᵀ (y gain + shift).
    Tile: BLOCK_R whole rows in CHUNKS of BLOCK_W columns.  A thread holds the same columns of every row, so
    that dA is summed over rows in its registers; each of p programs takes every p-th tile, so partial sums
    are few and added in one order.  The padding of dz is not read.  HAS_READOUT: rows with an index of 0 or
    more add the gradients dx' and dz of that readout row.
    """
    sums = ()  # of dA, by chunk and rank
    for _ in tl.static_range(RANK * CHUNKS):
        sums = sums + (tl.zeros((BLOCK_W,), dtype=ACC),)
    for tile in range(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
        r = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        real, z_rows = r < R, r * (W + BLOCK_RANK)
        mean = tl.load(stat_ptr + r, mask=real, other=0.0)[:, None]
        rstd = tl.load(stat_ptr + R + r, mask=real, other=0.0)[:, None]
        read, read_rows, read_z_rows = real, r, r
        if HAS_READOUT:
            index = tl.load(index_ptr + r, mask=real, other=-1).to(tl.int64)
            read, read_rows, read_z_rows = index >= 0, index * W, index * (W + BLOCK_RANK)
        ups = ()
        for k in tl.static_range(RANK):
            up = tl.load(dz_ptr + z_rows + W + k, mask=real, other=0.0).to(ACC)
            if HAS_READOUT:
                up += tl.load(dreadout_z_ptr + read_z_rows + W + k, mask=read, other=0.0).to(ACC)
            ups = ups + (up,)
        dys, ys, new_sums = (), (), ()
        total, slope = tl.zeros((BLOCK_R, BLOCK_W), dtype=ACC), tl.zeros((BLOCK_R, BLOCK_W), dtype=ACC)
        for chunk in tl.static_range(CHUNKS):
            w = _columns(chunk, BLOCK_W, VECTOR)
            dy = _load(dz_ptr, z_rows, w, real, W, ACC)
            if HAS_READOUT:
                dy += _load(dreadout_z_ptr, read_z_rows, w, read, W, ACC)
            y = tl.where((w < W)[None, :], (_load(x_ptr, r * W, w, real, W, ACC) - mean) * rstd, 0.0)
            gain, normed = 1.0, y
            if HAS_AFFINE:
                gain = _load_columns(gain_ptr, w, W, ACC)
                normed = y * gain + _load_columns(shift_ptr, w, W, ACC)
            for k in tl.static_range(RANK):
                dy += ups[k][:, None] * _load_columns(a_ptr + k * W, w, W, ACC)
                new_sums = new_sums + (sums[chunk * RANK + k] + tl.sum(ups[k][:, None] * normed, axis=0),)
            dy *= gain
            total += dy
            slope += dy * y
            dys, ys = dys + (dy,), ys + (y,)
        sums = new_sums
        mean_dy, mean_slope = (tl.sum(total, axis=1) / W)[:, None], (tl.sum(slope, axis=1) / W)[:, None]
        for chunk in tl.static_range(CHUNKS):
            w = _columns(chunk, BLOCK_W, VECTOR)
            dx = rstd * (dys[chunk] - mean_dy - ys[chunk] * mean_slope)
            if HAS_DSUM:
                dx += _load(dsum_ptr, r * W, w, real, W, ACC)
            if HAS_READOUT:
                dx += _load(dreadout_x_ptr, read_rows, w, read, W, ACC)
            _store(dx_ptr, r * W, w, real, W, dx)
            if HAS_DU:
                _store(du_ptr, r * W, w, real, W, dx)
    da_ptr += tl.program_id(0).to(tl.int64) * RANK * W
    for chunk in tl.static_range(CHUNKS):
        w = _columns(chunk, BLOCK_W, VECTOR)
        for k in tl.static_range(RANK):
            tl.store(da_ptr + k * W + w, sums[chunk * RANK + k], mask=w < W)


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
    stats, tile = x.new_empty(2, rows, dtype=acc), _tile(width, rank, FORWARD)
    readout_x, readout_z = x.new_empty(readout_count, width), z.new_empty(readout_count, z.shape[1])
    _lora_norm_forward[(triton.cdiv(rows, tile["BLOCK_R"]),)](
        x, x if u is None else u, a, x if gain is None else gain, x if shift is None else shift, total, z,
        low, stats, x if readout_index is None else readout_index, readout_x, readout_z, rows, width,
        eps, HAS_U=u is not None, HAS_AFFINE=gain is not None, HAS_READOUT=readout_index is not None,
        ACC=accumulator(x), **tile,
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
    tile = _tile(width, rank, BACKWARD)
    if grad_z.element_size() == 2 and 0 < capability(total) < 90:
        tile["maxnreg"] = 255  # the compiler's own limit, for three programs a multiprocessor, would spill
    dx, parts = torch.empty_like(total), stats.new_empty(programs, rank, width)
    du = total.new_empty(0) if grad_z.dtype == total.dtype else torch.empty_like(total, dtype=grad_z.dtype)
    _lora_norm_backward[(programs,)](
        grad_z, total if grad_total is None else grad_total, total, stats, a,
        total if gain is None else gain, total if shift is None else shift, dx, du, parts,
        total if readout_index is None else readout_index,
        total if grad_readout_x is None else grad_readout_x,
        grad_z if grad_readout_z is None else grad_readout_z, rows, width,
        HAS_DSUM=grad_total is not None, HAS_DU=du.numel() > 0, HAS_AFFINE=gain is not None,
        HAS_READOUT=readout_index is not None, ACC=accumulator(total), **tile,
    )  # fmt: skip
    return dx, du, parts


def _tile(width: int, rank: int, launch: dict[str, int]) -> dict[str, int]:
    block = min(launch["BLOCK_W"], triton.next_power_of_2(width))
    return launch | {
        "BLOCK_R": launch["BLOCK_R"] if width <= 768 else 2,  # four rows of 1,024 would spill on sm_100
        "RANK": rank,
        "BLOCK_W": block,
        "CHUNKS": triton.cdiv(width, block),
        "BLOCK_RANK": padded_rank(rank),
    }
