"""Frame similarity of one block of pairs in plain torch, and its gradients.

Same functions as `discovla_kernels.frame_similarity`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, matmul, sum_dtype


@dataclass(frozen=True, kw_only=True)
class Maxima:
    """Best matches of a block; all but the similarity serve backward.

    similarity: t v.  text_index, text_slope: t i v, the best match of each text part, and the derivative of
    the similarity by it.  video_index, video_slope: t v j, likewise.  scale_slope: t v, the derivative by
    the scale.
    """

    similarity: Tensor
    text_index: Tensor
    text_slope: Tensor
    video_index: Tensor
    video_slope: Tensor
    scale_slope: Tensor


def maxima(
    text: Tensor,
    video: Tensor,
    scale: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    keep: bool,
) -> Maxima:
    """Similarities of unit rows, t i d and v j d.  `keep` is for kernels; here backward's part is free."""
    (t, i, _), (v, j, _) = text.shape, video.shape
    match = matmul(text.flatten(0, 1), video.flatten(0, 1).T, sum_dtype(text)).view(t, i, v, j)
    i_mask = None if text_mask is None else text_mask[:, :, None, None]
    text_best, text_index = _best(match, video_mask, 3)  # t i v
    video_best, video_index = _best(match, i_mask, 1)  # t v j
    text_pooled = _pool(text_best, scale, None if text_mask is None else text_mask[..., None], 1)
    video_pooled = _pool(video_best, scale, video_mask, 2)
    return Maxima(
        similarity=(text_pooled[0] + video_pooled[0]) / 2,
        text_index=text_index,
        text_slope=text_pooled[1] / 2,
        video_index=video_index,
        video_slope=video_pooled[1] / 2,
        scale_slope=(text_pooled[2] + video_pooled[2]) / 2,
    )


def gradients(
    grad: Tensor,
    maxima: Maxima,
    text: Tensor,
    video: Tensor,
    scale: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the similarity by text, video and scale: t i d, v j d and a scalar."""
    (t, i, d), (v, j, _) = text.shape, video.shape
    slope = maxima.text_slope * grad[:, None]  # t i v
    dmatch = slope.new_zeros(t, i, v, j).scatter_(3, maxima.text_index[..., None], slope[..., None])
    if video_mask is not None:  # the index of a video without a real part means nothing
        dmatch.masked_fill_(~video_mask, 0)
    slope = maxima.video_slope * grad[..., None]  # t v j
    if text_mask is not None:
        slope = slope * text_mask.any(1)[:, None, None]
    dmatch = dmatch.scatter_add_(1, maxima.video_index[:, None], slope[:, None]).view(t * i, v * j)
    dmatch = dmatch.to(text.dtype)  # bfloat16 rows are multiplied by bfloat16
    dtext = matmul(dmatch, video.view(v * j, d), grad.dtype).view(t, i, d)
    dvideo = matmul(dmatch.T, text.reshape(t * i, d), grad.dtype).view(v, j, d)
    return dtext, dvideo, (grad * maxima.scale_slope).sum()


def pairs_per_block(text: Tensor, video: Tensor, keep: bool) -> int:
    """Return how many pairs a block may have, so that the products of their parts stay within ELEMENTS."""
    return max(1, ELEMENTS // (text.shape[1] * video.shape[1]))


def _best(match: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Return the maximum and its lowest index; below any cosine if nothing is real."""
    best = (match if mask is None else match.masked_fill(~mask, -2.0)).max(dim)
    return best.values, best.indices


def _pool(best: Tensor, scale: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the softmax-weighted mean over `dim`, its derivative by each entry, and by the scale.

    The derivative by the scale is the variance under the weights.
    """
    logits = scale * best
    if mask is None:
        weight = logits.softmax(dim)
    else:
        weight = logits.masked_fill(~mask, torch.finfo(best.dtype).min).softmax(dim) * mask
    mean = (weight * best).sum(dim, keepdim=True)
    centred = best - mean
    variance = (weight * centred.square()).sum(dim)
    return mean.squeeze(dim), weight * (1 + scale * centred), variance
