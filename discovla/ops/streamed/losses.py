"""`info_nce` and `alignment_losses` streamed over blocks of pairs; no similarity matrix is stored.

Forward merges, block by block, the log-sum-exp of every row and column (with frames also the mean difference
of the two matrices' logits under the teacher).  Backward computes each block again and turns it into
gradients.  Beside inputs, outputs and one block this keeps those sums only: 2 or 6 numbers a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from discovla.ops.blocks import (
    constants,
    inverse_norms,
    matmul,
    product_dtype,
    row_chunks,
    row_strips,
    select_rows,
    sum_dtype,
    unit_rows,
    unit_rows_backward,
)
from discovla.ops.column_shard import ColumnShard, Statistics, merge_statistics
from discovla.ops.dispatch import kernel
from discovla.ops.frame_similarity import block_functions as frame_functions
from discovla.ops.streamed import chunks
from discovla.ops.streamed import contrastive as streamed


class Pairs:
    """The video-level and, with frames, the frame-level similarity matrix t v, computed block by block.

    Pooled rows are multiplied as they are and the products divided by both norms; frames are unit rows.
    Text `first_text` matches the first video, and the others match in order.
    """

    def __init__(
        self, tensors: tuple[Tensor | None, ...], impl: str, keep: bool, first_text: int = 0
    ) -> None:
        text, video, text_frames, video_frames, self.text_mask, self.video_mask, scale, self.ignore = tensors
        assert text is not None and video is not None and scale is not None
        self.t, self.v, self.first_text, self.scale, self.keep = (
            len(text),
            len(video),
            first_text,
            scale,
            keep,
        )
        self.functions = block_functions(impl)
        self.frame_functions = frame_functions(impl)
        self.dtype = product_dtype(text, self.t * self.v)
        self.pooled = [(x, inverse_norms(x)) for x in (text, video)]
        self.has_frames = text_frames is not None
        self.statistics = 3 if self.has_frames else 1  # numbers that summarise a row or column
        self.pairs_per_block = self.functions.pairs_per_block(text[:0].to(self.dtype), keep=keep)
        if text_frames is not None and video_frames is not None:
            self.units = [unit_rows(x, self.t * self.v) for x in (text_frames, video_frames)]
            frames = self.units[0][0], self.units[1][0]
            frame_pairs = self.frame_functions.pairs_per_block(*frames, keep=keep)
            self.pairs_per_block = min(self.pairs_per_block, frame_pairs)

    def strips(self) -> Iterator[tuple[slice, list[slice]]]:
        """Yield slices of rows, each with the slices of columns across it."""
        return row_strips(self.t, self.v, self.pairs_per_block)

    def pooled_rows(self, side: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return pooled rows of texts (0) or videos (1) in the dtype of products, and their inverse norms."""
        x, inverse = self.pooled[side]
        return x[rows].to(self.dtype), inverse[rows]

    def unit_frames(self, side: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return unit frames of texts (0) or videos (1), and the inverse norms they were scaled by."""
        unit, inverse = self.units[side]
        return unit[rows], inverse[rows]

    def masks(self, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        """Return the frame masks of a block."""
        return select_rows(self.text_mask, rows), select_rows(self.video_mask, columns)

    def frame_maxima(self, rows: slice, columns: slice) -> Any:
        """Return the best matches of a block, or None without frames; their similarity is the teacher."""
        if not self.has_frames:
            return None
        frames = self.unit_frames(0, rows)[0], self.unit_frames(1, columns)[0]
        return self.frame_functions.maxima(*frames, self.scale, *self.masks(rows, columns), keep=self.keep)

    def block(self, rows: slice, columns: slice, maxima: Any) -> tuple[Any, ...]:
        """Return the arguments that every function on one block begins with."""
        teacher = None if maxima is None else maxima.similarity
        ignore = None if self.ignore is None else self.ignore[rows, columns]
        shift = self.first_text + columns.start - rows.start
        return self.pooled_rows(0, rows), self.pooled_rows(1, columns), self.scale, teacher, ignore, shift


def block_functions(impl: str) -> Any:
    """Return what computes one block of pairs: `statistics`, `derivative`, `pairs_per_block`."""
    if impl == "chunks":
        return chunks.contrastive_functions()
    return kernel("info_nce") if impl == "triton" else streamed


class Gradients:
    """Sums of gradients over blocks: of the current strip for the texts, of all rows for the videos.

    Gradients by pooled rows are sums of products already divided by both norms, from which only the part
    along the row is removed at the end; gradients by frames are by unit rows.
    """

    def __init__(self, pairs: Pairs, tensors: tuple[Tensor | None, ...]) -> None:
        text, video, text_frames, video_frames, *_ = tensors
        self.pairs, self.scale = pairs, torch.zeros_like(pairs.scale)
        self.text = [torch.empty_like(x) for x in (text, text_frames) if x is not None]
        self.video = [torch.zeros_like(x, dtype=sum_dtype(x)) for x in (video, video_frames) if x is not None]
        self.video_dtypes = [x.dtype for x in (video, video_frames) if x is not None]

    def start_strip(self, rows: slice) -> None:
        self.strip = [torch.zeros_like(x[rows], dtype=sum_dtype(x)) for x in self.text]

    def add_pooled(self, dx: Tensor, rows: slice, columns: slice) -> None:
        """Add the gradient by the products of pooled rows of one block."""
        dtype = sum_dtype(dx)
        self.strip[0] += matmul(dx, self.pairs.pooled_rows(1, columns)[0], dtype)
        self.video[0][columns] += matmul(dx.T, self.pairs.pooled_rows(0, rows)[0], dtype)

    def add_frames(self, grad: Tensor, maxima: Any, rows: slice, columns: slice) -> None:
        """Add the gradient by the frame-level similarities of one block."""
        pairs = self.pairs
        frames = pairs.unit_frames(0, rows)[0], pairs.unit_frames(1, columns)[0]
        masks = pairs.masks(rows, columns)
        dtext, dvideo, dscale = pairs.frame_functions.gradients(grad, maxima, *frames, pairs.scale, *masks)
        self.strip[1] += dtext
        self.video[1][columns] += dvideo
        self.scale += dscale

    def end_strip(self, rows: slice) -> None:
        """Write the gradients of the strip's texts, which are complete."""
        self.text[0][rows] = tangential(self.strip[0], *self.pairs.pooled_rows(0, rows))
        if self.pairs.has_frames:
            self.text[1][rows] = unit_rows_backward(self.strip[1], *self.pairs.unit_frames(0, rows))

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return gradients by text, video, text frames, video frames (empty without) and scale."""
        video = []
        for total, dtype, frames in zip(self.video, self.video_dtypes, (False, True), strict=False):
            out = total if total.dtype == dtype else torch.empty_like(total, dtype=dtype)
            for rows in row_chunks(total):  # in place if the dtypes agree: a copy of all would not be small
                out[rows] = (
                    unit_rows_backward(total[rows], *self.pairs.unit_frames(1, rows))
                    if frames
                    else tangential(total[rows], *self.pairs.pooled_rows(1, rows))
                )
            video.append(out)
        if not self.pairs.has_frames:
            return self.text[0], video[0], self.scale.new_empty(0), self.scale.new_empty(0), self.scale
        return self.text[0], video[0], self.text[1], video[1], self.scale


def tangential(grad: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """Return `grad` without its part along each row of x; inverse: 1 / ‖x‖."""
    unit = x * inverse[:, None]
    return grad - unit * (unit * grad).sum(-1, keepdim=True)


def merge_parts(sums: Tensor, parts: Tensor) -> Tensor:
    """Merge statistics k n with those of further entries, k p n."""
    parts = torch.cat([sums[:, None], parts], dim=1)
    student = parts[0].logsumexp(0)
    if len(parts) == 1:
        return student[None]
    teacher = parts[1].logsumexp(0)
    mean = ((parts[1] - teacher).exp() * parts[2]).sum(0)
    return torch.stack([student, teacher, mean])


def stream_statistics(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Return statistics of rows, k t, and columns, k v, and the logits of matching pairs by rows, m t."""
    rows_sums = pairs.scale.new_empty(pairs.statistics, pairs.t)
    column_sums = pairs.scale.new_empty(pairs.statistics, pairs.v)
    for sums in (rows_sums, column_sums):
        sums[:2], sums[2:] = -torch.inf, 0
    matched = pairs.scale.new_zeros(2 if pairs.has_frames else 1, pairs.t)
    for rows, across in pairs.strips():
        for columns in across:
            maxima = pairs.frame_maxima(rows, columns)
            row_parts, column_parts, diagonal = pairs.functions.statistics(
                *pairs.block(rows, columns, maxima)
            )
            rows_sums[:, rows] = merge_parts(rows_sums[:, rows], row_parts)
            column_sums[:, columns] = merge_parts(column_sums[:, columns], column_parts)
            matched[:, rows] += diagonal
    return rows_sums, column_sums, matched


@torch.library.custom_op("discovla::contrastive_streamed", mutates_args=())
def contrastive_streamed(
    text: Tensor,
    video: Tensor,
    text_frames: Tensor | None,
    video_frames: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    scale: Tensor,
    ignore: Tensor | None,
    kl_weight: float,
    detach_teacher: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Losses (video-level, frame-level, distillation; 0 without frames) and all sums, 2 k n, for backward."""
    tensors = (text, video, text_frames, video_frames, text_mask, video_mask, scale, ignore)
    pairs = Pairs(tensors, impl, keep=False)
    rows, columns, matched = stream_statistics(pairs)
    sums = torch.stack([rows, columns])
    losses = scale.new_zeros(3)
    losses[0] = sums[:, 0].mean() - matched[0].mean()
    if pairs.has_frames:
        losses[1] = sums[:, 1].mean() - matched[1].mean()
        losses[2] = kl_weight * (sums[:, 2] - sums[:, 1] + sums[:, 0]).sum() / 2
    return losses, sums


@contrastive_streamed.register_fake
def _(text, video, text_frames, video_frames, text_mask, video_mask, scale, *rest):
    return scale.new_empty(3), scale.new_empty(2, 1 if text_frames is None else 3, len(text))


@torch.library.custom_op("discovla::contrastive_streamed_backward", mutates_args=())
def _contrastive_backward(
    grad: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    text: Tensor,
    video: Tensor,
    text_frames: Tensor | None,
    video_frames: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    scale: Tensor,
    ignore: Tensor | None,
    kl_weight: float,
    detach_teacher: bool,
    impl: str,
    first_text: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by text, video, their frames (empty without) and the scale; row_sums: over all videos."""
    tensors = (text, video, text_frames, video_frames, text_mask, video_mask, scale, ignore)
    pairs = Pairs(tensors, impl, keep=True, first_text=first_text)
    means = [1 / (2 * pairs.t), 1 / (2 * pairs.t), kl_weight / 2]
    weights = grad.to(scale.dtype) * constants(means, scale.dtype, scale.device)
    gradients = Gradients(pairs, tensors)
    for rows, across in pairs.strips():
        gradients.start_strip(rows)
        for columns in across:
            maxima = pairs.frame_maxima(rows, columns)
            dx, dteacher, dscale = pairs.functions.derivative(
                *pairs.block(rows, columns, maxima),
                row_sums[:, rows],
                column_sums[:, columns],
                weights,
                detach_teacher,
            )
            gradients.scale += dscale
            gradients.add_pooled(dx, rows, columns)
            if dteacher is not None:
                gradients.add_frames(dteacher, maxima, rows, columns)
        gradients.end_strip(rows)
    return gradients.results()


@_contrastive_backward.register_fake
def _(
    grad, row_sums, column_sums, text, video, text_frames, video_frames, text_mask, video_mask, scale, *rest
):
    frames = [scale.new_empty(0) if x is None else torch.empty_like(x) for x in (text_frames, video_frames)]
    return torch.empty_like(text), torch.empty_like(video), *frames, torch.empty_like(scale)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.kl_weight, ctx.detach_teacher, ctx.impl = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, grad, _):
    """Differentiate the losses; the sums are for backward only."""
    sums, *tensors = ctx.saved_tensors
    options = (ctx.kl_weight, ctx.detach_teacher, ctx.impl, 0)
    return *_input_gradients(grad, sums[0], sums[1], tensors, *options), None, None, None


def _input_gradients(
    grad: Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    tensors: list[Tensor],
    kl_weight: float,
    detach_teacher: bool,
    impl: str,
    first_text: int,
) -> tuple[Tensor | None, ...]:
    """Return gradients by text, video, text frames, video frames, masks, scale and ignore."""
    text, video, text_frames, video_frames, scale = _contrastive_backward(
        grad, row_sums, column_sums, *tensors, kl_weight, detach_teacher, impl, first_text
    )
    frames = (text_frames, video_frames) if text_frames.numel() else (None, None)
    return text, video, *frames, None, None, scale, None


contrastive_streamed.register_autograd(_backward, setup_context=_setup_context)


def contrastive_columns(
    *tensors: Tensor | None, columns: ColumnShard, kl_weight: float, detach_teacher: bool, impl: str
) -> Tensor:
    """Losses of whole matrices, 1 or 3, from the columns of one process.

    Args:
        tensors: text, video, text_frames, video_frames, text_mask, video_mask, scale, ignore, as in
            `contrastive_streamed`; those of videos have v rows, ignore is t v.
    """
    loss = _ContrastiveColumns.apply(columns, kl_weight, detach_teacher, impl, *tensors)
    return loss  # type: ignore[return-value]


class _ContrastiveColumns(torch.autograd.Function):
    """Not a `torch.library` op, since its forward calls collectives."""

    @staticmethod
    def forward(
        ctx: Any,
        columns: ColumnShard,
        kl_weight: float,
        detach_teacher: bool,
        impl: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        pairs = Pairs(tensors, impl, keep=False, first_text=columns.first_text)
        row_sums, column_sums, matched = stream_statistics(pairs)
        statistics = Statistics(rows=row_sums, columns=column_sums, matched=matched.sum(1))
        losses, row_sums = merge_statistics(statistics, columns, kl_weight, detach_teacher)
        ctx.options = kl_weight, detach_teacher, impl, columns.first_text
        ctx.save_for_backward(row_sums, column_sums, *tensors)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_sums, column_sums, *tensors = ctx.saved_tensors
        grad = torch.nn.functional.pad(grads[0], (0, 3 - len(grads[0])))
        return *[None] * 4, *_input_gradients(grad, row_sums, column_sums, tensors, *ctx.options)
