"""The streamed core of `info_nce` and `alignment_losses`: no similarity matrix, only blocks of it.

Forward merges, block by block, the log-sum-exp of every row and column (and, with frames, the mean difference
of the two matrices' logits under the teacher); backward makes each block again and turns it into gradients.
What lives beside inputs, outputs and one block are those sums, 2 or 6 numbers a sample.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from discovla.ops.blocks import pair_blocks, product, through_unit, unit_rows, wide
from discovla.ops.dispatch import kernel
from discovla.ops.frame_similarity import part
from discovla.ops.frame_similarity import tile_functions as frame_tiles
from discovla.ops.streamed import contrastive as streamed


class Blocks:
    """The similarity matrices of n pairs, made block by block from unit rows."""

    def __init__(self, tensors: tuple[Tensor | None, ...], impl: str, keep: bool) -> None:
        text, video, text_frames, video_frames, *self.masks, scale, self.ignore = tensors
        assert text is not None and video is not None and scale is not None
        self.n, self.scale, self.keep = len(text), scale, keep
        self.tiles: ModuleType = kernel("info_nce") if impl == "triton" else streamed
        given = (text, video, text_frames, video_frames)
        pairs = self.n**2
        self.units = [None if x is None else unit_rows(x, pairs) for x in given]
        self.has_frames = text_frames is not None
        self.frame_tiles = frame_tiles(impl)
        self.per_block = self.tiles.pairs_per_block(self.rows(0))
        if self.has_frames:
            of_frames = self.frame_tiles.pairs_per_block(self.rows(2), self.rows(3), keep=keep)
            self.per_block = min(self.per_block, of_frames)

    def rows(self, which: int, rows: slice = slice(None)) -> Tensor:
        """Unit rows of text, video, text frames or video frames."""
        return self.unit(which, rows)[0]

    def unit(self, which: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The same, and the inverse of what they were divided by."""
        found = self.units[which]
        assert found is not None
        return found[0][rows], found[1][rows]

    def walk(self):
        """Runs of rows, and the runs of columns across each."""
        return pair_blocks(self.n, self.n, self.per_block)

    def teacher(self, rows: slice, columns: slice):
        """What is found of a block's frame-level similarity, or None where there are no frames."""
        if not self.has_frames:
            return None
        return self.frame_tiles.maxima(
            self.rows(2, rows), self.rows(3, columns), self.scale, self.frame_masks(rows, columns), self.keep
        )

    def frame_masks(self, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        return part(self.masks[0], rows), part(self.masks[1], columns)

    def block(self, rows: slice, columns: slice, teacher: Tensor | None):
        """The arguments that every function on one block begins with."""
        ignore = None if self.ignore is None else self.ignore[rows, columns]
        shift = columns.start - rows.start
        return self.rows(0, rows), self.rows(1, columns), self.scale, teacher, ignore, shift


class Gradients:
    """Sums of gradients by unit rows: of the current run of rows for the texts, of all for the videos."""

    def __init__(self, blocks: Blocks, like: tuple[Tensor | None, ...]) -> None:
        self.blocks, self.scale = blocks, torch.zeros_like(blocks.scale)
        self.text = [None if x is None else torch.empty_like(x) for x in (like[0], like[2])]
        self.video = [self._zeros(which) for which in self._kinds(1)]

    def _kinds(self, first: int) -> tuple[int, ...]:
        """Pooled and, where there are, frames: 0 and 2 of the texts, 1 and 3 of the videos."""
        return (first, first + 2) if self.blocks.has_frames else (first,)

    def _zeros(self, which: int, rows: slice = slice(None)) -> Tensor:
        x = self.blocks.rows(which, rows)
        return torch.zeros_like(x, dtype=wide(x))

    def start(self, rows: slice) -> None:
        """Begin a run of rows."""
        self.current = [self._zeros(which, rows) for which in self._kinds(0)]

    def add_pooled(self, dx: Tensor, rows: slice, columns: slice) -> None:
        """Add what the video-level cosines of one block send back."""
        dtype = wide(dx)
        self.current[0] += product(dx, self.blocks.rows(1, columns), dtype)
        self.video[0][columns] += product(dx.T, self.blocks.rows(0, rows), dtype)

    def add_frames(self, dy: Tensor, found, rows: slice, columns: slice) -> None:
        """Add what the frame-level similarities of one block send back."""
        blocks, masks = self.blocks, self.blocks.frame_masks(rows, columns)
        frames = blocks.rows(2, rows), blocks.rows(3, columns)
        sums = blocks.frame_tiles.gradients(dy, found, *frames, blocks.scale, masks)
        self.current[1] += sums[0]
        self.video[1][columns] += sums[1]
        self.scale += sums[2]

    def finish(self, rows: slice) -> None:
        """End a run of rows: its text side is complete."""
        for which, out, grad in zip((0, 2), self.text, self.current, strict=False):
            if out is not None:
                out[rows] = through_unit(grad, *self.blocks.unit(which, rows))

    def results(self, like: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients by text, video, text frames, video frames and scale; empty where there is none."""
        found: list[Tensor] = []
        for text, which, given in zip(self.text, (1, 3), (like[1], like[3]), strict=True):
            if text is None or given is None:
                found += [self.scale.new_empty(0), self.scale.new_empty(0)]
                continue
            video = through_unit(self.video[which // 2], *self.blocks.unit(which))
            found += [text, video.to(given.dtype)]
        return found[0], found[1], found[2], found[3], self.scale


def merged(sums: Tensor, parts: Tensor) -> Tensor:
    """Statistics k n of what had `sums`, k n, and of more entries, k p n."""
    parts = torch.cat([sums[:, None], parts], dim=1)
    student = parts[0].logsumexp(0)
    if len(parts) == 1:
        return student[None]
    teacher = parts[1].logsumexp(0)
    mean = ((parts[1] - teacher).exp() * parts[2]).sum(0)
    return torch.stack([student, teacher, mean])


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
    kinds = 3 if blocks.has_frames else 1
    sums = scale.new_full((2, kinds, blocks.n), -torch.inf)
    sums[:, 2:] = 0
    diagonal = scale.new_zeros(2 if blocks.has_frames else 1, blocks.n)
    for rows, across in blocks.walk():
        for columns in across:
            found = blocks.teacher(rows, columns)
            teacher = None if found is None else found.similarity
            down, along, right = blocks.tiles.statistics(*blocks.block(rows, columns, teacher))
            sums[0, :, rows] = merged(sums[0, :, rows], down)
            sums[1, :, columns] = merged(sums[1, :, columns], along)
            diagonal[:, rows] += right
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
    sums: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by text, video, their frames (empty without) and the scale."""
    tensors = (text, video, text_frames, video_frames, text_mask, video_mask, scale, ignore)
    blocks = Blocks(tensors, impl, keep=True)
    means = [1 / (2 * blocks.n), 1 / (2 * blocks.n), kl_weight / 2]
    weights = grad.to(scale.dtype) * scale.new_tensor(means)
    gradients = Gradients(blocks, tensors)
    for rows, across in blocks.walk():
        gradients.start(rows)
        for columns in across:
            found = blocks.teacher(rows, columns)
            block = blocks.block(rows, columns, None if found is None else found.similarity)
            here = (sums[0, :, rows], sums[1, :, columns])
            dx, dy, slope = blocks.tiles.derivative(*block, here, weights, detach_teacher)
            gradients.scale += slope
            gradients.add_pooled(dx, rows, columns)
            if dy is not None:
                gradients.add_frames(dy, found, rows, columns)
        gradients.finish(rows)
    return gradients.results(tensors)


@_contrastive_backward.register_fake
def _(grad, sums, text, video, text_frames, video_frames, text_mask, video_mask, scale, *rest):
    frames = [scale.new_empty(0) if x is None else torch.empty_like(x) for x in (text_frames, video_frames)]
    return torch.empty_like(text), torch.empty_like(video), *frames, torch.empty_like(scale)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.kl_weight, ctx.detach_teacher, ctx.impl = inputs
    ctx.save_for_backward(output[1], *tensors)


def _differentiate(ctx, grad, grad_of_sums):
    """`sums` are for backward alone: nobody differentiates them."""
    text, video, text_frames, video_frames, scale = _contrastive_backward(
        grad, *ctx.saved_tensors, ctx.kl_weight, ctx.detach_teacher, ctx.impl
    )
    frames = (text_frames, video_frames) if text_frames.numel() else (None, None)
    return text, video, *frames, None, None, scale, None, None, None, None


contrastive_streamed.register_autograd(_differentiate, setup_context=_keep)
