"""Token-wise similarities of one block of pairs in plain torch, and their gradients.

Same functions as `discovla_kernels.token_similarity`, where the gradients are derived.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.blocks import matmul, sum_dtype

BLOCK = 1 << 19  # cosines of one block of pairs; about ten arrays of that size live at once


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Softmaxes over the cosines of a block, and the means they give.

    match: S, t i v j.  p, r_softmax: P and R, t i v j.  r, w: t i v 1.  q, u: t 1 v j.
    text_kappa: k of P, a number or t|1 i 1 1.
    """

    match: Tensor
    p: Tensor
    r_softmax: Tensor
    r: Tensor
    w: Tensor
    q: Tensor
    u: Tensor
    text_kappa: Tensor | float


def scores(
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    kappa: float,
    mode: str,
) -> Tensor:
    """Return similarities t v of unit rows, t i d and v j d; mode: ranking, training, or official padding."""
    x = _weights(text, video, text_mask, video_mask, kappa, mode)
    if mode == "ranking":
        return ((x.w * x.r).sum((1, 3)) + (x.u * x.q).sum((1, 3))) / 2
    return ((x.w * x.match).sum(1) * x.u[:, 0]).sum(-1)


def gradients(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    kappa: float,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of `scores` by text and video, t i d and v j d, float32 at least."""
    x = _weights(text, video, text_mask, video_mask, kappa, mode)
    if mode == "ranking":
        a = x.w * (1 + kappa * (x.r - (x.w * x.r).sum(1, keepdim=True))) / 2
        b = x.u * (1 + kappa * (x.q - (x.u * x.q).sum(3, keepdim=True))) / 2
        dmatch = torch.zeros_like(x.match)
    else:
        text_scores, video_scores = (x.match * x.u).sum(3, keepdim=True), (x.w * x.match).sum(1, keepdim=True)
        score = (video_scores * x.u).sum(3, keepdim=True)
        a, b = kappa * x.w * (text_scores - score), kappa * x.u * (video_scores - score)
        dmatch = x.w * x.u
    dmatch += a * x.p * (1 + x.text_kappa * (x.match - x.r))
    dmatch += b * x.r_softmax * (1 + kappa * (x.match - x.q))
    dmatch = (dmatch * grad[:, None, :, None]).flatten(2).flatten(0, 1).to(text.dtype)  # (t i) (v j)
    dtext = matmul(dmatch, video.flatten(0, 1), grad.dtype).view(text.shape)
    return dtext, matmul(dmatch.T, text.flatten(0, 1), grad.dtype).view(video.shape)


def pairs_per_block(text: Tensor, video: Tensor) -> int:
    """Return how many pairs a block may have, so that their cosines stay within BLOCK."""
    return max(1, BLOCK // (text.shape[1] * video.shape[1]))


def masked_softmax(logits: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Softmax over the entries where mask is true; all 0 if none is."""
    if mask is None:
        return logits.softmax(dim)
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(dim) * mask


def _weights(
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    kappa: float,
    mode: str,
) -> Weights:
    (t, i, _), (v, j, _) = text.shape, video.shape
    match = matmul(text.flatten(0, 1), video.flatten(0, 1).T, sum_dtype(text)).view(t, i, v, j)
    i_mask = None if text_mask is None else text_mask[:, :, None, None]
    w_mask, text_kappa = i_mask, kappa
    if mode == "official" and i_mask is not None:
        w_mask, text_kappa = None, kappa * i_mask
    p = masked_softmax(text_kappa * match, video_mask, 3)
    r_softmax = masked_softmax(kappa * match, i_mask, 1)
    r, q = (p * match).sum(3, keepdim=True), (r_softmax * match).sum(1, keepdim=True)
    w, u = masked_softmax(kappa * r, w_mask, 1), masked_softmax(kappa * q, video_mask, 3)
    return Weights(match=match, p=p, r_softmax=r_softmax, r=r, w=w, q=q, u=u, text_kappa=text_kappa)
