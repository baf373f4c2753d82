"""Attention of one query a sequence, within its sequence and over all sequences of its group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.attention_tiles import (
    attend_tile,
    group_gradients,
    keys_with_position,
    load_rows,
    log_sum_exp,
    measure_tile,
    program_head,
    program_sequences,
    sequence,
    settings,
    store_rows,
    visible,
)
from discovla_kernels.short_attention import unsupported as attention_unsupported
from discovla_kernels.tiles import LOWEST, capability, mask_pointer

MAX_FRAMES = 64  # of a group; a query of each lives in registers


def unsupported(q: Tensor, kv: Tensor, groups: Tensor, *others: Tensor | None) -> str:
    """Return why the kernels cannot take queries n h c and rows ... 2 h c in groups b f, or ""."""
    if groups.shape[1] > MAX_FRAMES:
        return f"expected groups of at most {MAX_FRAMES} frames, found {groups.shape[1]}"
    for other in (kv, groups, *others):
        if reason := attention_unsupported(q, other, None):
            return reason
    return ""


@triton.jit
def _visible_keys(mask_ptr, readout_ptr, s, start, j, length, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Return which keys j of sequence s its query sees."""
    if CAUSAL:
        length = (tl.load(readout_ptr + s) - start + 1).to(tl.int32)
    return visible(mask_ptr, start, j, length, HAS_MASK)[None, :]


