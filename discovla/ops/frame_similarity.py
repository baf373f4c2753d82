"""DiscoVLA's frame-level similarity: each part of one side finds its best match on the other."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, expect_shape, pair_blocks, through_unit, unit_rows, wide
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.streamed import frame_similarity as streamed


def frame_similarity(
    text: Tensor,
    video: Tensor,
    logit_scale: Tensor,
    *,
    text_mask: Tensor | None = None,
    video_mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Softmax-weighted mean of best matches, from both sides, averaged.

    R_tivj = l_ti · u_vj (unit vectors);  p_tvi = max_j R,  p'_tvj = max_i R;
    pool(p) = sum_i p_i softmax_i(s p_i);  G_tv = (pool(p_tv) + pool(p'_tv)) / 2.
    The weights carry gradient; a maximum sends its gradient to one index (the lowest where several tie).

    Args:
        text: t i d, un-normalised frame-caption features.  video: v j d, un-normalised frame features.
        logit_scale: scalar, s (not its logarithm).
        text_mask: t i, bool; video_mask: v j, bool; true on real parts.  A side with no real part contributes
            0.
        impl: reference (R in memory), torch (streamed over blocks of pairs, computed again in backward:
            beyond inputs and outputs its memory does not grow with t v), triton, cuda, or auto: the
            reference while R has at most 4 million entries and torch above.

    Returns:
        G: t v, before any logit scale, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: DiscoVLA (arXiv 2506.08887), frame-level alignment.
    """
    expect_shape("video", video, (*video.shape[:2], text.shape[2]))
    expect_shape("text_mask", text_mask, tuple(text.shape[:2]))
    expect_shape("video_mask", video_mask, tuple(video.shape[:2]))
    small = text.shape[0] * text.shape[1] * video.shape[0] * video.shape[1] <= ELEMENTS
    chosen = choose(
        "frame_similarity", impl, text.device.type, small=small, operands=(text, video, text_mask, video_mask)
    )
    if chosen == "reference":
        work = torch.promote_types(text.dtype, torch.float32)
        return frame_similarity_reference(text.to(work), video.to(work), logit_scale, text_mask, video_mask)
    return _frame_similarity(text, video, logit_scale.to(wide(text)), text_mask, video_mask, chosen)


def frame_similarity_reference(
    text: Tensor, video: Tensor, logit_scale: Tensor, text_mask: Tensor | None, video_mask: Tensor | None
) -> Tensor:
    """The formula of `frame_similarity`, with R in memory."""
    text = text / text.norm(dim=-1, keepdim=True)
    video = video / video.norm(dim=-1, keepdim=True)
    match = torch.einsum("tid,vjd->tvij", text, video)  # t v i j
    i_mask = None if text_mask is None else text_mask[:, None, :, None]
    j_mask = None if video_mask is None else video_mask[None, :, None, :]
    of_text = _masked(match, j_mask).max(-1).values  # t v i
    of_video = _masked(match, i_mask).max(-2).values  # t v j
    pooled_text = _pool(of_text, logit_scale, None if i_mask is None else i_mask[..., 0])
    pooled_video = _pool(of_video, logit_scale, None if j_mask is None else j_mask[:, :, 0])
    return (pooled_text + pooled_video) / 2


def _masked(match: Tensor, mask: Tensor | None) -> Tensor:
    """Masked entries lose every maximum; below any cosine, yet finite."""
    return match if mask is None else match.masked_fill(~mask, -2.0)


def _pool(best: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return (best * (scale * best).softmax(-1)).sum(-1)
    # a side without a real part leaves a row of equal logits, which the second mask turns into 0
    weights = (scale * best).masked_fill(~mask, torch.finfo(best.dtype).min).softmax(-1) * mask
    return (best.masked_fill(~mask, 0) * weights).sum(-1)


def tile_functions(impl: str) -> ModuleType:
    """The module that computes blocks of pairs: `maxima`, `gradients`, `pairs_per_block`."""
    return kernel("frame_similarity", impl) if impl in ("triton", "cuda") else streamed


@torch.library.custom_op("discovla::frame_similarity_streamed", mutates_args=())
def _frame_similarity(
    text: Tensor, video: Tensor, scale: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, impl: str
) -> Tensor:
    """`frame_similarity` block by block; the schema of an op takes no record, so it has its masks apart."""
    tiles, pairs = tile_functions(impl), len(text) * len(video)
    text, video = unit_rows(text, pairs)[0], unit_rows(video, pairs)[0]
    out = text.new_empty(len(text), len(video), dtype=wide(text))
    for rows, across in pair_blocks(len(text), len(video), tiles.pairs_per_block(text, video, keep=False)):
        for columns in across:
            masks = part(text_mask, rows), part(video_mask, columns)
            found = tiles.maxima(text[rows], video[columns], scale, masks, keep=False)
            out[rows, columns] = found.similarity
    return out


@_frame_similarity.register_fake
def _(text, video, scale, text_mask, video_mask, impl):
    return text.new_empty(len(text), len(video), dtype=wide(text))


@torch.library.custom_op("discovla::frame_similarity_streamed_backward", mutates_args=())
def _frame_similarity_backward(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    scale: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by text, video and scale, maxima found again block by block."""
    tiles, pairs = tile_functions(impl), grad.numel()
    text_grad, scale_grad = torch.empty_like(text), torch.zeros_like(scale)
    (text, text_inverse), (video, video_inverse) = unit_rows(text, pairs), unit_rows(video, pairs)
    video_sum = torch.zeros_like(video, dtype=wide(video))
    for rows, across in pair_blocks(len(text), len(video), tiles.pairs_per_block(text, video, keep=True)):
        text_sum = torch.zeros_like(text[rows], dtype=wide(text))
        for columns in across:
            block, masks = (text[rows], video[columns]), (part(text_mask, rows), part(video_mask, columns))
            found = tiles.maxima(*block, scale, masks, keep=True)
            parts = tiles.gradients(grad[rows, columns], found, *block, scale, masks)
            text_sum += parts[0]
            video_sum[columns] += parts[1]
            scale_grad += parts[2]
        text_grad[rows] = through_unit(text_sum, text[rows], text_inverse[rows]).to(text_grad.dtype)
    return text_grad, through_unit(video_sum, video, video_inverse), scale_grad


@_frame_similarity_backward.register_fake
def _(grad, text, video, scale, text_mask, video_mask, impl):
    return torch.empty_like(text), torch.empty_like(video, dtype=wide(video)), torch.empty_like(scale)


def part(mask: Tensor | None, rows: slice) -> Tensor | None:
    """Some rows of what may not be there."""
    return None if mask is None else mask[rows]


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    text_grad, video_grad, scale_grad = _frame_similarity_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.impl
    )
    return text_grad, video_grad.to(ctx.saved_tensors[1].dtype), scale_grad, None, None, None


_frame_similarity.register_autograd(_differentiate, setup_context=_keep)
