"""`alignment_losses` of a batch whose pairs are one block by kernels alone: four launches, and eight back."""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.blocks import wide
from discovla.ops.dispatch import kernel


def fits_a_block(text: Tensor, text_frames: Tensor, video_frames: Tensor) -> bool:
    """Whether kernels may hold all pairs of n texts and videos, n d, with parts n i e and n j e, at once."""
    width = max(text.shape[1], text_frames.shape[2])
    if text.dtype != wide(text) or width > kernel("alignment_losses").MAX_WIDTH:
        return False
    most = kernel("frame_similarity").pairs_per_block(text_frames, video_frames, keep=True)
    return len(text) ** 2 <= min(most, kernel("info_nce").pairs_per_block(text, keep=True))


@torch.library.custom_op("discovla::alignment_block", mutates_args=())
def alignment_block(
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
    detach_teacher: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """Total = video-level + alpha frame-level + beta distillation, these three, and what backward needs."""
    tensors, masks = (text, video, text_frames, video_frames), (text_mask, video_mask)
    losses, kept = kernel("alignment_losses").forward(tensors, masks, scale, ignore, (kl_weight, alpha, beta))
    return *losses, *kept.tensors()


@alignment_block.register_fake
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
    alpha,
    beta,
    detach_teacher,
):
    (n, i, e), j = text_frames.shape, video_frames.shape[1]
    shapes = (*((),) * 4, (n * (2 + i + j),), (n * (i + j), e), (2, 3, n), (3,), (n, n), (n, i, n))
    found = [text.new_empty(shape) for shape in shapes]
    index = [text.new_empty(shape, dtype=torch.int16) for shape in ((n, i, n), (n, n, j))]
    return *found, index[0], text.new_empty(n, n, j), index[1], text.new_empty(5, n, n)


@torch.library.custom_op("discovla::alignment_block_backward", mutates_args=())
def _alignment_block_backward(
    weights: Tensor,
    text: Tensor,
    video: Tensor,
    text_frames: Tensor,
    video_frames: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    scale: Tensor,
    ignore: Tensor | None,
    kept: list[Tensor],
    detach_teacher: bool,
    of_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by text, video, their frames, and by the scale (empty unless asked for)."""
    module, masks = kernel("alignment_losses"), (text_mask, video_mask)
    tensors, how = (text, video, text_frames, video_frames), (detach_teacher, of_scale)
    return module.backward(weights, tensors, masks, scale, ignore, module.Kept.of(kept), how)


@_alignment_block_backward.register_fake
def _(
    weights,
    text,
    video,
    text_frames,
    video_frames,
    text_mask,
    video_mask,
    scale,
    ignore,
    kept,
    detach_teacher,
    of_scale,
):
    tensors = [torch.empty_like(x) for x in (text, video, text_frames, video_frames)]
    return *tensors, scale.new_empty(() if of_scale else (0,))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.kl_weight, ctx.alpha, ctx.beta, ctx.detach_teacher = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(*tensors, *output[4:])


def _differentiate(ctx, total, video, frame, distill, *_):
    """Upstream is as a rule the gradient by the total alone; the others are for who wants one by itself."""
    tensors, kept = ctx.saved_tensors[:8], list(ctx.saved_tensors[8:])
    weights = kept[3] if total is None else total * kept[3]
    if total is None or any(x is not None for x in (video, frame, distill)):
        n, zero = len(tensors[0]), torch.zeros_like(kept[3][0])
        means = 1 / (2 * n), 1 / (2 * n), ctx.kl_weight / 2
        parts = [
            zero if x is None else x * mean for x, mean in zip((video, frame, distill), means, strict=True)
        ]
        weights = torch.stack(parts) + (0 if total is None else weights)
    of_scale = ctx.needs_input_grad[6]
    *grads, slope = _alignment_block_backward(weights, *tensors, kept, ctx.detach_teacher, of_scale)
    return *grads, None, None, slope if of_scale else None, *[None] * 5


alignment_block.register_autograd(_differentiate, setup_context=_keep)
