"""Cross-entropies of one or two similarity matrices and the divergence between them, tile by tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import (
    EXCLUDED,
    Traffic,
    accumulator,
    mask_pointer,
    operands_in_registers,
    precision,
    product_tile,
    unsupported_tensors,
)

BLOCK_BYTES = 1 << 26  # of the derivative of one block
BLOCK_D = 64
Rows = tuple[Tensor, Tensor]  # embeddings r d, and their inverse norms, r


def unsupported(*tensors: Tensor | None) -> str:
    """Return why the kernels cannot take these tensors, or ""."""
    return unsupported_tensors(*tensors)


@triton.jit
def _tile(
    text_ptr, video_ptr, text_inverse_ptr, video_inverse_ptr, teacher_ptr, ignore_ptr, scale, r, c, R, C, D,
    HAS_TEACHER: tl.constexpr, HAS_IGNORE: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return a tile of cosines x, of the teacher's y, of the logits s x and s y without ignored pairs; which
    entries are inside the matrix; and the inverse norms that x was multiplied by."""
    here = (r < R)[:, None] & (c < C)[None, :]
    inverse = tl.load(text_inverse_ptr + r, mask=r < R, other=0.0)[:, None]
    inverse = inverse * tl.load(video_inverse_ptr + c, mask=c < C, other=0.0)[None, :]
    x = product_tile(text_ptr, video_ptr, r, c, r < R, c < C, D, BLOCK_D, PRECISION, ACC) * inverse
    y = x
    if HAS_TEACHER:
        y = tl.load(teacher_ptr + r[:, None] * C + c[None, :], mask=here, other=0.0)
    student, teacher = scale * x, scale * y
    if HAS_IGNORE:
        out = tl.load(ignore_ptr + r[:, None] * C + c[None, :], mask=here, other=0) != 0
        student, teacher = tl.where(out, EXCLUDED, student), tl.where(out, EXCLUDED, teacher)
    return x, y, student, teacher, here, inverse


@triton.jit
def _log_sum_exp(logits, here, AXIS: tl.constexpr):
    """Log-sum-exp over an axis; 0 for a row or column outside the matrix."""
    logits = tl.where(here, logits, -float("inf"))
    top = tl.max(logits, axis=AXIS)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(logits - tl.expand_dims(top, AXIS)), axis=AXIS)
    return top + tl.log(tl.where(total == 0, 1.0, total))


@triton.jit
def _store_statistics(
    out_ptr, student, teacher, here, place, count, stride, HAS_TEACHER: tl.constexpr, AXIS: tl.constexpr
):
    """Write statistics along an axis: log-sum-exp of both matrices, and the mean of their difference."""
    tl.store(out_ptr + place, _log_sum_exp(student, here, AXIS), mask=count)
    if HAS_TEACHER:
        lse = _log_sum_exp(teacher, here, AXIS)
        weight = tl.exp(tl.where(here, teacher - tl.expand_dims(lse, AXIS), -float("inf")))
        tl.store(out_ptr + stride + place, lse, mask=count)
        tl.store(out_ptr + 2 * stride + place, tl.sum(weight * (teacher - student), axis=AXIS), mask=count)


