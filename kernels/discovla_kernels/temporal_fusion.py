"""Attention within frames and of readout rows across the frames of a group, in one pass over the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.attention_tiles import (
    attend_tile,
    group_gradients,
    key_gradients,
    keys_with_position,
    load_rows,
    log_sum_exp,
    program_head,
    program_sequences,
    query_gradients,
    sequence,
    settings,
    store_rows,
    visible,
    visible_pairs,
)
from discovla_kernels.short_attention import unsupported as attention_unsupported
from discovla_kernels.tiles import LOWEST, capability, mask_pointer, operands_in_registers

MAX_FRAMES = 64  # of a group; a query of each lives in registers
PROGRAMS = 1024  # of backward at least, or groups are split: about four for each place on an H200


def unsupported(qkv: Tensor, readout: Tensor, *others: Tensor | None) -> str:
    """Return why the kernels cannot take rows ... 3 h c with readout rows b f, or ""."""
    if readout.shape[1] > MAX_FRAMES:
        return f"expected groups of at most {MAX_FRAMES} frames, found {readout.shape[1]}"
    for other in (readout, *others):
        if reason := attention_unsupported(qkv, other, None):
            return reason
    return ""


@triton.jit
def _tile_with_guests(
    q_ptr, mask_ptr, group_mask_ptr, position_ptr, start, length, guest_rows, guests, H, C, scale,
    HAS_MASK: tl.constexpr, HAS_GROUP_MASK: tl.constexpr, HAS_POSITION: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return q k v of a frame, the keys that queries see, their scores, and the frame's own rows of the tile.

    Readout queries of the group are guests in rows that the frame leaves free.  Keys with the frame's
    position r give guests q (k + r) = q k + q r, a number for each.
    """
    width, i, c = H * C, tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    own = i < length
    rows = tl.where(own, start + i, guest_rows)
    q = load_rows(q_ptr, rows, own | guests, 3 * width, C, BLOCK_C)
    k = load_rows(q_ptr + width, start + i, own, 3 * width, C, BLOCK_C)
    v = load_rows(q_ptr + 2 * width, start + i, own, 3 * width, C, BLOCK_C)
    seen = visible_pairs(mask_ptr, start, i, i, length, HAS_MASK, CAUSAL)
    seen = seen | (guests[:, None] & visible(group_mask_ptr, start, i, length, HAS_GROUP_MASK)[None, :])
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    if HAS_POSITION:
        position = tl.load(position_ptr + c, mask=c < C, other=0.0).to(ACC)
        s += tl.where(guests, tl.sum(q.to(ACC) * position[None, :], axis=1), 0.0)[:, None]
    return q, k, v, seen, tl.where(seen, scale * s, LOWEST), own, rows


