"""Late interaction of one block of pairs in plain torch, and its gradients.

Same functions as `discovla_kernels.late_interaction`.
"""

from __future__ import annotations

from torch import Tensor

from discovla.ops.blocks import matmul, sum_dtype

BLOCK = 1 << 20  # cosines of one block of pairs; about four arrays of that size live at once


def scores(text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None) -> Tensor:
    """Return sum_i max_j of the cosines, t v, of unit rows t i d and v j d."""
    best, _, _ = _best(text, video, text_mask, video_mask)
    return best.sum(1)


def gradients(
    grad: Tensor, text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `scores` by the rows, t i d and v j d."""
    (t, i, _), (v, j, _) = text.shape, video.shape
    _, index, real = _best(text, video, text_mask, video_mask)
    slope = grad.new_zeros(t, i, v, j).scatter_(3, index[..., None], (grad[:, None] * real)[..., None])
    slope = slope.flatten(2).flatten(0, 1).to(text.dtype)  # (t i) (v j)
    dtext = matmul(slope, video.flatten(0, 1), grad.dtype).view(text.shape)
    return dtext, matmul(slope.T, text.flatten(0, 1), grad.dtype).view(video.shape)


def pairs_per_block(text: Tensor, video: Tensor) -> int:
    """Return how many pairs a block may have, so that their cosines stay within BLOCK."""
    return max(1, BLOCK // (text.shape[1] * video.shape[1]))


def _best(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return every text row's best match, 0 without one; its lowest index; whether there is one: t i v."""
    (t, i, _), (v, j, _) = text.shape, video.shape
    match = matmul(text.flatten(0, 1), video.flatten(0, 1).T, sum_dtype(text)).view(t, i, v, j)
    best, index = (match if video_mask is None else match.masked_fill(~video_mask, -2.0)).max(3)
    real = best > -2.0 if text_mask is None else (best > -2.0) & text_mask[..., None]
    return best * real, index, real
