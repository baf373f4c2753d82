"""Merging of similar tokens: match and average all tokens of a sequence in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import accumulator, capability, unsupported_tensors

MAX_SOURCES = 1024  # of a sequence, whose best scores live in registers
FLOOR = tl.constexpr(1e-12)
NONE = tl.constexpr(1 << 30)  # above any place


def unsupported(x: Tensor, metric: Tensor, visible: Tensor | None) -> str:
    """Return why the kernel cannot merge rows n l w by a metric n l c, or ""."""
    if visible is not None:
        return "masked frames have no kernel: impl='torch' computes them"
    if x.shape[1] > 2 * MAX_SOURCES:
        return f"expected at most {2 * MAX_SOURCES} tokens, found {x.shape[1]}"
    return unsupported_tensors(x) or unsupported_tensors(metric)


@triton.jit
def _best_destinations(
    metric, s, d_tiles, S, D, FIRST_S, FIRST_D, C,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return for each source the highest cosine, and the lowest destination that has it.

    metric: of this sequence, l C.  Source s is row FIRST_S + 2 s, destination d row FIRST_D + 2 d.
    """
    best = tl.full((BLOCK_S,), float("-inf"), dtype=ACC)
    destination = tl.full((BLOCK_S,), 0, dtype=tl.int32)
    for tile in range(0, d_tiles):
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        scores = tl.zeros((BLOCK_S, BLOCK_D), dtype=ACC)
        squares_s, squares_d = tl.zeros((BLOCK_S,), dtype=ACC), tl.zeros((BLOCK_D,), dtype=ACC)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            of_s = metric + (FIRST_S + 2 * s)[:, None] * C + c[None, :]
            of_d = metric + (FIRST_D + 2 * d)[None, :] * C + c[:, None]
            x = tl.load(of_s, mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)
            y = tl.load(of_d, mask=(d < D)[None, :] & (c < C)[:, None], other=0.0)
            scores = tl.dot(x, y, scores, input_precision="ieee", out_dtype=ACC)
            squares_s += tl.sum(x * x, axis=1)
            squares_d += tl.sum(y * y, axis=0)
        norms = (
            tl.maximum(tl.sqrt(squares_s), FLOOR)[:, None] * tl.maximum(tl.sqrt(squares_d), FLOOR)[None, :]
        )
        scores = tl.where((d < D)[None, :], scores / norms, float("-inf"))
        highest = tl.max(scores, axis=1)
        lowest = tl.min(tl.where(scores == highest[:, None], d[None, :], NONE), axis=1)
        destination = tl.where(highest > best, lowest, destination)
        best = tl.maximum(best, highest)
    return best, destination