@triton.jit
def _temporal_fusion_forward(
    qkv_ptr, offsets_ptr, mask_ptr, group_mask_ptr, readout_ptr, position_ptr, out_ptr, local_ptr, fused_ptr,
    lse_ptr, LENGTH, UNGROUPED, F, H, C, scale, HAS_OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_GROUP_MASK: tl.constexpr, HAS_POSITION: tl.constexpr, CAUSAL: tl.constexpr, ONE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """o_f = softmax(q_f k_fᵀ / sqrt(c)) v_f of every frame f; g_f = softmax(q_f[rho_f] Kᵀ / sqrt(c)) V.

    K, V: keys (with the frames' positions) and values of all frames of a group; rho_f: the readout row.
    out holds o_f, and g_f in readout rows; local holds o_f[rho_f].  The first UNGROUPED sequences have no g.
    Tile: a group and head, frame after frame, BLOCK queries x BLOCK keys as in short attention.  ONE: the
    readout queries are the last rows of the tile (`_tile_with_guests`), whose online softmax goes on over
    frames.  Otherwise, beside the last tile of queries, the BLOCK_F readout rows see all keys of a frame.
    Registers: those of short attention, the readout queries and their online softmax.
    Traffic: 3 c read and c written a row, as short attention; a readout row writes c + 1 more in ACC for
    backward: `_temporal_fusion_backward`.
    """
    program, h = program_head(H)
    first_s, count, g, grouped = program_sequences(program, UNGROUPED, F)
    width, place, c = H * C, tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    q_ptr, out_ptr, local_ptr, position_ptr = (
        qkv_ptr + h * C,
        out_ptr + h * C,
        local_ptr + h * C,
        position_ptr + h * C,
    )
    slot = place - (BLOCK - F) if ONE else tl.arange(0, BLOCK_F)  # guests are the last rows of the tile
    guests = (slot >= 0) & (slot < grouped)
    readout_rows = tl.load(readout_ptr + g + slot, mask=guests, other=0)
    top_g, total_g = tl.full((slot.shape[0],), LOWEST, dtype=ACC), tl.zeros((slot.shape[0],), dtype=ACC)
    out_g = tl.zeros((slot.shape[0], BLOCK_C), dtype=ACC)
    for f in range(0, count):
        start, length = sequence(offsets_ptr, first_s + f, LENGTH, HAS_OFFSETS)
        readout = tl.load(readout_ptr + g + f, mask=f < grouped, other=-1)
        readout = tl.where(f < grouped, readout - start, -1)
        local_place = local_ptr + (g + f) * width + c
        if ONE:
            _, _, v, seen, s, own, _ = _tile_with_guests(
                q_ptr, mask_ptr, group_mask_ptr, position_ptr + f * width, start, length, readout_rows,
                guests, H, C, scale, HAS_MASK, HAS_GROUP_MASK, HAS_POSITION, CAUSAL, BLOCK, BLOCK_C,
                PRECISION, ACC,
            )  # fmt: skip
            top = tl.maximum(top_g, tl.max(s, axis=1))
            keep, p = tl.exp(top_g - top), tl.where(seen, tl.exp(s - top[:, None]), 0.0)
            total = total_g * keep + tl.sum(p, axis=1)
            out = tl.dot(p.to(v.dtype), v, out_g * keep[:, None], input_precision=PRECISION, out_dtype=ACC)
            top_g, total_g = tl.where(guests, top, LOWEST), tl.where(guests, total, 0.0)
            out_g = tl.where(guests[:, None], out, 0.0)
            out /= tl.where(total == 0, 1.0, total)[:, None]
            store_rows(out_ptr, start + place, own & (place != readout), width, C, out, BLOCK_C)
            local = tl.sum(tl.where((place == readout)[:, None], out, 0.0), axis=0)
            tl.store(local_place, local, mask=(c < C) & (readout >= 0))
        else:
            readout_q = load_rows(q_ptr, readout_rows, guests, 3 * width, C, BLOCK_C)
            for first in range(0, length, BLOCK):
                i = first + place
                q = load_rows(q_ptr, start + i, i < length, 3 * width, C, BLOCK_C)
                top, total = tl.full((BLOCK,), LOWEST, dtype=ACC), tl.zeros((BLOCK,), dtype=ACC)
                out = tl.zeros((BLOCK, BLOCK_C), dtype=ACC)
                last = min(length, first + BLOCK) if CAUSAL else length
                for other in range(0, last, BLOCK):
                    j = other + place
                    k = load_rows(q_ptr + width, start + j, j < length, 3 * width, C, BLOCK_C)
                    v = load_rows(q_ptr + 2 * width, start + j, j < length, 3 * width, C, BLOCK_C)
                    seen = visible_pairs(mask_ptr, start, i, j, length, HAS_MASK, CAUSAL)
                    top, total, out = attend_tile(q, k, v, seen, scale, top, total, out, PRECISION, ACC)
                    if first + BLOCK >= length:
                        k_g = keys_with_position(k, position_ptr, f, width, C, HAS_POSITION, BLOCK_C, ACC)
                        seen_g = visible(group_mask_ptr, start, j, length, HAS_GROUP_MASK)[None, :]
                        seen_g = seen_g & guests[:, None]
                        top_g, total_g, out_g = attend_tile(
                            readout_q, k_g, v, seen_g, scale, top_g, total_g, out_g, PRECISION, ACC
                        )
                out /= tl.where(total == 0, 1.0, total)[:, None]
                store_rows(out_ptr, start + i, (i < length) & (i != readout), width, C, out, BLOCK_C)
                here = (readout >= first) & (readout < first + BLOCK)
                local = tl.sum(tl.where((i == readout)[:, None], out, 0.0), axis=0)
                tl.store(local_place, local, mask=(c < C) & here)
    out_g /= tl.where(total_g == 0, 1.0, total_g)[:, None]
    store_rows(out_ptr, readout_rows, guests, width, C, out_g, BLOCK_C)
    store_rows(fused_ptr + h * C, g + slot, guests, width, C, out_g, BLOCK_C)
    tl.store(lse_ptr + (g + slot) * H + h, log_sum_exp(top_g, total_g), mask=guests)


@triton.jit
def _one_tile_backward(
    q_ptr, mask_ptr, group_mask_ptr, grad_ptr, local_ptr, dq_ptr, position_ptr, dposition_ptr, start, length,
    readout, member, guest_rows, guests, guest_lse, guest_mean, H, C, scale, HAS_MASK: tl.constexpr,
    HAS_GROUP_MASK: tl.constexpr, HAS_POSITION: tl.constexpr, CAUSAL: tl.constexpr, RELOAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of one frame whose queries, and the group's readout queries as guests, fill one tile.

    Both have the same five products.  By the frame's position, dr = sum of q sum_j dS over guests.
    Stores dq but of the readout row, dk, dv and dr; returns dq of guests, and of the readout row as `member`.
    RELOAD: rows are loaded again, from L1, where they are used again, or they would spill.
    """
    width, i, c = H * C, tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    q, k, v, seen, s, own, rows = _tile_with_guests(
        q_ptr, mask_ptr, group_mask_ptr, position_ptr, start, length, guest_rows, guests, H, C, scale,
        HAS_MASK, HAS_GROUP_MASK, HAS_POSITION, CAUSAL, BLOCK, BLOCK_C, PRECISION, ACC,
    )  # fmt: skip
    do = load_rows(grad_ptr, rows, own | guests, width, C, BLOCK_C)
    local = tl.load(local_ptr + c, mask=c < C, other=0.0)
    do = tl.where((i == readout)[:, None], local[None, :], do)
    top = tl.where(guests, guest_lse, tl.max(s, axis=1))
    p = tl.where(seen, tl.exp(s - top[:, None]), 0.0)
    total = tl.sum(p, axis=1)
    p /= tl.where(guests | (total == 0), 1.0, total)[:, None]
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION, out_dtype=ACC)
    store_rows(dq_ptr + 2 * width, start + i, own, 3 * width, C, dv, BLOCK_C)
    if RELOAD:  # not merged with the first loads, since a store lies between
        v = load_rows(q_ptr + 2 * width, start + i, own, 3 * width, C, BLOCK_C)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    mean = tl.where(guests, guest_mean, tl.sum(p * dp, axis=1))
    ds = p * (dp - mean[:, None]) * scale
    if RELOAD:
        q = load_rows(q_ptr, rows, own | guests, 3 * width, C, BLOCK_C)
    dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION, out_dtype=ACC)
    store_rows(dq_ptr + width, start + i, own, 3 * width, C, dk, BLOCK_C)
    if RELOAD:
        k = load_rows(q_ptr + width, start + i, own, 3 * width, C, BLOCK_C)
    dq = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION, out_dtype=ACC)
    store_rows(dq_ptr, start + i, own & (i != readout), 3 * width, C, dq, BLOCK_C)
    if HAS_POSITION:
        position = tl.load(position_ptr + c, mask=c < C, other=0.0).to(ACC)
        share = tl.where(guests, tl.sum(ds, axis=1), 0.0)
        dq += share[:, None] * position[None, :]
        dposition = tl.sum(share[:, None] * q.to(ACC), axis=0)
        tl.store(dposition_ptr + c, dposition, mask=(c < C) & (readout >= 0))
    local = tl.sum(tl.where((i == readout)[:, None], dq, 0.0), axis=0)
    return tl.where(guests[:, None], dq, 0.0) + tl.where(member[:, None], local[None, :], 0.0)


@triton.jit
def _temporal_fusion_backward(
    qkv_ptr, offsets_ptr, mask_ptr, group_mask_ptr, readout_ptr, position_ptr, grad_ptr, local_grad_ptr,
    fused_ptr, group_lse_ptr, dqkv_ptr, dposition_ptr, part_ptr, lse_ptr, mean_ptr, LENGTH, UNGROUPED, F,
    PARTS, EACH, H, C, scale, SPLIT: tl.constexpr, RELOAD: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GROUP_MASK: tl.constexpr, HAS_POSITION: tl.constexpr, CAUSAL: tl.constexpr,
    ONE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_short_attention_backward` frame after frame, where each tile of keys also sees the readout rows.

    P = exp(q[rho] Kᵀ / sqrt(c) - lse), dS = P (dg Vᵀ - dg·g) / sqrt(c), dK += dSᵀ q[rho], dV += Pᵀ dg.
    dq[rho] = dS K over all frames is added in registers to that of the readout row within its frame.
    dposition: sum over a frame's keys of dSᵀ q[rho], for each group.
    Tile: one of PARTS parts of a group, EACH frames.  ONE: `_one_tile_backward`, 5 products for queries of
    the frame and of the group.  SPLIT: the sum over a part's frames for dq[rho] goes to part_ptr.
    """
    program, h = program_head(H)
    part = tl.maximum(program - UNGROUPED, 0)  # of all groups, and then of its group
    first_s, count, g, grouped = program_sequences(
        tl.where(program < UNGROUPED, program, UNGROUPED + part // PARTS), UNGROUPED, F
    )
    first_f = part % PARTS * EACH
    width, place, c = H * C, tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    q_ptr, grad_ptr, dq_ptr = qkv_ptr + h * C, grad_ptr + h * C, dqkv_ptr + h * C
    slot = place - (BLOCK - F) if ONE else tl.arange(0, BLOCK_F)  # guests are the last rows of the tile
    guests = (slot >= 0) & (slot < grouped)
    readout_rows = tl.load(readout_ptr + g + slot, mask=guests, other=0)
    readout_do = load_rows(grad_ptr, readout_rows, guests, width, C, BLOCK_C)
    fused = load_rows(fused_ptr + h * C, g + slot, guests, width, C, BLOCK_C)
    readout_mean = tl.sum(fused * readout_do.to(ACC), axis=1)
    readout_lse = tl.load(group_lse_ptr + (g + slot) * H + h, mask=guests, other=0.0)
    readout_dq = tl.zeros((slot.shape[0], BLOCK_C), dtype=ACC)
    for f in range(first_f, min(count, first_f + EACH)):
        start, length = sequence(offsets_ptr, first_s + f, LENGTH, HAS_OFFSETS)
        readout = tl.load(readout_ptr + g + f, mask=f < grouped, other=-1)
        readout = tl.where(f < grouped, readout - start, -1)
        local_ptr = local_grad_ptr + (g + f) * width + h * C
        dposition_place = dposition_ptr + (g + f) * width + h * C
        if ONE:
            readout_dq += _one_tile_backward(
                q_ptr, mask_ptr, group_mask_ptr, grad_ptr, local_ptr, dq_ptr,
                position_ptr + f * width + h * C, dposition_place, start, length, readout,
                guests & (slot == f), readout_rows, guests, readout_lse, readout_mean, H, C, scale, HAS_MASK,
                HAS_GROUP_MASK, HAS_POSITION, CAUSAL, RELOAD, BLOCK, BLOCK_C, PRECISION, ACC,
            )  # fmt: skip
        else:
            readout_q = load_rows(q_ptr, readout_rows, guests, 3 * width, C, BLOCK_C)
            dposition = tl.zeros((BLOCK_C,), dtype=ACC)
            local = query_gradients(
                q_ptr, mask_ptr, grad_ptr, local_ptr, dq_ptr, lse_ptr + h, mean_ptr + h, start, length,
                readout, H, C, scale, True, HAS_MASK, CAUSAL, BLOCK, BLOCK_C, PRECISION, ACC,
            )  # fmt: skip
            tl.debug_barrier()  # other threads wrote the lse and D that are read below
            for other in range(0, length, BLOCK):
                j, real = other + place, other + place < length
                k = load_rows(q_ptr + width, start + j, real, 3 * width, C, BLOCK_C)
                v = load_rows(q_ptr + 2 * width, start + j, real, 3 * width, C, BLOCK_C)
                dk, dv = key_gradients(
                    q_ptr, mask_ptr, grad_ptr, local_ptr, lse_ptr + h, mean_ptr + h, k, v, other, start,
                    length, readout, H, C, scale, True, HAS_MASK, CAUSAL, BLOCK, BLOCK_C, PRECISION, ACC,
                )  # fmt: skip
                k_g = keys_with_position(k, position_ptr + h * C, f, width, C, HAS_POSITION, BLOCK_C, ACC)
                seen_g = visible(group_mask_ptr, start, j, length, HAS_GROUP_MASK)[None, :] & guests[:, None]
                readout_dq, dk, dv, more = group_gradients(
                    readout_q, k_g, v, readout_do, seen_g, scale, readout_lse, readout_mean, readout_dq, dk,
                    dv, PRECISION, ACC,
                )  # fmt: skip
                dposition += more
                store_rows(dq_ptr + width, start + j, real, 3 * width, C, dk, BLOCK_C)
                store_rows(dq_ptr + 2 * width, start + j, real, 3 * width, C, dv, BLOCK_C)
            readout_dq += tl.where((slot == f)[:, None], local[None, :], 0.0)
            if HAS_POSITION:
                tl.store(dposition_place + c, dposition, mask=(c < C) & (f < grouped))
    if SPLIT:
        rows = part.to(tl.int64) * F + slot
        store_rows(part_ptr + h * C, rows, guests, width, C, readout_dq, BLOCK_C)
    else:
        store_rows(dq_ptr, readout_rows, guests, 3 * width, C, readout_dq, BLOCK_C)


def forward(
    qkv: Tensor,
    readout_rows: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    ungrouped: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o and g, (r + n) w; for backward g in float32 at least, n w, and its log-sum-exp, n h.

    qkv: r 3w, contiguous.  readout_rows: b f, int64.  offsets: n + 1, int32, of sequences of at most `length`
    rows; None if all have `length`.  key_mask, group_mask: r.  position: f w.
    """
    rows, width, n = len(qkv), qkv.shape[1] // 3, readout_rows.numel()
    acc = torch.promote_types(qkv.dtype, torch.float32)
    out = qkv.new_empty(rows + n, width)
    fused, lse = qkv.new_empty(n, width, dtype=acc), qkv.new_empty(n, heads, dtype=acc)
    tile = length + readout_rows.shape[1]  # rows of a frame and readout rows of its group
    constants = _constants(qkv, readout_rows, offsets, key_mask, group_mask, position, heads, tile, causal)
    if not constants["ONE"] and (gpu := capability(qkv)) and gpu != 90:  # or tiles would spill there
        constants |= {"BLOCK": 32} if gpu < 90 else {"num_stages": 1}
    _temporal_fusion_forward[(heads * (ungrouped + len(readout_rows)),)](
        qkv, qkv if offsets is None else offsets, mask_pointer(key_mask, qkv), mask_pointer(group_mask, qkv),
        readout_rows, qkv if position is None else position, out, out[rows:], fused, lse, length, ungrouped,
        readout_rows.shape[1], heads, width // heads, (width // heads) ** -0.5, **constants,
    )  # fmt: skip
    return out, fused, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    readout_rows: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    fused: Tensor,
    lse: Tensor,
    heads: int,
    length: int,
    causal: bool,
    ungrouped: int,
) -> tuple[Tensor, Tensor]:
    """Return gradients by the packed rows and by the positions of every group (b f w; empty without).

    grad: by o and g, (r + n) w, contiguous.  fused, lse: of `forward`.
    """
    rows, width = len(qkv), qkv.shape[1] // 3
    acc = torch.promote_types(qkv.dtype, torch.float32)
    tile = length + readout_rows.shape[1]  # rows of a frame and readout rows of its group
    constants = _constants(qkv, readout_rows, offsets, key_mask, group_mask, position, heads, tile, causal)
    dposition = qkv.new_empty(*((0, 0) if position is None else readout_rows.shape), width, dtype=acc)
    row_lse, mean = (qkv.new_empty(0 if constants["ONE"] else rows, heads, dtype=acc) for _ in range(2))
    dqkv = torch.empty_like(qkv)
    reload = reloads(qkv, constants)
    if not constants["ONE"]:
        constants |= {"BLOCK": 32, "num_stages": 1}  # larger tiles would spill
    elif reload:
        constants["num_warps"] = 8
    groups, frames = readout_rows.shape
    each = frames_of_a_part(groups * heads, frames)
    parts = triton.cdiv(frames, each)
    partial = qkv.new_empty(groups if parts > 1 else 0, parts, frames, width, dtype=acc)
    _temporal_fusion_backward[(heads * (ungrouped + groups * parts),)](
        qkv, qkv if offsets is None else offsets, mask_pointer(key_mask, qkv), mask_pointer(group_mask, qkv),
        readout_rows, qkv if position is None else position, grad, grad[rows:], fused, lse, dqkv, dposition,
        partial, row_lse, mean, length, ungrouped, frames, parts, each, heads, width // heads,
        (width // heads) ** -0.5, SPLIT=parts > 1, RELOAD=reload, **constants,
    )  # fmt: skip
    if parts > 1:
        dqkv[readout_rows.flatten(), :width] = partial.sum(1).flatten(0, 1).to(dqkv.dtype)
    return dqkv, dposition


def reloads(qkv: Tensor, constants: dict[str, object]) -> bool:
    """Tell if backward of frames of one tile loads rows again, because they would spill."""
    return bool(constants["ONE"]) and constants["BLOCK"] == 64 and operands_in_registers(qkv)


def frames_of_a_part(programs: int, frames: int) -> int:
    """Return how many frames a program of backward takes: all, unless `programs` groups and heads are few."""
    return triton.cdiv(frames, min(frames, triton.cdiv(PROGRAMS, max(1, programs))))


def _constants(
    qkv: Tensor,
    readout_rows: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
) -> dict[str, object]:
    return settings(qkv, qkv.shape[1] // 3 // heads, length) | {
        "HAS_OFFSETS": offsets is not None,
        "HAS_MASK": key_mask is not None,
        "HAS_GROUP_MASK": group_mask is not None,
        "HAS_POSITION": position is not None,
        "CAUSAL": causal,
        "BLOCK_F": max(16, triton.next_power_of_2(readout_rows.shape[1])),
    }
