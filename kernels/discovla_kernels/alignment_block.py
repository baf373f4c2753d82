"""Video-level and frame-level losses of a batch that is one block: what is left beside its two matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels import contrastive, frame_similarity
from discovla_kernels.tiles import accumulator

unsupported = frame_similarity.unsupported
MAX_WIDTH = 4096  # of an embedding: a row of it lives in registers
ELEMENTS = 4096  # of a tile of rows
SAMPLES = 256  # of a tile of statistics
Masks = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What backward needs beside the inputs.

    inverse: r, of the norms of all rows: texts, videos, parts of texts, parts of videos.  units: the parts
    over their norms.  sums: 2 3 n, statistics of rows and of columns.  weights: 3, of both cross-entropies
    and of the divergence in the total, every mean folded in.  The others: as in `frame_similarity.Maxima`.
    """

    inverse: Tensor
    units: Tensor
    sums: Tensor
    weights: Tensor
    similarity: Tensor
    text_best: Tensor
    text_index: Tensor
    video_best: Tensor
    video_index: Tensor
    pools: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order above."""
        return tuple(getattr(self, f.name) for f in fields(self))

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Kept:
        """The inverse of `tensors`."""
        return Kept(**dict(zip((f.name for f in fields(Kept)), tensors, strict=True)))

    def maxima(self) -> frame_similarity.Maxima:
        """What was found of the parts."""
        return frame_similarity.Maxima(
            similarity=self.similarity,
            text_best=self.text_best,
            text_index=self.text_index,
            video_best=self.video_best,
            video_index=self.video_index,
            pools=self.pools,
        )


@triton.jit
def _load_rows(x_ptr, tile, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Whole rows of a tile, their numbers, where they are and which entries are real."""
    n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    place, here = n[:, None] * D + d[None, :], (n < N)[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + place, mask=here, other=0.0).to(ACC), n, place, here


