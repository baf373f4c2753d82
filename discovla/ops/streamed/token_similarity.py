"""Token-wise similarities of a block of pairs in plain torch, and their derivative.

The same functions as `discovla_kernels.token_similarity`, which has the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.blocks import product, wide

BLOCK = 1 << 19  # cosines of one block of pairs; about ten arrays of that size live at once
Masks = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Softmaxes over the cosines of a block, and what they average.

    match: S, t i v j.  of_text, of_video: P and R, t i v j.  r, w: t i v 1.  q, u: t 1 v j.
    k_row: k of P, a number or t|1 i 1 1.
    """

    match: Tensor
    of_text: Tensor
    of_video: Tensor
    r: Tensor
    w: Tensor
    q: Tensor
    u: Tensor
    k_row: Tensor | float


def scores(text: Tensor, video: Tensor, masks: Masks, kappa: float, mode: str) -> Tensor:
    """t v of unit rows, t i d and v j d; mode: ranking, training, or official (padding sees and is seen)."""
    x = _weights(text, video, masks, kappa, mode)
    if mode == "ranking":
        return ((x.w * x.r).sum((1, 3)) + (x.u * x.q).sum((1, 3))) / 2
    return ((x.w * x.match).sum(1) * x.u[:, 0]).sum(-1)


def gradients(
    grad: Tensor, text: Tensor, video: Tensor, masks: Masks, kappa: float, mode: str
) -> tuple[Tensor, Tensor]:
    """Gradients of `scores`: t i d and v j d, float32 at least."""
    x = _weights(text, video, masks, kappa, mode)
    if mode == "ranking":
        a = x.w * (1 + kappa * (x.r - (x.w * x.r).sum(1, keepdim=True))) / 2
        b = x.u * (1 + kappa * (x.q - (x.u * x.q).sum(3, keepdim=True))) / 2
        slope = torch.zeros_like(x.match)
    else:
        of_text, of_video = (x.match * x.u).sum(3, keepdim=True), (x.w * x.match).sum(1, keepdim=True)
        score = (of_video * x.u).sum(3, keepdim=True)
        a, b = kappa * x.w * (of_text - score), kappa * x.u * (of_video - score)
        slope = x.w * x.u
    slope += a * x.of_text * (1 + x.k_row * (x.match - x.r))
    slope += b * x.of_video * (1 + kappa * (x.match - x.q))
    slope = (slope * grad[:, None, :, None]).flatten(2).flatten(0, 1).to(text.dtype)  # (t i) (v j)
    text_grad = product(slope, video.flatten(0, 1), grad.dtype).view(text.shape)
    return text_grad, product(slope.T, text.flatten(0, 1), grad.dtype).view(video.shape)


def pairs_per_block(text: Tensor, video: Tensor) -> int:
    """How many pairs one block may have, so that their cosines stay within BLOCK."""
    return max(1, BLOCK // (text.shape[1] * video.shape[1]))


def masked_softmax(logits: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Softmax over the entries where mask is true; all 0 where none is."""
    if mask is None:
        return logits.softmax(dim)
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(dim) * mask


def _weights(text: Tensor, video: Tensor, masks: Masks, kappa: float, mode: str) -> Weights:
    (t, i, _), (v, j, _) = text.shape, video.shape
    match = product(text.flatten(0, 1), video.flatten(0, 1).T, wide(text)).view(t, i, v, j)
    i_mask = None if masks[0] is None else masks[0][:, :, None, None]
    i_seen, k_row = i_mask, kappa
    if mode == "official" and i_mask is not None:
        i_seen, k_row = None, kappa * i_mask
    of_text = masked_softmax(k_row * match, masks[1], 3)
    of_video = masked_softmax(kappa * match, i_mask, 1)
    r, q = (of_text * match).sum(3, keepdim=True), (of_video * match).sum(1, keepdim=True)
    w, u = masked_softmax(kappa * r, i_seen, 1), masked_softmax(kappa * q, masks[1], 3)
    return Weights(match=match, of_text=of_text, of_video=of_video, r=r, w=w, q=q, u=u, k_row=k_row)
