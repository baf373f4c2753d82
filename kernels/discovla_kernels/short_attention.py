"""Self-attention of short sequences on packed rows, one program a sequence and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.attention_tiles import (
    attend_tile,
    key_gradients,
    load_rows,
    log_sizes,
    one_tile_gradients,
    program_head,
    query_gradients,
    sequence,
    settings,
    store_rows,
    visible_pairs,
)
from discovla_kernels.tiles import LOWEST, capability, mask_pointer, unsupported_tensors

MAX_CHANNELS = 128  # of a head; a tile of rows lives in registers


def unsupported(qkv: Tensor, mask: Tensor | None, offsets: Tensor | None, sizes: Tensor | None = None) -> str:
    """Return why the kernels cannot take rows ... 3 h c, or "".

    sizes: of keys, in any dtype.
    """
    if sizes is not None and sizes.device != qkv.device:
        return f"expected all tensors on {qkv.device}, found one on {sizes.device}"
    if qkv.shape[-1] > MAX_CHANNELS:
        return f"expected heads of at most {MAX_CHANNELS} channels, found {qkv.shape[-1]}"
    return unsupported_tensors(qkv, mask, offsets)


@triton.jit
def _short_attention_forward(
    qkv_ptr, offsets_ptr, mask_ptr, sizes_ptr, out_ptr, LENGTH, H, C, scale, HAS_OFFSETS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SIZES: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = softmax(q kᵀ / sqrt(c) + log mask + log sizes) v of one sequence and head.

    0 for a query that sees no key.

    Tile: BLOCK queries x BLOCK keys, one after another, with an online softmax along keys.
    Registers: q, out, the running maximum and sum; k and v come from L1 after the first tile of queries.
    Traffic: 3 c read and c written a row.
    Backward: `_short_attention_backward`.
    """
    s, h = program_head(H)
    start, length = sequence(offsets_ptr, s, LENGTH, HAS_OFFSETS)
    width = H * C
    q_ptr, out_ptr = qkv_ptr + h * C, out_ptr + h * C
    place = tl.arange(0, BLOCK)
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
            seen, bias = visible_pairs(mask_ptr, start, i, j, length, HAS_MASK, CAUSAL), None
            if HAS_SIZES:
                bias = log_sizes(sizes_ptr, start, j, length, ACC)
            top, total, out = attend_tile(q, k, v, seen, scale, top, total, out, PRECISION, ACC, bias)
        out /= tl.where(total == 0, 1.0, total)[:, None]
        store_rows(out_ptr, start + i, i < length, width, C, out, BLOCK_C)


