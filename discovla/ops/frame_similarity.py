"""DiscoVLA's frame-level similarity: each part of one side finds its best match on the other."""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.dispatch import Impl, choose


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

    Returns:
        G: t v, before any logit scale, float32 at least.

    Source: DiscoVLA (arXiv 2506.08887), frame-level alignment.
    """
    choose("frame_similarity", impl, text.device.type)
    work = torch.promote_types(text.dtype, torch.float32)
    return frame_similarity_reference(text.to(work), video.to(work), logit_scale, text_mask, video_mask)


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
