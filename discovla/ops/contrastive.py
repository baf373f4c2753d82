"""The streamed core of `info_nce` and `alignment_losses`: no similarity matrix, only blocks of it.

Forward merges, block by block, the log-sum-exp of every row and column (and, with frames, the mean difference
of the two matrices' logits under the teacher); backward makes each block again and turns it into gradients.
What lives beside inputs, outputs and one block are those sums, 2 or 6 numbers a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from discovla.ops.blocks import (
    inverse_norms,
    multiplied_dtype,
    numbers,
    pair_blocks,
    product,
    row_runs,
    through_unit,
    unit_rows,
    wide,
)
from discovla.ops.column_shard import ColumnShard, merged_losses
from discovla.ops.dispatch import kernel
from discovla.ops.frame_similarity import part
from discovla.ops.frame_similarity import tile_functions as frame_tiles
from discovla.ops.streamed import contrastive as streamed


class Blocks:
    """The similarity matrices t v, made block by block: of pooled rows as they are, of unit frames.

    Text `first` matches the first video, and the others match in order.
    """

    def __init__(self, tensors: tuple[Tensor | None, ...], impl: str, keep: bool, first: int = 0) -> None:
        text, video, text_frames, video_frames, *self.masks, scale, self.ignore = tensors
        assert text is not None and video is not None and scale is not None
        self.t, self.v, self.first, self.scale, self.keep = len(text), len(video), first, scale, keep
        self.tiles: ModuleType = kernel("info_nce") if impl == "triton" else streamed
        self.dtype = multiplied_dtype(text, self.t * self.v)
        self.pooled = [(x, inverse_norms(x)) for x in (text, video)]
        frames = (text_frames, video_frames)
        self.units = [None if x is None else unit_rows(x, self.t * self.v) for x in frames]
        self.has_frames = text_frames is not None
        self.kinds = 3 if self.has_frames else 1  # numbers a row or column is summed up in
        self.frame_tiles = frame_tiles(impl)
        self.per_block = self.tiles.pairs_per_block(text[:0].to(self.dtype), keep=keep)
        if self.has_frames:
            of_frames = self.frame_tiles.pairs_per_block(self.frames(0), self.frames(1), keep=keep)
            self.per_block = min(self.per_block, of_frames)

    def rows(self, side: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Pooled rows of texts (0) or videos (1), as they are multiplied, and their inverse norms."""
        x, inverse = self.pooled[side]
        return x[rows].to(self.dtype), inverse[rows]

    def frames(self, side: int, rows: slice = slice(None)) -> Tensor:
        """Unit frames of texts or videos."""
        return self.unit(side, rows)[0]

    def unit(self, side: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The same, and the inverse of what they were divided by."""
        found = self.units[side]
        assert found is not None
        return found[0][rows], found[1][rows]

    def walk(self):
        """Runs of rows, and the runs of columns across each."""
        return pair_blocks(self.t, self.v, self.per_block)

    def teacher(self, rows: slice, columns: slice):
        """What is found of a block's frame-level similarity, or None where there are no frames."""
        if not self.has_frames:
            return None
        return self.frame_tiles.maxima(
            self.frames(0, rows),
            self.frames(1, columns),
            self.scale,
            self.frame_masks(rows, columns),
            self.keep,
        )

    def frame_masks(self, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        return part(self.masks[0], rows), part(self.masks[1], columns)

    def block(self, rows: slice, columns: slice, teacher: Tensor | None):
        """The arguments that every function on one block begins with."""
        ignore = None if self.ignore is None else self.ignore[rows, columns]
        shift = self.first + columns.start - rows.start
        return self.rows(0, rows), self.rows(1, columns), self.scale, teacher, ignore, shift


class Gradients:
    """Sums of gradients by rows: of the current run of rows for the texts, of all for the videos.

    Those by pooled rows are sums of rows over both norms, so that only their radial part is to be taken out;
    those by frames are by unit rows.
    """

    def __init__(self, blocks: Blocks, like: tuple[Tensor | None, ...]) -> None:
        self.blocks, self.scale = blocks, torch.zeros_like(blocks.scale)
        self.text = [None if x is None else torch.empty_like(x) for x in (like[0], like[2])]
        self.video = [self._zeros(x) for x in (like[1], like[3]) if x is not None]

    def _zeros(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x, dtype=wide(x))

    def start(self, rows: slice) -> None:
        """Begin a run of rows."""
        self.current = [self._zeros(x[rows]) for x in self.text if x is not None]

    def add_pooled(self, dx: Tensor, rows: slice, columns: slice) -> None:
        """Add what the video-level cosines of one block send back."""
        dtype = wide(dx)
        self.current[0] += product(dx, self.blocks.rows(1, columns)[0], dtype)
        self.video[0][columns] += product(dx.T, self.blocks.rows(0, rows)[0], dtype)

    def add_frames(self, dy: Tensor, found, rows: slice, columns: slice) -> None:
        """Add what the frame-level similarities of one block send back."""
        blocks, masks = self.blocks, self.blocks.frame_masks(rows, columns)
        frames = blocks.frames(0, rows), blocks.frames(1, columns)
        sums = blocks.frame_tiles.gradients(dy, found, *frames, blocks.scale, masks)
        self.current[1] += sums[0]
        self.video[1][columns] += sums[1]
        self.scale += sums[2]

    def finish(self, rows: slice) -> None:
        """End a run of rows: its text side is complete."""
        for out, grad, through in zip(self.text, self.current, self._through(0), strict=False):
            if out is not None:
                out[rows] = through(grad, rows)

    def _through(self, side: int):
        """What makes a sum of a run of rows their gradient: of pooled rows, of frames."""
        blocks = self.blocks
        return (
            lambda grad, rows: tangential(grad, *blocks.rows(side, rows)),
            lambda grad, rows: through_unit(grad, *blocks.unit(side, rows)),
        )

    def results(self, like: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients by text, video, text frames, video frames and scale; empty where there is none."""
        found: list[Tensor] = []
        for text, video, given, through in zip(
            self.text, [*self.video, None], (like[1], like[3]), self._through(1), strict=False
        ):
            if text is None or video is None or given is None:
                found += [self.scale.new_empty(0), self.scale.new_empty(0)]
                continue
            out = video if video.dtype == given.dtype else torch.empty_like(given)
            for rows in row_runs(video):  # in place where dtypes agree: a copy of all would not be small
                out[rows] = through(video[rows], rows)
            found += [text, out]
        return found[0], found[1], found[2], found[3], self.scale


def tangential(grad: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """`grad` without its part along each row of x."""
    unit = x * inverse[:, None]
    return grad - unit * (unit * grad).sum(-1, keepdim=True)


def merged(sums: Tensor, parts: Tensor) -> Tensor:
    """Statistics k n of what had `sums`, k n, and of more entries, k p n."""
    parts = torch.cat([sums[:, None], parts], dim=1)
    student = parts[0].logsumexp(0)
    if len(parts) == 1:
        return student[None]
    teacher = parts[1].logsumexp(0)
    mean = ((parts[1] - teacher).exp() * parts[2]).sum(0)
    return torch.stack([student, teacher, mean])


def fill_sums(blocks: Blocks, sums: Sequence[Tensor]) -> Tensor:
    """Put statistics of rows (k t) and columns (k v) into `sums`; logits of matching pairs by rows, m t."""
    for side in sums:
        side[:2], side[2:] = -torch.inf, 0
    diagonal = blocks.scale.new_zeros(2 if blocks.has_frames else 1, blocks.t)
    for rows, across in blocks.walk():
        for columns in across:
            found = blocks.teacher(rows, columns)
            teacher = None if found is None else found.similarity
            down, along, right = blocks.tiles.statistics(*blocks.block(rows, columns, teacher))
            sums[0][:, rows] = merged(sums[0][:, rows], down)
            sums[1][:, columns] = merged(sums[1][:, columns], along)
            diagonal[:, rows] += right
    return diagonal


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
    blocks = Blocks(tensors, impl, keep=False)
    sums = scale.new_empty(2, blocks.kinds, blocks.t)
    diagonal = fill_sums(blocks, (sums[0], sums[1]))
    losses = scale.new_zeros(3)
    losses[0] = sums[:, 0].mean() - diagonal[0].mean()
    if blocks.has_frames:
        losses[1] = sums[:, 1].mean() - diagonal[1].mean()
        losses[2] = kl_weight * (sums[:, 2] - sums[:, 1] + sums[:, 0]).sum() / 2
    return losses, sums


@contrastive_streamed.register_fake
def _(
    text,
    video,
    text_frames,
    video_frames,
    text_mask,
    video_mask,
    scale,
    ignore,
    kl_weight,
    detach_teacher,
    impl,
):
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
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by text, video, their frames (empty without) and the scale; sums are of all videos."""
    tensors = (text, video, text_frames, video_frames, text_mask, video_mask, scale, ignore)
    blocks = Blocks(tensors, impl, keep=True, first=first)
    means = [1 / (2 * blocks.t), 1 / (2 * blocks.t), kl_weight / 2]
    weights = grad.to(scale.dtype) * numbers(means, scale.dtype, scale.device)
    gradients = Gradients(blocks, tensors)
    for rows, across in blocks.walk():
        gradients.start(rows)
        for columns in across:
            found = blocks.teacher(rows, columns)
            block = blocks.block(rows, columns, None if found is None else found.similarity)
            here = (row_sums[:, rows], column_sums[:, columns])
            dx, dy, slope = blocks.tiles.derivative(*block, here, weights, detach_teacher)
            gradients.scale += slope
            gradients.add_pooled(dx, rows, columns)
            if dy is not None:
                gradients.add_frames(dy, found, rows, columns)
        gradients.finish(rows)
    return gradients.results(tensors)


@_contrastive_backward.register_fake
def _(
    grad, row_sums, column_sums, text, video, text_frames, video_frames, text_mask, video_mask, scale, *rest
):
    frames = [scale.new_empty(0) if x is None else torch.empty_like(x) for x in (text_frames, video_frames)]
    return torch.empty_like(text), torch.empty_like(video), *frames, torch.empty_like(scale)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.kl_weight, ctx.detach_teacher, ctx.impl = inputs
    ctx.save_for_backward(output[1], *tensors)


def _differentiate(ctx, grad, grad_of_sums):
    """`sums` are for backward alone: nobody differentiates them."""
    sums, *tensors = ctx.saved_tensors
    how = (ctx.kl_weight, ctx.detach_teacher, ctx.impl)
    return *_gradients(grad, sums[0], sums[1], tensors, how, 0), None, None, None


def _gradients(grad, row_sums, column_sums, tensors, how, first) -> tuple[Tensor | None, ...]:
    """By text, video, text frames, video frames, masks, scale, ignore."""
    text, video, text_frames, video_frames, scale = _contrastive_backward(
        grad, row_sums, column_sums, *tensors, *how, first
    )
    frames = (text_frames, video_frames) if text_frames.numel() else (None, None)
    return text, video, *frames, None, None, scale, None


contrastive_streamed.register_autograd(_differentiate, setup_context=_keep)


def contrastive_columns(
    tensors: tuple[Tensor | None, ...],
    columns: ColumnShard,
    kl_weight: float,
    detach_teacher: bool,
    impl: str,
) -> Tensor:
    """Losses of whole matrices, 1 or 3, from the columns of one process.

    Args:
        tensors: text, video, text_frames, video_frames, text_mask, video_mask, scale, ignore, as in
            `contrastive_streamed`; what is of videos has v rows, ignore is t v.
    """
    return _Columns.apply(columns, (kl_weight, detach_teacher, impl), *tensors)  # type: ignore[return-value]


class _Columns(torch.autograd.Function):
    """A `torch.library` op could not call what adds up over processes."""

    @staticmethod
    def forward(
        ctx: Any, columns: ColumnShard, how: tuple[float, bool, str], *tensors: Tensor | None
    ) -> Tensor:
        kl_weight, detach_teacher, impl = how
        blocks = Blocks(tensors, impl, keep=False, first=columns.first_text)
        rows, across = (blocks.scale.new_empty(blocks.kinds, count) for count in (blocks.t, blocks.v))
        matched = fill_sums(blocks, (rows, across)).sum(1)
        losses, rows = merged_losses(rows, across, matched, columns, kl_weight, detach_teacher)
        ctx.first, ctx.how = columns.first_text, how
        ctx.save_for_backward(rows, across, *tensors)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, across, *tensors = ctx.saved_tensors
        grad = torch.nn.functional.pad(grads[0], (0, 3 - len(grads[0])))
        return None, None, *_gradients(grad, rows, across, tensors, ctx.how, ctx.first)
