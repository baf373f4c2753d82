"""The frame similarity of a block of pairs in plain torch, with what its backward needs.

The same three functions as `discovla_kernels.frame_similarity`, which the op streams over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, product, wide

Masks = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Maxima:
    """Best matches of a block; the last four only for backward.

    similarity: t v.  text_index, text_slope: t i v, where a part has its best match and the derivative of the
    pooled similarity by it.  video_index, video_slope: t v j.  scale_slope: t v, the derivative by the scale.
    """

    similarity: Tensor
    text_index: Tensor
    text_slope: Tensor
    video_index: Tensor
    video_slope: Tensor
    scale_slope: Tensor


def maxima(text: Tensor, video: Tensor, scale: Tensor, masks: Masks, keep: bool) -> Maxima:
    """Similarities of unit rows, t i d and v j d.  `keep` is for kernels; here all is at hand anyway."""
    (t, i, _), (v, j, _) = text.shape, video.shape
    text_mask, video_mask = (None if mask is None else mask[..., None] for mask in masks)  # t i 1, v j 1
    match = product(text.flatten(0, 1), video.flatten(0, 1).T, wide(text)).view(t, i, v, j)
    text_best, text_index = _best(match, None if video_mask is None else video_mask[..., 0], 3)  # t i v
    video_best, video_index = _best(match, None if text_mask is None else text_mask[..., None], 1)  # t v j
    text_mean, text_slope, text_variance = _pool(text_best, scale, text_mask, 1)
    video_mean, video_slope, video_variance = _pool(
        video_best, scale, None if video_mask is None else video_mask[..., 0], 2
    )
    return Maxima(
        similarity=(text_mean + video_mean) / 2,
        text_index=text_index,
        text_slope=text_slope / 2,
        video_index=video_index,
        video_slope=video_slope / 2,
        scale_slope=(text_variance + video_variance) / 2,
    )


def gradients(
    grad: Tensor, found: Maxima, text: Tensor, video: Tensor, scale: Tensor, masks: Masks
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `maxima`'s similarity: t i d, v j d and a scalar."""
    (t, i, d), (v, j, _) = text.shape, video.shape
    slope = found.text_slope * grad[:, None]  # t i v
    dense = slope.new_zeros(t, i, v, j).scatter_(3, found.text_index[..., None], slope[..., None])
    if masks[1] is not None:  # a video without a real part has its best match nowhere
        dense.masked_fill_(~masks[1], 0)
    slope = found.video_slope * grad[..., None]  # t v j
    if masks[0] is not None:
        slope = slope * masks[0].any(1)[:, None, None]
    dense = dense.scatter_add_(1, found.video_index[:, None], slope[:, None]).view(t * i, v * j)
    dense = dense.to(text.dtype)  # where rows are bfloat16, so is what they are multiplied by
    text_grad = product(dense, video.view(v * j, d), grad.dtype).view(t, i, d)
    video_grad = product(dense.T, text.reshape(t * i, d), grad.dtype).view(v, j, d)
    return text_grad, video_grad, (grad * found.scale_slope).sum()


def pairs_per_block(text: Tensor, video: Tensor, keep: bool) -> int:
    """How many pairs one block may have, so that the products of their parts stay ELEMENTS."""
    return max(1, ELEMENTS // (text.shape[1] * video.shape[1]))


def _best(match: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum and the lowest index that has it; below any cosine where nothing is real."""
    best = (match if mask is None else match.masked_fill(~mask, -2.0)).max(dim)
    return best.values, best.indices


def _pool(best: Tensor, scale: Tensor, mask: Tensor | None, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax-weighted mean over `dim`, its derivative by each entry, and by the scale (the variance)."""
    logits = scale * best
    if mask is None:
        weight = logits.softmax(dim)
    else:
        weight = logits.masked_fill(~mask, torch.finfo(best.dtype).min).softmax(dim) * mask
    mean = (weight * best).sum(dim, keepdim=True)
    centred = best - mean
    variance = (weight * centred.square()).sum(dim)
    return mean.squeeze(dim), weight * (1 + scale * centred), variance