@triton.jit
def _short_attention_backward(
    qkv_ptr, offsets_ptr, mask_ptr, sizes_ptr, grad_ptr, dqkv_ptr, lse_ptr, mean_ptr, LENGTH, H, C, scale,
    HAS_OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SIZES: tl.constexpr, CAUSAL: tl.constexpr,
    ONE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """P computed again; dS = P (dO vᵀ - D) / sqrt(c), D = sum_j P (dO vᵀ); dq = dS k, dk = dSᵀ q, dv = Pᵀ dO.

    Tile: as forward.  ONE: the sequence is one tile in registers, five products.  Otherwise a first loop over
    tiles of queries computes lse, D (two numbers a row, which the same program reads again) and dq, and a
    second over tiles of keys dk and dv.  Every element is written once, by one program, so the result does
    not depend on an order.
    Traffic: 3 c of q k v and c of dO read, 3 c written a row.
    """
    s, h = program_head(H)
    start, length = sequence(offsets_ptr, s, LENGTH, HAS_OFFSETS)
    width = H * C
    q_ptr, grad_ptr, dq_ptr = qkv_ptr + h * C, grad_ptr + h * C, dqkv_ptr + h * C
    place = tl.arange(0, BLOCK)
    if ONE:
        rows, real = start + place, place < length
        q = load_rows(q_ptr, rows, real, 3 * width, C, BLOCK_C)
        k = load_rows(q_ptr + width, rows, real, 3 * width, C, BLOCK_C)
        v = load_rows(q_ptr + 2 * width, rows, real, 3 * width, C, BLOCK_C)
        do = load_rows(grad_ptr, rows, real, width, C, BLOCK_C)
        seen = visible_pairs(mask_ptr, start, place, place, length, HAS_MASK, CAUSAL)
        bias = None
        if HAS_SIZES:
            bias = log_sizes(sizes_ptr, start, place, length, ACC)
        p, ds = one_tile_gradients(q, k, v, do, seen, scale, PRECISION, ACC, bias)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION, out_dtype=ACC)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION, out_dtype=ACC)
        dq = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION, out_dtype=ACC)
        store_rows(dq_ptr, rows, real, 3 * width, C, dq, BLOCK_C)
        store_rows(dq_ptr + width, rows, real, 3 * width, C, dk, BLOCK_C)
        store_rows(dq_ptr + 2 * width, rows, real, 3 * width, C, dv, BLOCK_C)
    else:
        lse_ptr, mean_ptr = lse_ptr + h, mean_ptr + h
        query_gradients(
            q_ptr, mask_ptr, grad_ptr, grad_ptr, dq_ptr, lse_ptr, mean_ptr, start, length, 0, H, C, scale,
            False, HAS_MASK, CAUSAL, BLOCK, BLOCK_C, PRECISION, ACC, sizes_ptr if HAS_SIZES else None,
        )  # fmt: skip
        tl.debug_barrier()  # lse and D that other threads of the program wrote are read from here on
        for other in range(0, length, BLOCK):
            rows, real = start + other + place, other + place < length
            k = load_rows(q_ptr + width, rows, real, 3 * width, C, BLOCK_C)
            v = load_rows(q_ptr + 2 * width, rows, real, 3 * width, C, BLOCK_C)
            dk, dv = key_gradients(
                q_ptr, mask_ptr, grad_ptr, grad_ptr, lse_ptr, mean_ptr, k, v, other, start, length, 0, H, C,
                scale, False, HAS_MASK, CAUSAL, BLOCK, BLOCK_C, PRECISION, ACC,
                sizes_ptr if HAS_SIZES else None,
            )  # fmt: skip
            store_rows(dq_ptr + width, rows, real, 3 * width, C, dk, BLOCK_C)
            store_rows(dq_ptr + 2 * width, rows, real, 3 * width, C, dv, BLOCK_C)


def forward(
    qkv: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    sizes: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
) -> Tensor:
    """Return outputs r w of packed rows r 3w, contiguous.

    offsets: n + 1, int32, of sequences of at most `length` rows; None if all have `length`.  mask: r, bool.
    sizes: r, of keys, contiguous.
    """
    rows, width = len(qkv), qkv.shape[1] // 3
    out, tile = qkv.new_empty(rows, width), settings(qkv, width // heads, length)
    del tile["ONE"]
    if length <= 32 and capability(qkv) >= 120:
        tile["maxnreg"] = 255  # the compiler's own limit, for one program more, would spill
    _short_attention_forward[_grid(rows, length, heads, offsets)](
        qkv, qkv if offsets is None else offsets, mask_pointer(mask, qkv),
        qkv if sizes is None else sizes, out, length, heads, width // heads, (width // heads) ** -0.5,
        HAS_OFFSETS=offsets is not None, HAS_MASK=mask is not None, HAS_SIZES=sizes is not None,
        CAUSAL=causal, **tile,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    qkv: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    sizes: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
) -> Tensor:
    """Return the gradient by the packed rows from that by the outputs, r w, contiguous."""
    rows, width = len(qkv), qkv.shape[1] // 3
    dqkv, tile = torch.empty_like(qkv), settings(qkv, width // heads, length)
    tile["num_stages"] = 1  # tiles in flight would spill
    acc = torch.promote_types(qkv.dtype, torch.float32)
    lse, mean = (qkv.new_empty(0 if tile["ONE"] else rows, heads, dtype=acc) for _ in range(2))
    _short_attention_backward[_grid(rows, length, heads, offsets)](
        qkv, qkv if offsets is None else offsets, mask_pointer(mask, qkv), qkv if sizes is None else sizes,
        grad, dqkv, lse, mean, length, heads, width // heads, (width // heads) ** -0.5,
        HAS_OFFSETS=offsets is not None, HAS_MASK=mask is not None, HAS_SIZES=sizes is not None,
        CAUSAL=causal, **tile,
    )  # fmt: skip
    return dqkv


def _grid(rows: int, length: int, heads: int, offsets: Tensor | None) -> tuple[int]:
    return (heads * (rows // length if offsets is None else len(offsets) - 1),)
