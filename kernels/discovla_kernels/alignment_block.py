"""`alignment_losses` of a batch that is one block of pairs: norms, losses and gradients in few launches."""

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
MAX_WIDTH = 4096  # of an embedding; a row of it lives in registers
ELEMENTS = 4096  # of a tile of rows
SAMPLES = 256  # of a tile of statistics


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Tensors that backward needs beside the inputs.

    inverse: r, inverse norms of all rows: texts, videos, parts of texts, parts of videos.  units: the parts
    divided by their norms.  sums: 2 3 n, statistics of rows and of columns.  weights: 3, of both
    cross-entropies and of the divergence in the total, with every mean.  The others: as in
    `frame_similarity.Maxima`.
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
        """Return all tensors in the order above."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def maxima(self) -> frame_similarity.Maxima:
        """Best matches of the parts."""
        names = [field.name for field in fields(frame_similarity.Maxima)]
        return frame_similarity.Maxima(**{name: getattr(self, name) for name in names})


@triton.jit
def _load_rows(x_ptr, tile, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Return whole rows of a tile, their numbers, the offsets of their entries, and which are real."""
    n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    place, here = n[:, None] * D + d[None, :], (n < N)[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + place, mask=here, other=0.0).to(ACC), n, place, here


@triton.jit
def _norm_rows(
    x_ptr, inverse_ptr, unit_ptr, tile, N, D, KEEP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write 1 / ‖x‖ of a tile of rows, and with KEEP x / ‖x‖."""
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
    """1 / ‖x‖ of every row of four embeddings (pooled D wide, parts E wide), and x / ‖x‖ of the parts.

    Tile: whole rows of one embedding, selected by the second axis of the grid.
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
    """Write g - u (u·g), u = x / ‖x‖, for a tile of rows; with OVER divided by ‖x‖."""
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
    """Gradients by four embeddings from those by their unit rows: (g - u (u·g)) / ‖x‖, u = x / ‖x‖.

    The gradients by texts and videos already are divided by both norms.  Tile: as `_alignment_block_norms`.
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
    """Merge one side's partial statistics 3 p n into sum_ptr, 3 n; return the sum of each of the three."""
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

    S, S' are the video-level and frame-level logits, T the mean of S' - S under softmax(S'): the partial
    statistics of `_contrastive_forward`.  total = video + alpha frame + beta distill; weight_ptr gets the
    factors of the derivative of the total.  One program reads 6 n numbers and 2 n of the diagonal.
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
    text: Tensor,
    video: Tensor,
    text_frames: Tensor,
    video_frames: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    scale: Tensor,
    ignore: Tensor | None,
    kl_weight: float,
    alpha: float,
    beta: float,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Saved]:
    """Return total, video-level loss, frame-level loss and distillation, and what `backward` needs.

    text, video: n d; text_frames, video_frames: n i e and n j e; contiguous, in the dtype of `scale`.
    """
    tensors = text, video, text_frames, video_frames
    (n, i, e), j, d = text_frames.shape, video_frames.shape[1], text.shape[1]
    inverse, units = text.new_empty(n * (2 + i + j)), text.new_empty(n * (i + j), e)
    grid, tile = _rows(n * max(i, j), max(d, e))
    _alignment_block_norms[grid](*tensors, inverse, units, n, i, j, d, e, ACC=accumulator(text), **tile)
    unit_frames = units[: n * i].view(n, i, e), units[n * i :].view(n, j, e)
    maxima = frame_similarity.maxima(*unit_frames, scale, text_mask, video_mask, keep=True)
    rows, columns, diagonal = contrastive.statistics(
        (text, inverse[:n]), (video, inverse[n : 2 * n]), scale, maxima.similarity, ignore, 0,
        text.new_empty(2, n),
    )  # fmt: skip
    sums, weights = text.new_empty(2, 3, n), text.new_empty(3)
    losses = [text.new_empty(()) for _ in range(4)]
    _alignment_block_losses[(1,)](
        rows, columns, diagonal, sums, weights, *losses, rows.shape[1], columns.shape[1], n, kl_weight, alpha,
        beta, BLOCK=SAMPLES, ACC=accumulator(text),
    )  # fmt: skip
    saved = Saved(inverse=inverse, units=units, sums=sums, weights=weights, **vars(maxima))
    return (losses[0], losses[1], losses[2], losses[3]), saved


def backward(
    weights: Tensor,
    text: Tensor,
    video: Tensor,
    text_frames: Tensor,
    video_frames: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    scale: Tensor,
    ignore: Tensor | None,
    saved_tensors: Sequence[Tensor],
    detach_teacher: bool,
    scale_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients by the four embeddings and the scale (empty unless needed).

    weights: `Saved.weights` times the upstream gradient.
    """
    saved = Saved(**dict(zip((field.name for field in fields(Saved)), saved_tensors, strict=True)))
    tensors = text, video, text_frames, video_frames
    (n, i, e), j, d = text_frames.shape, video_frames.shape[1], text.shape[1]
    dx, dteacher, dscale = contrastive.derivative_parts(
        (text, saved.inverse[:n]), (video, saved.inverse[n : 2 * n]), scale, saved.similarity, ignore, 0,
        saved.sums[0], saved.sums[1], weights, detach_teacher,
    )  # fmt: skip
    assert dteacher is not None, "there is a teacher"
    dmatch = frame_similarity.match_gradient(dteacher, saved.maxima, scale, text_mask, video_mask, text.dtype)
    pooled, parts = text.new_empty(2 * n, d), text.new_empty(n * (i + j), e)
    torch.mm(dx, video, out=pooled[:n])
    torch.mm(dx.T, text, out=pooled[n:])
    torch.mm(dmatch, saved.units[n * i :], out=parts[: n * i])
    torch.mm(dmatch.T, saved.units[: n * i], out=parts[n * i :])
    grads = [torch.empty_like(x) for x in tensors]
    grid, tile = _rows(n * max(i, j), max(d, e))
    _alignment_block_radial[grid](
        *tensors, saved.inverse, pooled, parts, *grads, n, i, j, d, e, ACC=accumulator(text), **tile
    )
    slope = dscale.sum() + (dteacher * saved.pools[4]).sum() if scale_needs_grad else scale.new_empty(0)
    return grads[0], grads[1], grads[2], grads[3], slope


def _rows(most: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return grid and tile of the kernels on rows of all four embeddings; most: rows of the longest."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, ELEMENTS // block)
    return (triton.cdiv(most, rows), 4), {"BLOCK_N": rows, "BLOCK_D": block, "num_warps": 4}
