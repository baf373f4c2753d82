"""DiscoVLA's frame-level similarity: each part of one side finds its best match on the other."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, operand, unit_rows
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
        impl: reference (R in memory), torch (streamed over runs of texts, computed again in backward: beyond
            inputs and outputs its memory does not grow with t), triton, or auto: on a CPU the reference while
            R has at most 4 million entries and torch above, on a GPU triton.

    Returns:
        G: t v, before any logit scale, float32 at least.

    Raises:
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: DiscoVLA (arXiv 2506.08887), frame-level alignment.
    """
    small = text.shape[0] * text.shape[1] * video.shape[0] * video.shape[1] <= ELEMENTS
    chosen = choose(
        "frame_similarity", impl, text.device.type, small=small, operands=(text, video, text_mask, video_mask)
    )
    if chosen == "reference":
        work = torch.promote_types(text.dtype, torch.float32)
        return frame_similarity_reference(text.to(work), video.to(work), logit_scale, text_mask, video_mask)
    pairs = len(text) * len(video)
    units = [operand(unit_rows(x), x.dtype, pairs) for x in (text, video)]
    return _frame_similarity(*units, logit_scale.to(unit_dtype(units[0])), text_mask, video_mask, chosen)


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
    """The module that computes runs of texts: `maxima`, `gradients`, `texts_per_chunk`."""
    return kernel("frame_similarity") if impl == "triton" else streamed


def unit_dtype(unit: Tensor) -> torch.dtype:
    """What similarities of unit rows are held in."""
    return torch.promote_types(unit.dtype, torch.float32)


@torch.library.custom_op("discovla::frame_similarity_streamed", mutates_args=())
def _frame_similarity(
    text: Tensor, video: Tensor, scale: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, impl: str
) -> Tensor:
    """`frame_similarity` of unit rows; the schema of an op takes no record, so it has its masks apart."""
    tiles, masks = tile_functions(impl), (text_mask, video_mask)
    if impl == "triton":  # the forward kernel keeps nothing, so it needs no runs
        return tiles.maxima(text, video, scale, masks, keep=False).similarity
    out = text.new_empty(len(text), len(video))
    step = tiles.texts_per_chunk(text, video)
    for first in range(0, len(text), step):
        rows = slice(first, first + step)
        part = (None if text_mask is None else text_mask[rows], video_mask)
        out[rows] = tiles.maxima(text[rows], video, scale, part, keep=False).similarity
    return out


@_frame_similarity.register_fake
def _(text, video, scale, text_mask, video_mask, impl):
    return text.new_empty(len(text), len(video), dtype=unit_dtype(text))


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
    """Gradients by text, video and scale, maxima found again run by run."""
    tiles = tile_functions(impl)
    text_grad, video_grad = (
        torch.empty_like(text, dtype=grad.dtype),
        torch.zeros_like(video, dtype=grad.dtype),
    )
    scale_grad = torch.zeros_like(scale)
    step = tiles.texts_per_chunk(text, video)
    for first in range(0, len(text), step):
        rows = slice(first, first + step)
        masks = (None if text_mask is None else text_mask[rows], video_mask)
        found = tiles.maxima(text[rows], video, scale, masks, keep=True)
        parts = tiles.gradients(grad[rows], found, text[rows], video, scale, masks)
        text_grad[rows] = parts[0]
        video_grad += parts[1]
        scale_grad += parts[2]
    return text_grad.to(text.dtype), video_grad.to(video.dtype), scale_grad


@_frame_similarity_backward.register_fake
def _(grad, text, video, scale, text_mask, video_mask, impl):
    return torch.empty_like(text), torch.empty_like(video), torch.empty_like(scale)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    grads = _frame_similarity_backward(grad.contiguous(), *ctx.saved_tensors, ctx.impl)
    return *grads, None, None, None


_frame_similarity.register_autograd(_differentiate, setup_context=_keep)
