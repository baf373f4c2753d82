"""Tiles of attention on packed rows (q k v, 3 h c wide) of sequences that lie end to end."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import LOWEST, accumulator, precision


@triton.jit
def program_head(H):
    """Return the sequence or group of a program, and its head: neighbours read neighbouring columns."""
    return tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)


@triton.jit
def sequence(offsets_ptr, s, LENGTH, HAS_OFFSETS: tl.constexpr):
    """Return the first row and the number of rows of a sequence; without offsets all have LENGTH."""
    start, length = s.to(tl.int64) * LENGTH, LENGTH
    if HAS_OFFSETS:
        start = tl.load(offsets_ptr + s).to(tl.int64)
        length = (tl.load(offsets_ptr + s + 1).to(tl.int64) - start).to(tl.int32)
    return start, length


@triton.jit
def load_rows(ptr, rows, real, stride, C, BLOCK_C: tl.constexpr):
    """Load C entries of each row, zero-padded to BLOCK_C; rows that are not real are zeros."""
    c = tl.arange(0, BLOCK_C)
    here = real[:, None] & (c < C)[None, :]
    return tl.load(ptr + rows[:, None] * stride + c[None, :], mask=here, other=0.0)


@triton.jit
def store_rows(ptr, rows, real, stride, C, x, BLOCK_C: tl.constexpr):
    """Store C entries of each real row."""
    c = tl.arange(0, BLOCK_C)
    here = real[:, None] & (c < C)[None, :]
    tl.store(ptr + rows[:, None] * stride + c[None, :], x, mask=here)


@triton.jit
def visible(mask_ptr, start, j, length, HAS_MASK: tl.constexpr):
    """Return which keys j of a sequence are visible to any query."""
    seen = j < length
    if HAS_MASK:
        seen = seen & (tl.load(mask_ptr + start + j, mask=seen, other=0) != 0)
    return seen


@triton.jit
def visible_pairs(mask_ptr, start, i, j, length, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Return which keys j are visible to the queries i of a sequence."""
    seen = visible(mask_ptr, start, j, length, HAS_MASK)[None, :] & (i < length)[:, None]
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    return seen


@triton.jit
def log_sizes(sizes_ptr, start, j, length, ACC: tl.constexpr):
    """Return the logarithms of the sizes of keys j of a sequence."""
    return tl.log(tl.load(sizes_ptr + start + j, mask=j < length, other=1.0).to(ACC))


@triton.jit
def scores(q, k, seen, scale, PRECISION: tl.constexpr, ACC: tl.constexpr, bias=None):
    """Return scale q kᵀ + bias of each key, and LOWEST for keys that are not visible."""
    product = scale * tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    if bias is not None:
        product += bias[None, :]
    return tl.where(seen, product, LOWEST)


@triton.jit
def attend_tile(q, k, v, seen, scale, top, total, out, PRECISION: tl.constexpr, ACC: tl.constexpr, bias=None):
    """Add keys to an online softmax: its running maximum, sum, and weighted sum of values."""
    s = scores(q, k, seen, scale, PRECISION, ACC, bias)
    new_top = tl.maximum(top, tl.max(s, axis=1))
    keep, p = tl.exp(top - new_top), tl.where(seen, tl.exp(s - new_top[:, None]), 0.0)
    out = tl.dot(p.to(v.dtype), v, out * keep[:, None], input_precision=PRECISION, out_dtype=ACC)
    return new_top, total * keep + tl.sum(p, axis=1), out


@triton.jit
def measure_tile(
    q, k, v, do, seen, scale, top, total, mean, PRECISION: tl.constexpr, ACC: tl.constexpr, bias=None
):
    """Add keys to the statistics that backward needs: maximum, sum, and sum of weights times do vᵀ."""
    s = scores(q, k, seen, scale, PRECISION, ACC, bias)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    new_top = tl.maximum(top, tl.max(s, axis=1))
    keep, p = tl.exp(top - new_top), tl.where(seen, tl.exp(s - new_top[:, None]), 0.0)
    return new_top, total * keep + tl.sum(p, axis=1), mean * keep + tl.sum(p * dp, axis=1)