@triton.jit
def _merge_forward(
    x_ptr, sizes_ptr, metric_ptr, out_ptr, out_sizes_ptr, target_ptr, L, W, C, COUNT, FIXED, S, D,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Merge the COUNT best matched of S sources of one sequence into its D destinations.

    Tile: one sequence; scores in tiles of BLOCK_D destinations, rows in tiles of BLOCK_W columns.  Traffic:
    every row read and written once; the metric of the sources once per tile of destinations, from L2.
    Backward: `_merge_backward`.
    """
    n = tl.program_id(0).to(tl.int64)
    s, d_tiles = tl.arange(0, BLOCK_S), tl.cdiv(D, BLOCK_D)
    first_s, first_d = FIXED + FIXED % 2, FIXED + (FIXED + 1) % 2
    best, destination = _best_destinations(
        metric_ptr + n * L * C, s, d_tiles, S, D, first_s, first_d, C, BLOCK_S, BLOCK_D, BLOCK_C, ACC
    )
    merged = s >= NONE
    for _ in range(0, COUNT):
        free = (s < S) & (merged == 0)
        highest = tl.max(tl.where(free, best, float("-inf")), axis=0)
        chosen = tl.min(tl.where(free & (best == highest), s, NONE), axis=0)
        merged = merged | (s == chosen)
    kept = (s < S) & (merged == 0)
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    of_s = FIXED + tl.where(kept, place, S - COUNT + destination)
    tl.store(target_ptr + n * L + first_s + 2 * s, of_s.to(tl.int64), mask=s < S)
    size_s = tl.load(sizes_ptr + n * L + first_s + 2 * s, mask=s < S, other=0.0).to(ACC)
    tl.store(out_sizes_ptr + n * (L - COUNT) + of_s, size_s, mask=kept)
    for row in range(0, FIXED):
        tl.store(target_ptr + n * L + row, row + tl.full((), 0, dtype=tl.int64))
        tl.store(out_sizes_ptr + n * (L - COUNT) + row, tl.load(sizes_ptr + n * L + row))
    for tile in range(0, d_tiles):
        d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        joins = (destination[None, :] == d[:, None]) & (merged & (s < S))[None, :]
        size = tl.load(sizes_ptr + n * L + first_d + 2 * d, mask=d < D, other=1.0).to(ACC)
        size += tl.sum(tl.where(joins, size_s[None, :], 0.0), axis=1)
        of_d = FIXED + S - COUNT + d
        tl.store(target_ptr + n * L + first_d + 2 * d, of_d.to(tl.int64), mask=d < D)
        tl.store(out_sizes_ptr + n * (L - COUNT) + of_d, size, mask=d < D)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        columns = (w < W)[None, :]
        for row in range(0, FIXED):
            values = tl.load(x_ptr + (n * L + row) * W + w, mask=w < W)
            tl.store(out_ptr + (n * (L - COUNT) + row) * W + w, values, mask=w < W)
        place_s = (n * L + first_s + 2 * s)[:, None] * W + w[None, :]
        source = tl.load(x_ptr + place_s, mask=(s < S)[:, None] & columns, other=0.0)
        kept_s = (n * (L - COUNT) + of_s)[:, None] * W + w[None, :]
        tl.store(out_ptr + kept_s, source, mask=kept[:, None] & columns)
        source = source.to(ACC) * size_s[:, None]
        for tile in range(0, d_tiles):
            d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
            real = (d < D)[:, None] & columns
            joins = ((destination[None, :] == d[:, None]) & (merged & (s < S))[None, :]).to(ACC)
            own = tl.load(sizes_ptr + n * L + first_d + 2 * d, mask=d < D, other=1.0).to(ACC)
            place_d = (n * L + first_d + 2 * d)[:, None] * W + w[None, :]
            total = tl.load(x_ptr + place_d, mask=real, other=0.0).to(ACC) * own[:, None]
            total = tl.dot(joins, source, total, input_precision="ieee", out_dtype=ACC)
            size = own + tl.sum(joins * size_s[None, :], axis=1)
            merged_d = (n * (L - COUNT) + FIXED + S - COUNT + d)[:, None] * W + w[None, :]
            tl.store(out_ptr + merged_d, total / size[:, None], mask=real)


@triton.jit
def _merge_backward(
    grad_ptr, sizes_ptr, merged_ptr, target_ptr, dx_ptr, L, LEFT, W, BLOCK_W: tl.constexpr, ACC: tl.constexpr
):
    """dx_i = size_i / size_t(i) dy_t(i). Tile: one row. Traffic: each row once."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, BLOCK_W)
    after = row // L * LEFT + tl.load(target_ptr + row)
    share = tl.load(sizes_ptr + row).to(ACC) / tl.load(merged_ptr + after).to(ACC)
    grad = tl.load(grad_ptr + after * W + w, mask=w < W, other=0.0).to(ACC)
    tl.store(dx_ptr + row * W + w, grad * share, mask=w < W)


def forward(
    x: Tensor, sizes: Tensor, metric: Tensor, count: int, fixed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return merged rows n l' w, their sizes n l' and the targets n l; all operands contiguous."""
    (n, length, width), channels = x.shape, metric.shape[2]
    sources = (length + 1) // 2 - (fixed + 1) // 2
    out, merged = x.new_empty(n, length - count, width), sizes.new_empty(n, length - count)
    target = torch.empty(n, length, dtype=torch.int64, device=x.device)
    block_s = max(16, triton.next_power_of_2(sources))
    # on sm_100 the compiler's own limit, for four programs a multiprocessor, would spill
    limit = {"maxnreg": 160} if block_s == 64 and capability(x) == 100 else {}
    _merge_forward[(n,)](
        x, sizes, metric, out, merged, target,
        length, width, channels, count, fixed, sources, length - fixed - sources,
        BLOCK_S=block_s, BLOCK_D=16 if block_s > 64 else 32, BLOCK_C=32, BLOCK_W=32,
        ACC=accumulator(metric), num_warps=8 if block_s > 64 else 4,
        **limit,
    )  # fmt: skip
    return out, merged, target


def backward(grad: Tensor, sizes: Tensor, merged: Tensor, target: Tensor) -> Tensor:
    """Return the gradient by rows n l w from that by merged rows, n l' w, contiguous."""
    (n, left, width), length = grad.shape, target.shape[1]
    dx = grad.new_empty(n, length, width)
    _merge_backward[(n * length,)](
        grad, sizes.contiguous(), merged, target, dx, length, left, width,
        BLOCK_W=triton.next_power_of_2(width), ACC=accumulator(grad), num_warps=4,
    )  # fmt: skip
    return dx
