"""Tiles of attention on packed rows (q k v, 3 h c wide) that lie end to end in sequences."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import LOWEST, accumulator, precision


@triton.jit
def sequence(offsets_ptr, s, LENGTH, HAS_OFFSETS: tl.constexpr):
    """First row and number of rows of a sequence; all have LENGTH without offsets."""
    start, length = s.to(tl.int64) * LENGTH, LENGTH
    if HAS_OFFSETS:
        start = tl.load(offsets_ptr + s).to(tl.int64)
        length = (tl.load(offsets_ptr + s + 1).to(tl.int64) - start).to(tl.int32)
    return start, length


@triton.jit
def load_rows(ptr, rows, real, stride, C, BLOCK_C: tl.constexpr):
    """C entries of each row, padded with zeros to BLOCK_C; rows that are not real are zeros."""
    c = tl.arange(0, BLOCK_C)
    here = real[:, None] & (c < C)[None, :]
    return tl.load(ptr + rows[:, None] * stride + c[None, :], mask=here, other=0.0)


@triton.jit
def store_rows(ptr, rows, real, stride, C, x, BLOCK_C: tl.constexpr):
    """The inverse of `load_rows`."""
    c = tl.arange(0, BLOCK_C)
    here = real[:, None] & (c < C)[None, :]
    tl.store(ptr + rows[:, None] * stride + c[None, :], x, mask=here)


@triton.jit
def visible(mask_ptr, start, j, length, HAS_MASK: tl.constexpr):
    """Which keys j of a sequence may be seen at all."""
    seen = j < length
    if HAS_MASK:
        seen = seen & (tl.load(mask_ptr + start + j, mask=seen, other=0) != 0)
    return seen


@triton.jit
def visible_pairs(mask_ptr, start, i, j, length, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Which keys j the queries i of a sequence may see."""
    seen = visible(mask_ptr, start, j, length, HAS_MASK)[None, :] & (i < length)[:, None]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    return seen