@triton.jit
def _contrastive_forward(
    text_ptr, video_ptr, text_inverse_ptr, video_inverse_ptr, scale_ptr, teacher_ptr, ignore_ptr, row_ptr,
    column_ptr, diagonal_ptr, R, C, D, shift, stride_row, stride_column, HAS_TEACHER: tl.constexpr,
    HAS_IGNORE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Statistics along rows and columns: lse S, lse S' and T = sum softmax(S') (S' - S).

    S = s cosines, S' = s teacher.  Losses follow from them and the diagonal: cross-entropy = lse S - S_ii,
    KL(softmax S' ‖ softmax S) = T - lse S' + lse S.
    Tile: BLOCK_R texts x BLOCK_C videos, with S and S' in registers.  Rows are multiplied as they are, and
    the product by both inverse norms.  A tile writes its own statistics, which the caller merges, so the
    result does not depend on the order of tiles.
    Traffic: `traffic`.  Backward: `_contrastive_backward`.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    r = (i * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = (j * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    scale = tl.load(scale_ptr).to(ACC)
    _, _, student, teacher, here, _ = _tile(
        text_ptr, video_ptr, text_inverse_ptr, video_inverse_ptr, teacher_ptr, ignore_ptr, scale, r, c, R, C,
        D, HAS_TEACHER, HAS_IGNORE, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    _store_statistics(
        row_ptr, student, teacher, here, j.to(tl.int64) * R + r, r < R, stride_row, HAS_TEACHER, 1
    )
    _store_statistics(
        column_ptr, student, teacher, here, i.to(tl.int64) * C + c, c < C, stride_column, HAS_TEACHER, 0
    )
    right = (r[:, None] == c[None, :] + shift) & here
    has_match = tl.sum(right.to(tl.int32), axis=1) > 0
    tl.store(diagonal_ptr + r, tl.sum(tl.where(right, student, 0.0), axis=1), mask=has_match)
    if HAS_TEACHER:
        tl.store(diagonal_ptr + R + r, tl.sum(tl.where(right, teacher, 0.0), axis=1), mask=has_match)


@triton.jit
def _contrastive_backward(
    text_ptr, video_ptr, text_inverse_ptr, video_inverse_ptr, scale_ptr, teacher_ptr, ignore_ptr, row_ptr,
    column_ptr, weight_ptr, dx_ptr, dy_ptr, dscale_ptr, R, C, D, shift,
    HAS_TEACHER: tl.constexpr, HAS_IGNORE: tl.constexpr, DETACH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Derivative by both matrices of cosines, given the statistics of whole rows and columns.

    P, P' = exp(S - lse S), exp(S' - lse S') by rows (r) and columns (c), w the weights:
    dS = w0 (P_r + P_c - 2 I) + w2 (P_r - P'_r + P_c - P'_c);
    dS' = w1 (P'_r + P'_c - 2 I) + w2 (P'_r (S' - S - T_r) + P'_c (S' - S - T_c)), the second term unless
    DETACH.
    Tile: BLOCK_R texts x BLOCK_C videos; the product again, everything in registers.
    Writes s dS over both norms, and s dS', for the matrix products that follow.
    Traffic: `traffic` with `backward`.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    r = (i * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = (j * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    scale = tl.load(scale_ptr).to(ACC)
    x, y, student, teacher, here, inverse = _tile(
        text_ptr, video_ptr, text_inverse_ptr, video_inverse_ptr, teacher_ptr, ignore_ptr, scale, r, c, R, C,
        D, HAS_TEACHER, HAS_IGNORE, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    right = tl.where(r[:, None] == c[None, :] + shift, 2.0, 0.0)
    p_r = tl.exp(student - tl.load(row_ptr + r, mask=r < R, other=0.0)[:, None])
    p_c = tl.exp(student - tl.load(column_ptr + c, mask=c < C, other=0.0)[None, :])
    ds = tl.load(weight_ptr).to(ACC) * (p_r + p_c - right)
    slope = tl.zeros_like(ds)
    if HAS_TEACHER:
        w1, w2 = tl.load(weight_ptr + 1).to(ACC), tl.load(weight_ptr + 2).to(ACC)
        q_r = tl.exp(teacher - tl.load(row_ptr + R + r, mask=r < R, other=0.0)[:, None])
        q_c = tl.exp(teacher - tl.load(column_ptr + C + c, mask=c < C, other=0.0)[None, :])
        ds += w2 * (p_r - q_r + p_c - q_c)
        dt = w1 * (q_r + q_c - right)
        if not DETACH:
            t_r = tl.load(row_ptr + 2 * R + r, mask=r < R, other=0.0)[:, None]
            t_c = tl.load(column_ptr + 2 * C + c, mask=c < C, other=0.0)[None, :]
            dt += w2 * (q_r * (teacher - student - t_r) + q_c * (teacher - student - t_c))
        tl.store(dy_ptr + r[:, None] * C + c[None, :], scale * dt, mask=here)
        slope = dt * y
    slope = tl.where(here, slope + ds * x, 0.0)
    tl.store(dx_ptr + r[:, None] * C + c[None, :], scale * ds * inverse, mask=here)
    tl.store(dscale_ptr + i.to(tl.int64) * tl.num_programs(1) + j, tl.sum(slope))


def statistics(
    text: Rows,
    video: Rows,
    scale: Tensor,
    teacher: Tensor | None,
    ignore: Tensor | None,
    shift: int,
    diagonal: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return partial statistics of one block, k p r of rows and k p c of columns, and the diagonal, m r.

    text, video: r d and c d, and their inverse norms.  teacher: r c.
    shift: text r matches video c if r = c + shift.
    k: 3 with a teacher, else 1.  m: 2 with a teacher, else 1.
    diagonal: logits of matching pairs, 0 for a row whose match is outside the block; a given tensor is
        written at rows with a match only.
    """
    if diagonal is None:
        diagonal = text[0].new_zeros(1 if teacher is None else 2, len(text[0]), dtype=scale.dtype)
    (text, text_inverse), (video, video_inverse) = text, video
    (rows, d), columns = text.shape, len(video)
    block = _block(rows, columns)
    grid = (triton.cdiv(rows, block), triton.cdiv(columns, block))
    kinds, acc = 1 if teacher is None else 3, scale.dtype
    row_parts = text.new_empty(kinds, grid[1], rows, dtype=acc)
    column_parts = text.new_empty(kinds, grid[0], columns, dtype=acc)
    _contrastive_forward[grid](
        text, video, text_inverse, video_inverse, scale, _pointer(teacher, text), mask_pointer(ignore, text),
        row_parts, column_parts, diagonal, rows, columns, d, shift, grid[1] * rows, grid[0] * columns,
        **_settings(text, teacher, ignore, block),
    )  # fmt: skip
    return row_parts, column_parts, diagonal


def derivative(
    text: Rows,
    video: Rows,
    scale: Tensor,
    teacher: Tensor | None,
    ignore: Tensor | None,
    shift: int,
    row_sums: Tensor,
    column_sums: Tensor,
    weights: Tensor,
    detach: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return derivatives by the products of rows over both norms and by the teacher, r c, and by the scale.

    row_sums, column_sums: the merged statistics of the block's rows, k r, and columns, k c.
    weights: of the two cross-entropies and the divergence, with the upstream gradient and every mean.
    """
    dx, dteacher, dscale = derivative_parts(
        text, video, scale, teacher, ignore, shift, row_sums, column_sums, weights, detach
    )
    return dx, dteacher, dscale.sum()


def derivative_parts(
    text: Rows,
    video: Rows,
    scale: Tensor,
    teacher: Tensor | None,
    ignore: Tensor | None,
    shift: int,
    row_sums: Tensor,
    column_sums: Tensor,
    weights: Tensor,
    detach: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`derivative`, with that by the scale as one partial sum a tile."""
    (text, text_inverse), (video, video_inverse) = text, video
    (rows, d), columns = text.shape, len(video)
    block = _block(rows, columns)
    if teacher is not None and text.element_size() == 4 and operands_in_registers(text):
        block = 32  # larger tiles of both matrices would spill
    grid = (triton.cdiv(rows, block), triton.cdiv(columns, block))
    dx = text.new_empty(rows, columns)
    dteacher = None if teacher is None else torch.empty_like(teacher)
    dscale = text.new_empty(grid, dtype=scale.dtype)
    _contrastive_backward[grid](
        text, video, text_inverse, video_inverse, scale, _pointer(teacher, text), mask_pointer(ignore, text),
        row_sums.contiguous(), column_sums.contiguous(), weights, dx, _pointer(dteacher, dx), dscale, rows,
        columns, d, shift, **_settings(text, teacher, ignore, block), DETACH=detach,
    )  # fmt: skip
    return dx, dteacher, dscale


def pairs_per_block(text: Tensor, keep: bool) -> int:
    """Return how many pairs a block may have; with `keep` their derivatives are written too."""
    return (BLOCK_BYTES if keep else 16 * BLOCK_BYTES) // max(4, text.element_size())


def traffic(shapes: tuple[int, int, int], *, teacher: bool, ignore: bool, backward: bool) -> Traffic:
    """Traffic of one block of r texts and c videos in d dimensions; shapes: r c d.

    A tile loads its rows, their inverse norms, and its part of `teacher` and `ignore`.  It stores one sum a
    row and one a column, three with a teacher, and the diagonal's logits; with `backward` it loads the merged
    sums and stores the derivative by each matrix and by the scale.
    """
    r, c, d = shapes
    block = _block(r, c)
    tiles = triton.cdiv(r, block), triton.cdiv(c, block)
    rows, count, kinds = r * tiles[1] + c * tiles[0], tiles[0] * tiles[1], 3 if teacher else 1
    loads = rows * (d + 1) + r * c * (int(teacher) + int(ignore)) + count
    if not backward:
        return Traffic(loads=loads, stores=rows * kinds + min(r, c) * (2 if teacher else 1))
    loads += rows * kinds + count * kinds
    return Traffic(loads=loads, stores=r * c * (2 if teacher else 1) + count)


def _block(rows: int, columns: int) -> int:
    """Return the side of a tile; small if large ones would leave processors idle."""
    return 64 if rows * columns >= 1 << 20 else 32


def _settings(text: Tensor, teacher: Tensor | None, ignore: Tensor | None, block: int) -> dict[str, object]:
    return {
        "HAS_TEACHER": teacher is not None,
        "HAS_IGNORE": ignore is not None,
        "BLOCK_R": block,
        "BLOCK_C": block,
        "BLOCK_D": BLOCK_D if text.element_size() == 2 else BLOCK_D // 2,
        "PRECISION": precision(text),
        "ACC": accumulator(text),
        # four would spill where large tiles of both matrices are in registers
        "num_warps": 8 if teacher is not None and block == 64 else 4,
    }


def _pointer(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return x, contiguous; without x a tensor that is never read."""
    return stand_in if x is None else x.contiguous()
