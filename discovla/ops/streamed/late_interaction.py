"""Weighted sums of best matches of a block of pairs in plain torch, and their derivative.

The same functions as `discovla_kernels.late_interaction`, which has the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.blocks import product, wide

BLOCK = 1 << 20  # cosines of one block of pairs; about four arrays of that size live at once
Masks = tuple[Tensor | None, Tensor | None]
Best = tuple[Tensor, Tensor, Tensor]


def scores(
    text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor | None, masks: Masks
) -> Tensor:
    """t v of unit rows, t i d and v j d, with weights t i and v j; without the latter one way only."""
    match = _match(text, video)
    out = (text_weight[..., None] * _of_text(match, masks)[0]).sum(1)
    if video_weight is not None:
        out += (video_weight * _of_video(match, masks)[0]).sum(-1)
    return out


def gradients(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    masks: Masks,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `scores` by the rows, t i d and v j d, and by both weights, t i and v j."""
    match = _match(text, video)
    best, index, found = _of_text(match, masks)  # t i v
    slope = torch.zeros_like(match)
    share = text_weight[..., None] * grad[:, None] * found
    slope.scatter_(3, index[..., None], share[..., None])
    text_weight_grad = (grad[:, None] * best).sum(2)
    video_weight_grad = grad.new_zeros(video.shape[:2])
    if video_weight is not None:
        best, index, found = _of_video(match, masks)  # t v j
        share = video_weight * grad[..., None] * found
        slope.scatter_add_(1, index[:, None], share[:, None])
        video_weight_grad = (grad[..., None] * best).sum(0)
    slope = slope.flatten(2).flatten(0, 1).to(text.dtype)  # (t i) (v j)
    text_grad = product(slope, video.flatten(0, 1), grad.dtype).view(text.shape)
    video_grad = product(slope.T, text.flatten(0, 1), grad.dtype).view(video.shape)
    return text_grad, video_grad, text_weight_grad, video_weight_grad


def pairs_per_block(text: Tensor, video: Tensor) -> int:
    """How many pairs one block may have, so that their cosines stay within BLOCK."""
    return max(1, BLOCK // (text.shape[1] * video.shape[1]))


def _match(text: Tensor, video: Tensor) -> Tensor:
    """t i v j."""
    (t, i, _), (v, j, _) = text.shape, video.shape
    return product(text.flatten(0, 1), video.flatten(0, 1).T, wide(text)).view(t, i, v, j)


def _of_text(match: Tensor, masks: Masks) -> Best:
    return _best(match, 3, masks[1], None if masks[0] is None else masks[0][..., None])


def _of_video(match: Tensor, masks: Masks) -> Best:
    return _best(match, 1, None if masks[0] is None else masks[0][:, :, None, None], masks[1])


def _best(match: Tensor, dim: int, among: Tensor | None, mine: Tensor | None) -> Best:
    """Largest real entry along `dim`, its lowest index, and whether it counts; 0 where it does not."""
    best, index = (match if among is None else match.masked_fill(~among, -2.0)).max(dim)
    found = best > -2.0 if mine is None else (best > -2.0) & mine
    return best * found, index, found