@triton.jit
def scores(q, k, seen, scale, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """scale q kᵀ, LOWEST where not seen."""
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    return tl.where(seen, scale * product, LOWEST)


@triton.jit
def attend_more(q, k, v, seen, scale, top, total, out, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """More keys into an online softmax: its running maximum, sum, and weighted sum of values."""
    s = scores(q, k, seen, scale, PRECISION, ACC)
    new_top = tl.maximum(top, tl.max(s, axis=1))
    keep, p = tl.exp(top - new_top), tl.where(seen, tl.exp(s - new_top[:, None]), 0.0)
    out = tl.dot(p.to(v.dtype), v, out * keep[:, None], input_precision=PRECISION, out_dtype=ACC)
    return new_top, total * keep + tl.sum(p, axis=1), out


@triton.jit
def measure_more(q, k, v, do, seen, scale, top, total, mean, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """More keys into what backward needs of a query: maximum, sum, and sum of weights times do vᵀ."""
    s = scores(q, k, seen, scale, PRECISION, ACC)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    new_top = tl.maximum(top, tl.max(s, axis=1))
    keep, p = tl.exp(top - new_top), tl.where(seen, tl.exp(s - new_top[:, None]), 0.0)
    return new_top, total * keep + tl.sum(p, axis=1), mean * keep + tl.sum(p * dp, axis=1)


@triton.jit
def slopes(q, k, v, do, seen, scale, lse, mean, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Weights p of a tile, and the derivative p (do vᵀ - mean) scale by q kᵀ."""
    s = scores(q, k, seen, scale, PRECISION, ACC)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    p = tl.where(seen, tl.exp(s - lse[:, None]), 0.0)
    return p, p * (dp - mean[:, None]) * scale


@triton.jit
def whole_slopes(q, k, v, do, seen, scale, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """The same where the tile holds every key, so that lse and mean are found in registers."""
    s = scores(q, k, seen, scale, PRECISION, ACC)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    p = tl.where(seen, tl.exp(s - tl.max(s, axis=1)[:, None]), 0.0)
    total = tl.sum(p, axis=1)
    p /= tl.where(total == 0, 1.0, total)[:, None]
    return p, p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale


@triton.jit
def log_of(top, total):
    """Log-sum-exp of an online softmax; of nothing, a finite number that is used nowhere."""
    return top + tl.log(tl.where(total == 0, 1.0, total))


@triton.jit
def load_gradients(
    grad_ptr, own_ptr, start, i, length, readout, width, C, FUSED: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Gradients of a sequence's outputs i; FUSED: that of its readout row stands at own_ptr instead."""
    do = load_rows(grad_ptr, start + i, i < length, width, C, BLOCK_C)
    if FUSED:
        c = tl.arange(0, BLOCK_C)
        own = tl.load(own_ptr + c, mask=c < C, other=0.0)
        do = tl.where((i == readout)[:, None], own[None, :], do)
    return do


@triton.jit
def query_gradients(
    q_ptr, mask_ptr, grad_ptr, own_ptr, dq_ptr, lse_ptr, mean_ptr, start, length, readout, H, C, scale,
    FUSED: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq of a sequence of several tiles, and lse and D of every row, for `key_gradients`.

    FUSED: dq of the readout row is not stored but returned.
    """
    width, place = H * C, tl.arange(0, BLOCK)
    own = tl.zeros((BLOCK_C,), dtype=ACC)
    for first in range(0, length, BLOCK):
        i = first + place
        q = load_rows(q_ptr, start + i, i < length, 3 * width, C, BLOCK_C)
        do = load_gradients(grad_ptr, own_ptr, start, i, length, readout, width, C, FUSED, BLOCK_C)
        top, total = tl.full((BLOCK,), LOWEST, dtype=ACC), tl.zeros((BLOCK,), dtype=ACC)
        mean, dq = tl.zeros((BLOCK,), dtype=ACC), tl.zeros((BLOCK, BLOCK_C), dtype=ACC)
        last = min(length, first + BLOCK) if CAUSAL else length
        for other in range(0, last, BLOCK):
            j = other + place
            k = load_rows(q_ptr + width, start + j, j < length, 3 * width, C, BLOCK_C)
            v = load_rows(q_ptr + 2 * width, start + j, j < length, 3 * width, C, BLOCK_C)
            seen = visible_pairs(mask_ptr, start, i, j, length, HAS_MASK, CAUSAL)
            top, total, mean = measure_more(q, k, v, do, seen, scale, top, total, mean, PRECISION, ACC)
        lse, mean = log_of(top, total), mean / tl.where(total == 0, 1.0, total)
        tl.store(lse_ptr + (start + i) * H, lse, mask=i < length)
        tl.store(mean_ptr + (start + i) * H, mean, mask=i < length)
        for other in range(0, last, BLOCK):
            j = other + place
            k = load_rows(q_ptr + width, start + j, j < length, 3 * width, C, BLOCK_C)
            v = load_rows(q_ptr + 2 * width, start + j, j < length, 3 * width, C, BLOCK_C)
            seen = visible_pairs(mask_ptr, start, i, j, length, HAS_MASK, CAUSAL)
            _, ds = slopes(q, k, v, do, seen, scale, lse, mean, PRECISION, ACC)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
        stored = i < length
        if FUSED:
            own += tl.sum(tl.where((i == readout)[:, None], dq, 0.0), axis=0)
            stored = stored & (i != readout)
        store_rows(dq_ptr, start + i, stored, 3 * width, C, dq, BLOCK_C)
    return own


@triton.jit
def key_gradients(
    q_ptr, mask_ptr, grad_ptr, own_ptr, lse_ptr, mean_ptr, k, v, other, start, length, readout, H, C, scale,
    FUSED: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk and dv of the tile of keys that begins at `other`, from all queries of its sequence."""
    width, place = H * C, tl.arange(0, BLOCK)
    dk, dv = tl.zeros((BLOCK, BLOCK_C), dtype=ACC), tl.zeros((BLOCK, BLOCK_C), dtype=ACC)
    for first in range(other if CAUSAL else 0, length, BLOCK):
        i = first + place
        q = load_rows(q_ptr, start + i, i < length, 3 * width, C, BLOCK_C)
        do = load_gradients(grad_ptr, own_ptr, start, i, length, readout, width, C, FUSED, BLOCK_C)
        lse = tl.load(lse_ptr + (start + i) * H, mask=i < length, other=0.0)
        mean = tl.load(mean_ptr + (start + i) * H, mask=i < length, other=0.0)
        seen = visible_pairs(mask_ptr, start, i, other + place, length, HAS_MASK, CAUSAL)
        p, ds = slopes(q, k, v, do, seen, scale, lse, mean, PRECISION, ACC)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION, out_dtype=ACC)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit
def members(program, ALONE, F):
    """Of a program its first sequence and how many it has, and of the readout rows the first and how many.

    ALONE programs of one sequence, which has no such row, come before groups of F.
    """
    p = program.to(tl.int64)
    group, alone = tl.maximum(p - ALONE, 0), p < ALONE
    return tl.where(alone, p, ALONE + group * F), tl.where(alone, 1, F), group * F, tl.where(alone, 0, F)


@triton.jit
def moved_keys(
    k, position_ptr, f, width, C, HAS_POSITION: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    """Keys of frame f as readout rows of the group see them."""
    if HAS_POSITION:
        c = tl.arange(0, BLOCK_C)
        position = tl.load(position_ptr + f * width + c, mask=c < C, other=0.0).to(ACC)
        k = (k.to(ACC) + position[None, :]).to(k.dtype)
    return k


@triton.jit
def group_gradients(
    q, k, v, do, seen, scale, lse, mean, dq, dk, dv, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """Adds what readout rows q send to a tile of keys and values, and back to them; sums it over the keys."""
    p, ds = slopes(q, k, v, do, seen, scale, lse, mean, PRECISION, ACC)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION, out_dtype=ACC)
    more = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION, out_dtype=ACC)
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    return dq, dk + more, dv, tl.sum(more, axis=0)


def settings(qkv: Tensor, channels: int, length: int) -> dict[str, object]:
    """Tile sizes for sequences of up to `length` rows: one tile where it holds a whole sequence."""
    block = min(64, max(16, triton.next_power_of_2(length)))
    return {
        "BLOCK": block,
        "BLOCK_C": max(16, triton.next_power_of_2(channels)),
        "ONE": length <= block,
        "PRECISION": precision(qkv),
        "ACC": accumulator(qkv),
        "num_warps": 4,
        "num_stages": 1 if length <= block else 2,
    }