@triton.jit
def _readout_attention_forward(
    q_ptr, kv_ptr, offsets_ptr, mask_ptr, group_mask_ptr, readout_ptr, position_ptr, out_ptr, local_ptr,
    LENGTH, UNGROUPED, F, H, C, scale, HAS_OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_GROUP_MASK: tl.constexpr, HAS_POSITION: tl.constexpr, GROUPED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """o_f = softmax(q_f k_fᵀ / sqrt(c)) v_f of sequence f, g_f = softmax(q_f Kᵀ / sqrt(c)) V of its group.

    K, V: keys (with the frames' positions) and values of all sequences of the group.  out holds g_f, and o_f
    of the first UNGROUPED sequences; local holds o_f of the others.
    Tile: a group, or an ungrouped sequence, and a head.  Its queries, one a row of BLOCK_F, stay in registers
    with two online softmaxes; each tile of BLOCK keys is read once, for g in all rows and for o in row f.
    Traffic: 2 c read a row, c read and 2 c written a sequence.  Backward: `_readout_attention_backward`.
    """
    program, h = program_head(H)
    first_s, count, g, grouped = program_sequences(program, UNGROUPED, F)
    width, place, slot = H * C, tl.arange(0, BLOCK), tl.arange(0, BLOCK_F)
    kv_ptr, position_ptr = kv_ptr + h * C, position_ptr + h * C
    q = load_rows(q_ptr + h * C, first_s + slot, slot < count, width, C, BLOCK_C)
    top, total = tl.full((BLOCK_F,), LOWEST, dtype=ACC), tl.zeros((BLOCK_F,), dtype=ACC)
    top_g, total_g = tl.full((BLOCK_F,), LOWEST, dtype=ACC), tl.zeros((BLOCK_F,), dtype=ACC)
    out, out_g = tl.zeros((BLOCK_F, BLOCK_C), dtype=ACC), tl.zeros((BLOCK_F, BLOCK_C), dtype=ACC)
    for f in range(0, count):
        start, length = sequence(offsets_ptr, first_s + f, LENGTH, HAS_OFFSETS)
        for other in range(0, length, BLOCK):
            j = other + place
            k = load_rows(kv_ptr, start + j, j < length, 2 * width, C, BLOCK_C)
            v = load_rows(kv_ptr + width, start + j, j < length, 2 * width, C, BLOCK_C)
            seen = _visible_keys(mask_ptr, readout_ptr, first_s + f, start, j, length, HAS_MASK, CAUSAL)
            seen = seen & (slot == f)[:, None]
            top, total, out = attend_tile(q, k, v, seen, scale, top, total, out, PRECISION, ACC)
            if GROUPED:
                k = keys_with_position(k, position_ptr, f, width, C, HAS_POSITION, BLOCK_C, ACC)
                seen = visible(group_mask_ptr, start, j, length, HAS_GROUP_MASK)[None, :]
                seen = seen & (slot < grouped)[:, None]
                top_g, total_g, out_g = attend_tile(
                    q, k, v, seen, scale, top_g, total_g, out_g, PRECISION, ACC
                )
    out /= tl.where(total == 0, 1.0, total)[:, None]
    out_g /= tl.where(total_g == 0, 1.0, total_g)[:, None]
    rows = tl.where((slot < grouped)[:, None], out_g, out)
    store_rows(out_ptr + h * C, first_s + slot, slot < count, width, C, rows, BLOCK_C)
    store_rows(local_ptr + h * C, g + slot, slot < grouped, width, C, out, BLOCK_C)


@triton.jit
def _readout_attention_backward(
    q_ptr, kv_ptr, offsets_ptr, mask_ptr, group_mask_ptr, readout_ptr, position_ptr, grad_ptr, local_grad_ptr,
    dq_ptr, dkv_ptr, dposition_ptr, LENGTH, UNGROUPED, F, H, C, scale, HAS_OFFSETS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GROUP_MASK: tl.constexpr, HAS_POSITION: tl.constexpr, GROUPED: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """P computed again; dS = P (dO vᵀ - D) / sqrt(c), D = sum_j P (dO vᵀ); dq = dS k, dk = dSᵀ q, dv = Pᵀ dO.

    Both for each sequence's own query and for the group.  Tile: as forward, which keeps nothing: a first pass
    over the keys computes the log-sum-exps and D of all queries in registers, a second the gradients.
    dposition: sum over a sequence's keys of the group's dSᵀ q.
    """
    program, h = program_head(H)
    first_s, count, g, grouped = program_sequences(program, UNGROUPED, F)
    width, place, slot = H * C, tl.arange(0, BLOCK), tl.arange(0, BLOCK_F)
    kv_ptr, dkv_ptr, position_ptr, c = (
        kv_ptr + h * C,
        dkv_ptr + h * C,
        position_ptr + h * C,
        tl.arange(0, BLOCK_C),
    )
    q = load_rows(q_ptr + h * C, first_s + slot, slot < count, width, C, BLOCK_C)
    rows = load_rows(grad_ptr + h * C, first_s + slot, slot < count, width, C, BLOCK_C)
    local = load_rows(local_grad_ptr + h * C, g + slot, slot < grouped, width, C, BLOCK_C)
    do = tl.where((slot < grouped)[:, None], local, rows)
    top, total = tl.full((BLOCK_F,), LOWEST, dtype=ACC), tl.zeros((BLOCK_F,), dtype=ACC)
    top_g, total_g = tl.full((BLOCK_F,), LOWEST, dtype=ACC), tl.zeros((BLOCK_F,), dtype=ACC)
    mean, mean_g = tl.zeros((BLOCK_F,), dtype=ACC), tl.zeros((BLOCK_F,), dtype=ACC)
    for f in range(0, count):
        start, length = sequence(offsets_ptr, first_s + f, LENGTH, HAS_OFFSETS)
        for other in range(0, length, BLOCK):
            j = other + place
            k = load_rows(kv_ptr, start + j, j < length, 2 * width, C, BLOCK_C)
            v = load_rows(kv_ptr + width, start + j, j < length, 2 * width, C, BLOCK_C)
            seen = _visible_keys(mask_ptr, readout_ptr, first_s + f, start, j, length, HAS_MASK, CAUSAL)
            seen = seen & (slot == f)[:, None]
            top, total, mean = measure_tile(q, k, v, do, seen, scale, top, total, mean, PRECISION, ACC)
            if GROUPED:
                k = keys_with_position(k, position_ptr, f, width, C, HAS_POSITION, BLOCK_C, ACC)
                seen = visible(group_mask_ptr, start, j, length, HAS_GROUP_MASK)[None, :]
                seen = seen & (slot < grouped)[:, None]
                top_g, total_g, mean_g = measure_tile(
                    q, k, v, rows, seen, scale, top_g, total_g, mean_g, PRECISION, ACC
                )
    lse, mean = log_sum_exp(top, total), mean / tl.where(total == 0, 1.0, total)
    lse_g, mean_g = log_sum_exp(top_g, total_g), mean_g / tl.where(total_g == 0, 1.0, total_g)
    dq = tl.zeros((BLOCK_F, BLOCK_C), dtype=ACC)
    for f in range(0, count):
        start, length = sequence(offsets_ptr, first_s + f, LENGTH, HAS_OFFSETS)
        dposition = tl.zeros((BLOCK_C,), dtype=ACC)
        for other in range(0, length, BLOCK):
            j = other + place
            dk, dv = tl.zeros((BLOCK, BLOCK_C), dtype=ACC), tl.zeros((BLOCK, BLOCK_C), dtype=ACC)
            k = load_rows(kv_ptr, start + j, j < length, 2 * width, C, BLOCK_C)
            v = load_rows(kv_ptr + width, start + j, j < length, 2 * width, C, BLOCK_C)
            seen = _visible_keys(mask_ptr, readout_ptr, first_s + f, start, j, length, HAS_MASK, CAUSAL)
            seen = seen & (slot == f)[:, None]
            dq, dk, dv, _ = group_gradients(q, k, v, do, seen, scale, lse, mean, dq, dk, dv, PRECISION, ACC)
            if GROUPED:
                k = keys_with_position(k, position_ptr, f, width, C, HAS_POSITION, BLOCK_C, ACC)
                seen = visible(group_mask_ptr, start, j, length, HAS_GROUP_MASK)[None, :]
                seen = seen & (slot < grouped)[:, None]
                dq, dk, dv, more = group_gradients(
                    q, k, v, rows, seen, scale, lse_g, mean_g, dq, dk, dv, PRECISION, ACC
                )
                dposition += more
            store_rows(dkv_ptr, start + j, j < length, 2 * width, C, dk, BLOCK_C)
            store_rows(dkv_ptr + width, start + j, j < length, 2 * width, C, dv, BLOCK_C)
        if HAS_POSITION:
            tl.store(dposition_ptr + (g + f) * width + h * C + c, dposition, mask=(c < C) & (f < grouped))
    store_rows(dq_ptr + h * C, first_s + slot, slot < count, width, C, dq, BLOCK_C)


def forward(
    q: Tensor,
    kv: Tensor,
    readout_rows: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    ungrouped: int,
    group: int,
) -> Tensor:
    """Return g (o of ungrouped sequences), n w, then o of the n' grouped ones: (n + n') w.

    q: n w.  kv: r 2w.  readout_rows: n, int64.  offsets: n + 1, int32, of sequences of at most `length` rows;
    None if all have `length`.  key_mask, group_mask: r.  position: f w.  group: 0 for none.  All contiguous.
    """
    n, channels = len(q), q.shape[1] // heads
    out = q.new_empty(2 * n - ungrouped if group else n, q.shape[1])
    alone, frames = (ungrouped, group) if group else (n, 1)
    constants = _constants(q, offsets, key_mask, group_mask, position, heads, length, causal, group)
    if length <= 32 and capability(q) == 100:
        constants["maxnreg"] = 255  # the compiler's own limit, for one program more, would spill
    _readout_attention_forward[(heads * (alone + (n - alone) // frames),)](
        q, kv, q if offsets is None else offsets, mask_pointer(key_mask, q), mask_pointer(group_mask, q),
        readout_rows, q if position is None else position, out, out[n:], length, alone, frames, heads,
        channels, channels**-0.5, **constants,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    readout_rows: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    ungrouped: int,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients by queries, by rows, and by the positions of every group (n' w; empty without).

    grad: by the result of `forward`, contiguous.
    """
    n, channels = len(q), q.shape[1] // heads
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    acc = torch.promote_types(q.dtype, torch.float32)
    dposition = q.new_empty(0 if position is None else n - ungrouped, q.shape[1], dtype=acc)
    alone, frames = (ungrouped, group) if group else (n, 1)
    _readout_attention_backward[(heads * (alone + (n - alone) // frames),)](
        q, kv, q if offsets is None else offsets, mask_pointer(key_mask, q), mask_pointer(group_mask, q),
        readout_rows, q if position is None else position, grad, grad[n:], dq, dkv, dposition, length, alone,
        frames, heads, channels, channels**-0.5,
        **_constants(q, offsets, key_mask, group_mask, position, heads, length, causal, group),
    )  # fmt: skip
    return dq, dkv, dposition


def _constants(
    q: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    group: int,
) -> dict[str, object]:
    constants = settings(q, q.shape[1] // heads, length) | {
        "HAS_OFFSETS": offsets is not None,
        "HAS_MASK": key_mask is not None,
        "HAS_GROUP_MASK": group_mask is not None,
        "HAS_POSITION": position is not None,
        "GROUPED": group > 0,
        "CAUSAL": causal,
        "BLOCK_F": max(16, triton.next_power_of_2(max(1, group))),
    }
    del constants["ONE"]
    return constants
