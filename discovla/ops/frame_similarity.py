"""DiscoVLA's frame-level similarity: each part of one side is compared with its best match on the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discovla.ops.blocks import (
    ELEMENTS,
    expect_shape,
    pair_blocks,
    row_strips,
    select_rows,
    sum_dtype,
    unit_rows,
    unit_rows_backward,
)
from discovla.ops.dispatch import Impl, choose, kernel, run_reference
from discovla.ops.streamed import chunks
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
    The weights carry gradient; a maximum sends its gradient to one index, the lowest of equal ones.

    Args:
        text: t i d, un-normalised features of frame captions.  video: v j d, of frames.
        logit_scale: scalar, s (not its logarithm).
        text_mask: t i, bool; video_mask: v j, bool; true on real parts.  A side without one contributes 0.
        impl: reference (R in memory), torch (streamed over blocks of pairs, computed again in backward:
            beyond inputs and outputs its memory does not grow with t v), triton, or auto: the reference if R
            has at most 4 million entries, else torch.

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
    operands = (text, video, text_mask, video_mask)
    chosen = choose("frame_similarity", impl, text.device.type, small=small, operands=operands)
    dtype = sum_dtype(text)
    if chosen in ("reference", "compiled"):
        wide = text.to(dtype), video.to(dtype)
        return run_reference(chosen, frame_similarity_reference, *wide, logit_scale, text_mask, video_mask)
    return _frame_similarity(text, video, logit_scale.to(dtype), text_mask, video_mask, chosen)


def frame_similarity_reference(
    text: Tensor, video: Tensor, logit_scale: Tensor, text_mask: Tensor | None, video_mask: Tensor | None
) -> Tensor:
    """The formula of `frame_similarity`, with R in memory."""
    text = text / text.norm(dim=-1, keepdim=True)
    video = video / video.norm(dim=-1, keepdim=True)
    match = torch.einsum("tid,vjd->tvij", text, video)  # t v i j
    i_mask = None if text_mask is None else text_mask[:, None, :, None]
    j_mask = None if video_mask is None else video_mask[None, :, None, :]
    text_best = _exclude(match, j_mask).max(-1).values  # t v i
    video_best = _exclude(match, i_mask).max(-2).values  # t v j
    text_pooled = _pool(text_best, logit_scale, None if i_mask is None else i_mask[..., 0])
    video_pooled = _pool(video_best, logit_scale, None if j_mask is None else j_mask[:, :, 0])
    return (text_pooled + video_pooled) / 2


def _exclude(match: Tensor, mask: Tensor | None) -> Tensor:
    """Set masked entries below every cosine, so that they are never the maximum, yet finite."""
    return match if mask is None else match.masked_fill(~mask, -2.0)


def _pool(best: Tensor, scale: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return (best * (scale * best).softmax(-1)).sum(-1)
    # without a real part all logits of a row are equal, and the second mask makes the weights 0
    weights = (scale * best).masked_fill(~mask, torch.finfo(best.dtype).min).softmax(-1) * mask
    return (best.masked_fill(~mask, 0) * weights).sum(-1)


def block_functions(impl: str) -> Any:
    """Return what computes one block of pairs: `maxima`, `gradients`, `pairs_per_block`."""
    if impl == "chunks":
        return chunks.frame_functions()
    return kernel("frame_similarity") if impl == "triton" else streamed


@torch.library.custom_op("discovla::frame_similarity_streamed", mutates_args=())
def _frame_similarity(
    text: Tensor, video: Tensor, scale: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, impl: str
) -> Tensor:
    """`frame_similarity` block by block."""
    functions, pairs = block_functions(impl), len(text) * len(video)
    text, video = unit_rows(text, pairs)[0], unit_rows(video, pairs)[0]
    out = text.new_empty(len(text), len(video), dtype=sum_dtype(text))
    for rows, columns in pair_blocks(
        len(text), len(video), functions.pairs_per_block(text, video, keep=False)
    ):
        masks = select_rows(text_mask, rows), select_rows(video_mask, columns)
        out[rows, columns] = functions.maxima(
            text[rows], video[columns], scale, *masks, keep=False
        ).similarity
    return out


@_frame_similarity.register_fake
def _(text, video, scale, text_mask, video_mask, impl):
    return text.new_empty(len(text), len(video), dtype=sum_dtype(text))


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
    """Gradients by text, video and scale; the maxima of each block are computed again."""
    functions, pairs, dtype = block_functions(impl), grad.numel(), sum_dtype(text)
    dtext, dscale = torch.empty_like(text), torch.zeros_like(scale)
    (text, text_inverse), (video, video_inverse) = unit_rows(text, pairs), unit_rows(video, pairs)
    dvideo_unit = torch.zeros_like(video, dtype=dtype)
    for rows, across in row_strips(len(text), len(video), functions.pairs_per_block(text, video, keep=True)):
        dtext_unit = torch.zeros_like(text[rows], dtype=dtype)
        for columns in across:
            block = (text[rows], video[columns], scale)
            masks = select_rows(text_mask, rows), select_rows(video_mask, columns)
            maxima = functions.maxima(*block, *masks, keep=True)
            gradients = functions.gradients(grad[rows, columns], maxima, *block, *masks)
            dtext_unit += gradients[0]
            dvideo_unit[columns] += gradients[1]
            dscale += gradients[2]
        dtext[rows] = unit_rows_backward(dtext_unit, text[rows], text_inverse[rows]).to(dtext.dtype)
    return dtext, unit_rows_backward(dvideo_unit, video, video_inverse), dscale


@_frame_similarity_backward.register_fake
def _(grad, text, video, scale, text_mask, video_mask, impl):
    return torch.empty_like(text), torch.empty_like(video, dtype=sum_dtype(video)), torch.empty_like(scale)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    saved = ctx.saved_tensors
    dtext, dvideo, dscale = _frame_similarity_backward(grad.contiguous(), *saved, ctx.impl)
    return dtext, dvideo.to(saved[1].dtype), dscale, None, None, None


_frame_similarity.register_autograd(_backward, setup_context=_setup_context)