@triton.jit
def score_gradients(
    q, k, v, do, seen, scale, lse, mean, PRECISION: tl.constexpr, ACC: tl.constexpr, bias=None
):
    """Return the weights p of a tile and the derivative by q kᵀ, p (do vᵀ - mean) scale."""
    s = scores(q, k, seen, scale, PRECISION, ACC, bias)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    p = tl.where(seen, tl.exp(s - lse[:, None]), 0.0)
    return p, p * (dp - mean[:, None]) * scale


@triton.jit
def one_tile_gradients(q, k, v, do, seen, scale, PRECISION: tl.constexpr, ACC: tl.constexpr, bias=None):
    """`score_gradients` of a tile that holds every key: lse and mean are computed in registers."""
    s = scores(q, k, seen, scale, PRECISION, ACC, bias)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    p = tl.where(seen, tl.exp(s - tl.max(s, axis=1)[:, None]), 0.0)
    total = tl.sum(p, axis=1)
    p /= tl.where(total == 0, 1.0, total)[:, None]
    return p, p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale


@triton.jit
def log_sum_exp(top, total):
    """Return the log-sum-exp of an online softmax; a finite number, unused, if it has no keys."""
    return top + tl.log(tl.where(total == 0, 1.0, total))


@triton.jit
def load_gradients(
    grad_ptr, local_ptr, start, i, length, readout, width, C, FUSED: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Load the gradients of outputs i of a sequence; FUSED: that of its readout row from local_ptr."""
    do = load_rows(grad_ptr, start + i, i < length, width, C, BLOCK_C)
    if FUSED:
        c = tl.arange(0, BLOCK_C)
        local = tl.load(local_ptr + c, mask=c < C, other=0.0)
        do = tl.where((i == readout)[:, None], local[None, :], do)
    return do


@triton.jit
def query_gradients(
    q_ptr, mask_ptr, grad_ptr, local_ptr, dq_ptr, lse_ptr, mean_ptr, start, length, readout, H, C, scale,
    FUSED: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, sizes_ptr=None,
):  # fmt: skip
    """Store dq of a sequence of several tiles, and lse and D of every row for `key_gradients`.

    FUSED: dq of the readout row is returned instead.  sizes_ptr: sizes of the keys, if they have any.
    """
    width, place = H * C, tl.arange(0, BLOCK)
    local = tl.zeros((BLOCK_C,), dtype=ACC)
    for first in range(0, length, BLOCK):
        i = first + place
        q = load_rows(q_ptr, start + i, i < length, 3 * width, C, BLOCK_C)
        do = load_gradients(grad_ptr, local_ptr, start, i, length, readout, width, C, FUSED, BLOCK_C)
        top, total = tl.full((BLOCK,), LOWEST, dtype=ACC), tl.zeros((BLOCK,), dtype=ACC)
        mean, dq = tl.zeros((BLOCK,), dtype=ACC), tl.zeros((BLOCK, BLOCK_C), dtype=ACC)
        last = min(length, first + BLOCK) if CAUSAL else length
        for other in range(0, last, BLOCK):
            j = other + place
            k = load_rows(q_ptr + width, start + j, j < length, 3 * width, C, BLOCK_C)
            v = load_rows(q_ptr + 2 * width, start + j, j < length, 3 * width, C, BLOCK_C)
            seen, bias = visible_pairs(mask_ptr, start, i, j, length, HAS_MASK, CAUSAL), None
            if sizes_ptr is not None:
                bias = log_sizes(sizes_ptr, start, j, length, ACC)
            top, total, mean = measure_tile(q, k, v, do, seen, scale, top, total, mean, PRECISION, ACC, bias)
        lse, mean = log_sum_exp(top, total), mean / tl.where(total == 0, 1.0, total)
        tl.store(lse_ptr + (start + i) * H, lse, mask=i < length)
        tl.store(mean_ptr + (start + i) * H, mean, mask=i < length)
        for other in range(0, last, BLOCK):
            j = other + place
            k = load_rows(q_ptr + width, start + j, j < length, 3 * width, C, BLOCK_C)
            v = load_rows(q_ptr + 2 * width, start + j, j < length, 3 * width, C, BLOCK_C)
            seen, bias = visible_pairs(mask_ptr, start, i, j, length, HAS_MASK, CAUSAL), None
            if sizes_ptr is not None:
                bias = log_sizes(sizes_ptr, start, j, length, ACC)
            _, ds = score_gradients(q, k, v, do, seen, scale, lse, mean, PRECISION, ACC, bias)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
        stored = i < length
        if FUSED:
            local += tl.sum(tl.where((i == readout)[:, None], dq, 0.0), axis=0)
            stored = stored & (i != readout)
        store_rows(dq_ptr, start + i, stored, 3 * width, C, dq, BLOCK_C)
    return local


@triton.jit
def key_gradients(
    q_ptr, mask_ptr, grad_ptr, local_ptr, lse_ptr, mean_ptr, k, v, other, start, length, readout, H, C, scale,
    FUSED: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, sizes_ptr=None,
):  # fmt: skip
    """Return dk and dv of the tile of keys that begins at `other`, from all queries of its sequence."""
    width, place = H * C, tl.arange(0, BLOCK)
    bias = None
    if sizes_ptr is not None:
        bias = log_sizes(sizes_ptr, start, other + place, length, ACC)
    dk, dv = tl.zeros((BLOCK, BLOCK_C), dtype=ACC), tl.zeros((BLOCK, BLOCK_C), dtype=ACC)
    for first in range(other if CAUSAL else 0, length, BLOCK):
        i = first + place
        q = load_rows(q_ptr, start + i, i < length, 3 * width, C, BLOCK_C)
        do = load_gradients(grad_ptr, local_ptr, start, i, length, readout, width, C, FUSED, BLOCK_C)
        lse = tl.load(lse_ptr + (start + i) * H, mask=i < length, other=0.0)
        mean = tl.load(mean_ptr + (start + i) * H, mask=i < length, other=0.0)
        seen = visible_pairs(mask_ptr, start, i, other + place, length, HAS_MASK, CAUSAL)
        p, ds = score_gradients(q, k, v, do, seen, scale, lse, mean, PRECISION, ACC, bias)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION, out_dtype=ACC)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit
def program_sequences(program, UNGROUPED, F):
    """Return a program's first sequence and their number, and its first grouped readout row and their number.

    UNGROUPED programs with one sequence and no grouped row come before those with groups of F.
    """
    p = program.to(tl.int64)
    group, alone = tl.maximum(p - UNGROUPED, 0), p < UNGROUPED
    return tl.where(alone, p, UNGROUPED + group * F), tl.where(alone, 1, F), group * F, tl.where(alone, 0, F)


@triton.jit
def keys_with_position(
    k, position_ptr, f, width, C, HAS_POSITION: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    """Return the keys of frame f with its position added, as readout rows of the group see them."""
    if HAS_POSITION:
        c = tl.arange(0, BLOCK_C)
        position = tl.load(position_ptr + f * width + c, mask=c < C, other=0.0).to(ACC)
        k = (k.to(ACC) + position[None, :]).to(k.dtype)
    return k


@triton.jit
def group_gradients(
    q, k, v, do, seen, scale, lse, mean, dq, dk, dv, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """Add the gradients of readout rows q over a tile of keys: dq, dk, dv, and the sum of their dk."""
    p, ds = score_gradients(q, k, v, do, seen, scale, lse, mean, PRECISION, ACC)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION, out_dtype=ACC)
    more = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION, out_dtype=ACC)
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)
    return dq, dk + more, dv, tl.sum(more, axis=0)


def settings(qkv: Tensor, channels: int, length: int) -> dict[str, object]:
    """Return tile sizes for sequences of at most `length` rows: one tile if it holds a whole sequence."""
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