@triton.jit
def _norm_rows(
    x_ptr, inverse_ptr, unit_ptr, tile, N, D, KEEP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes 1 / ‖x‖ of a tile of rows, and with KEEP x / ‖x‖."""
    x, n, place, here = _load_rows(x_ptr, tile, N, D, BLOCK_N, BLOCK_D, ACC)
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    inverse = 1 / tl.where(n < N, norm, 1.0)
    tl.store(inverse_ptr + n, inverse, mask=n < N)
    if KEEP:
        tl.store(unit_ptr + place, x * inverse[:, None], mask=here)


@triton.jit
def _alignment_block_norms(
    text_ptr, video_ptr, text_frames_ptr, video_frames_ptr, inverse_ptr, unit_ptr, N, I_PARTS, J_PARTS, D, E,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """1 / ‖x‖ of every row of four embeddings, D wide, parts E, and x / ‖x‖ of the parts.

    Tile: whole rows of one of the four, which the second axis of the grid names.
    Backward: `_alignment_block_radial`.
    """
    tile, side = tl.program_id(0), tl.program_id(1)
    parts = tl.cast(N, tl.int64) * I_PARTS
    if side == 0:
        _norm_rows(text_ptr, inverse_ptr, unit_ptr, tile, N, D, False, BLOCK_N, BLOCK_D, ACC)
    elif side == 1:
        _norm_rows(video_ptr, inverse_ptr + N, unit_ptr, tile, N, D, False, BLOCK_N, BLOCK_D, ACC)
    elif side == 2:
        _norm_rows(
            text_frames_ptr, inverse_ptr + 2 * N, unit_ptr, tile, parts, E, True, BLOCK_N, BLOCK_D, ACC
        )
    else:
        _norm_rows(
            video_frames_ptr, inverse_ptr + 2 * N + parts, unit_ptr + parts * E, tile, N * J_PARTS, E, True,
            BLOCK_N, BLOCK_D, ACC,
        )  # fmt: skip


@triton.jit
def _tangential(
    grad_ptr, x_ptr, inverse_ptr, out_ptr, tile, N, D, OVER: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes g - u (u·g), u = x / ‖x‖, of a tile of rows; with OVER divided by ‖x‖."""
    x, n, place, here = _load_rows(x_ptr, tile, N, D, BLOCK_N, BLOCK_D, ACC)
    inverse = tl.load(inverse_ptr + n, mask=n < N, other=0.0)[:, None]
    grad = tl.load(grad_ptr + place, mask=here, other=0.0)
    unit = x * inverse
    grad -= unit * tl.sum(unit * grad, axis=1)[:, None]
    tl.store(out_ptr + place, grad * inverse if OVER else grad, mask=here)


@triton.jit
def _alignment_block_radial(
    text_ptr, video_ptr, text_frames_ptr, video_frames_ptr, inverse_ptr, grad_ptr, part_grad_ptr, dtext_ptr,
    dvideo_ptr, dtext_frames_ptr, dvideo_frames_ptr, N, I_PARTS, J_PARTS, D, E, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients by four embeddings of what has `grad` by their rows over their norms; see `_tangential`.

    Those by texts and videos come as sums of rows over both norms. Tile: as `_alignment_block_norms`.
    """
    tile, side = tl.program_id(0), tl.program_id(1)
    parts, n = tl.cast(N, tl.int64) * I_PARTS, tl.cast(N, tl.int64)
    if side == 0:
        _tangential(grad_ptr, text_ptr, inverse_ptr, dtext_ptr, tile, N, D, False, BLOCK_N, BLOCK_D, ACC)
    elif side == 1:
        _tangential(
            grad_ptr + n * D, video_ptr, inverse_ptr + n, dvideo_ptr, tile, N, D, False, BLOCK_N, BLOCK_D, ACC
        )
    elif side == 2:
        _tangential(
            part_grad_ptr, text_frames_ptr, inverse_ptr + 2 * n, dtext_frames_ptr, tile, parts, E, True,
            BLOCK_N, BLOCK_D, ACC,
        )  # fmt: skip
    else:
        _tangential(
            part_grad_ptr + parts * E, video_frames_ptr, inverse_ptr + 2 * n + parts, dvideo_frames_ptr, tile,
            N * J_PARTS, E, True, BLOCK_N, BLOCK_D, ACC,
        )  # fmt: skip


@triton.jit
def _merge(part_ptr, sum_ptr, PARTS, N, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Merges the parts 3 p n of one side's statistics to sum_ptr, 3 n, and adds each of the three up."""
    students = tl.zeros((BLOCK,), dtype=ACC)
    teachers, means = students, students
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        here = n < N
        top, total = tl.full((BLOCK,), -float("inf"), dtype=ACC), tl.zeros((BLOCK,), dtype=ACC)
        top_t, total_t, mean = top, total, total
        for p in range(PARTS):
            place = part_ptr + p * N + n
            student = tl.load(place, mask=here, other=0.0)
            teacher = tl.load(place + PARTS * N, mask=here, other=0.0)
            difference = tl.load(place + 2 * PARTS * N, mask=here, other=0.0)
            new = tl.maximum(top, student)
            total = total * tl.exp(top - new) + tl.exp(student - new)
            new_t = tl.maximum(top_t, teacher)
            keep, add = tl.exp(top_t - new_t), tl.exp(teacher - new_t)
            total_t, mean, top, top_t = total_t * keep + add, mean * keep + add * difference, new, new_t
        student, teacher, mean = top + tl.log(total), top_t + tl.log(total_t), mean / total_t
        tl.store(sum_ptr + n, student, mask=here)
        tl.store(sum_ptr + N + n, teacher, mask=here)
        tl.store(sum_ptr + 2 * N + n, mean, mask=here)
        students += tl.where(here, student, 0.0)
        teachers += tl.where(here, teacher, 0.0)
        means += tl.where(here, mean, 0.0)
    return tl.sum(students, axis=0), tl.sum(teachers, axis=0), tl.sum(means, axis=0)


@triton.jit
def _alignment_block_losses(
    row_ptr, column_ptr, diagonal_ptr, sum_ptr, weight_ptr, total_ptr, video_ptr, frame_ptr, distill_ptr,
    ROW_PARTS, COLUMN_PARTS, N, kl, alpha, beta, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Cross-entropy = mean(lse S - S_ii) of both sides, divergence = kl sum(T - lse S' + lse S) / 2.

    S, S' the video-level and frame-level logits, T the mean of S' - S under softmax(S'): the statistics that
    `_contrastive_forward` leaves in parts. total = video + alpha frame + beta distill; weight_ptr gets what
    its derivative by a single logit is multiplied with. One program: 6 n numbers and 2 n of the diagonal.
    """
    rows, row_teachers, row_means = _merge(row_ptr, sum_ptr, ROW_PARTS, N, BLOCK, ACC)
    columns, column_teachers, column_means = _merge(column_ptr, sum_ptr + 3 * N, COLUMN_PARTS, N, BLOCK, ACC)
    matched, matched_t = tl.zeros((BLOCK,), dtype=ACC), tl.zeros((BLOCK,), dtype=ACC)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        matched += tl.load(diagonal_ptr + n, mask=n < N, other=0.0)
        matched_t += tl.load(diagonal_ptr + N + n, mask=n < N, other=0.0)
    students, teachers = rows + columns, row_teachers + column_teachers
    video = (students / 2 - tl.sum(matched, axis=0)) / N
    frame = (teachers / 2 - tl.sum(matched_t, axis=0)) / N
    distill = kl * (row_means + column_means - teachers + students) / 2
    tl.store(video_ptr, video)
    tl.store(frame_ptr, frame)
    tl.store(distill_ptr, distill)
    tl.store(total_ptr, video + alpha * frame + beta * distill)
    half = video * 0 + 0.5
    tl.store(weight_ptr, half / N)
    tl.store(weight_ptr + 1, half * alpha / N)
    tl.store(weight_ptr + 2, half * beta * kl)


def forward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    masks: Masks,
    scale: Tensor,
    ignore: Tensor | None,
    weights: tuple[float, float, float],
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Kept]:
    """Total, video-level, frame-level and distillation, and what `backward` needs.

    tensors: texts and videos, n d, and their parts, n i e and n j e, contiguous, of one dtype, which is that
    of `scale` too.  weights: of the divergence, and of the last two losses in the total.
    """
    text, video, text_frames, video_frames = tensors
    (n, i, e), j, d = text_frames.shape, video_frames.shape[1], text.shape[1]
    inverse, units = text.new_empty(n * (2 + i + j)), text.new_empty(n * (i + j), e)
    grid, tile = _rows(n * max(i, j), max(d, e))
    _alignment_block_norms[grid](*tensors, inverse, units, n, i, j, d, e, ACC=accumulator(text), **tile)
    unit = units[: n * i].view(n, i, e), units[n * i :].view(n, j, e)
    found = frame_similarity.maxima(*unit, scale, masks, keep=True)
    rows, columns, diagonal = contrastive.statistics_of(
        (text, inverse[:n]), (video, inverse[n : 2 * n]), scale, found.similarity, ignore, 0,
        text.new_empty(2, n),
    )  # fmt: skip
    sums, factors = text.new_empty(2, 3, n), text.new_empty(3)
    losses = [text.new_empty(()) for _ in range(4)]
    _alignment_block_losses[(1,)](
        rows, columns, diagonal, sums, factors, *losses, rows.shape[1], columns.shape[1], n, *weights,
        BLOCK=SAMPLES, ACC=accumulator(text),
    )  # fmt: skip
    kept = Kept(inverse=inverse, units=units, sums=sums, weights=factors, **vars(found))
    return (losses[0], losses[1], losses[2], losses[3]), kept


def backward(
    weights: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    masks: Masks,
    scale: Tensor,
    ignore: Tensor | None,
    kept: Kept,
    how: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the four embeddings and the scale (empty unless asked for).

    weights: `kept.weights` times the upstream gradient.  how: no gradient of the divergence into the teacher,
    and whether that by the scale is asked for.
    """
    text, video, text_frames, video_frames = tensors
    (n, i, e), j, d = text_frames.shape, video_frames.shape[1], text.shape[1]
    (detach, of_scale), found = how, kept.maxima()
    dx, dy, dscale = contrastive.slopes(
        (text, kept.inverse[:n]), (video, kept.inverse[n : 2 * n]), scale, kept.similarity, ignore, 0,
        (kept.sums[0], kept.sums[1]), weights, detach,
    )  # fmt: skip
    assert dy is not None, "there is a teacher"
    units = kept.units[: n * i], kept.units[n * i :]
    dense = frame_similarity.dense_gradient(dy, found, (n, i, n, j), scale, masks, text.dtype)
    pooled, parts = text.new_empty(2 * n, d), text.new_empty(n * (i + j), e)
    torch.mm(dx, video, out=pooled[:n])
    torch.mm(dx.T, text, out=pooled[n:])
    torch.mm(dense, units[1], out=parts[: n * i])
    torch.mm(dense.T, units[0], out=parts[n * i :])
    out = [torch.empty_like(x) for x in tensors]
    grid, tile = _rows(n * max(i, j), max(d, e))
    _alignment_block_radial[grid](
        *tensors, kept.inverse, pooled, parts, *out, n, i, j, d, e, ACC=accumulator(text), **tile
    )
    slope = dscale.sum() + (dy * kept.pools[4]).sum() if of_scale else scale.new_empty(0)
    return out[0], out[1], out[2], out[3], slope


def _rows(most: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of kernels on rows of all four embeddings, and their tile; most: rows of the longest."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, ELEMENTS // block)
    return (triton.cdiv(most, rows), 4), {"BLOCK_N": rows, "BLOCK_D": block, "num_warps": 4}
