"""T2VParser's token-wise similarities: rows of a caption against rows of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.dispatch import Impl, choose

Padding = Literal["masked", "official"]

KAPPA = 100.0
EPS = 1e-6  # below it a norm counts as that
BLOCK = 1 << 19  # cosines of one block of pairs; about ten arrays of that size live at once


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """The rows that are compared, un-normalised.

    text: t i d.  video: v j d.
    text_mask, video_mask: t i and v j, bool, true on real rows; None where all are.
    """

    text: Tensor
    video: Tensor
    text_mask: Tensor | None = None
    video_mask: Tensor | None = None


Score = Callable[[TokenInputs], Tensor]


def token_training_similarity(
    inputs: TokenInputs,
    *,
    kappa: float = KAPPA,
    padding: Padding = "masked",
    communication: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """The similarity T2VParser is trained with: a bilinear form of convex combinations of both sides' rows.

    With S_ij = â_i · b̂_j of one caption and one video, and softmaxes over the named index:
    P = softmax_j(k S), r_i = sum_j P_ij S_ij, w = softmax_i(k r);
    R = softmax_i(k S), q_j = sum_i R_ij S_ij, u = softmax_j(k q);  s = sum_ij w_i S_ij u_j.
    Everything is written in S: no row of a combination is ever formed, so nothing has the size t v i d.

    Args:
        inputs: the rows.  A pair with a side without a real row scores 0.
        kappa: k.
        padding: "masked" keeps padding out of every softmax; "official" lets padded text rows, which see the
            video's rows evenly, take part in w, as the released code does.
        communication: the combinations P b̂ of one pair attend to each other (scale 1/sqrt(d), no
            parameters) before they are compared, and so do those of R.
        impl: reference, or torch: the same in blocks of pairs, which are computed again in backward.

    Returns:
        s: t v, before any temperature, float32 at least.

    Source: T2VParser's released code, training adapter; specification, section 5.1.
    """
    chosen = choose("token_training_similarity", impl, inputs.text.device.type)

    def score(block: TokenInputs) -> Tensor:
        return token_training_similarity_reference(block, kappa, padding, communication)

    return score(_unit(inputs)) if chosen == "reference" else _in_blocks(score, _unit(inputs))


def token_similarity(inputs: TokenInputs, *, kappa: float = KAPPA, impl: Impl = "auto") -> Tensor:
    """The similarity T2VParser ranks with: softmax-weighted best matches from both sides, averaged.

    With S, P, R, r, q, w, u as in `token_training_similarity`:  s = (sum_i w_i r_i + sum_j u_j q_j) / 2.

    Args:
        inputs: the rows; padding is in no softmax.  A side without a real row contributes 0.
        kappa: k.
        impl: reference, or torch: the same in blocks of pairs.

    Returns:
        s: t v, before any temperature, float32 at least.

    Source: Mug-STAN's frame-token similarity in T2VParser's released code; specification, section 5.2.
    """
    chosen = choose("token_similarity", impl, inputs.text.device.type)

    def score(block: TokenInputs) -> Tensor:
        return token_similarity_reference(block, kappa)

    return score(_unit(inputs)) if chosen == "reference" else _in_blocks(score, _unit(inputs))


def token_training_similarity_reference(
    inputs: TokenInputs, kappa: float, padding: Padding, communication: bool
) -> Tensor:
    """The formula of `token_training_similarity` on unit rows, with S of all pairs in memory."""
    match, i_mask, j_mask = _match(inputs)
    of_video = _softmax(kappa * match, i_mask, 1)  # R, t i v j
    seen = match
    if padding == "official" and i_mask is not None:
        seen, i_mask = match * i_mask, None
    of_text = _softmax(kappa * seen, j_mask, -1)  # P, t i v j
    if communication:
        of_text, of_video = _communicate(inputs, of_text, of_video, i_mask)
    w = _softmax(kappa * (of_text * match).sum(-1, keepdim=True), i_mask, 1)  # t i v 1
    u = _softmax(kappa * (of_video * match).sum(1, keepdim=True), j_mask, -1)  # t 1 v j
    return ((w * match).sum(1) * u[:, 0]).sum(-1)


def token_similarity_reference(inputs: TokenInputs, kappa: float) -> Tensor:
    """The formula of `token_similarity` on unit rows, with S of all pairs in memory."""
    match, i_mask, j_mask = _match(inputs)
    r = (_softmax(kappa * match, j_mask, -1) * match).sum(-1, keepdim=True)  # t i v 1
    q = (_softmax(kappa * match, i_mask, 1) * match).sum(1, keepdim=True)  # t 1 v j
    of_text = (_softmax(kappa * r, i_mask, 1) * r).sum((1, 3))
    of_video = (_softmax(kappa * q, j_mask, -1) * q).sum((1, 3))
    return (of_text + of_video) / 2


def _match(inputs: TokenInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """S, t i v j (the layout one matrix product gives), and both masks to go with it."""
    i_mask = None if inputs.text_mask is None else inputs.text_mask[:, :, None, None]
    j_mask = None if inputs.video_mask is None else inputs.video_mask
    return torch.einsum("tid,vjd->tivj", inputs.text, inputs.video), i_mask, j_mask


def _softmax(logits: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Softmax over the entries where mask is true; all 0 where none is."""
    if mask is None:
        return logits.softmax(dim)
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(dim) * mask


def _communicate(
    inputs: TokenInputs, of_text: Tensor, of_video: Tensor, i_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """P and R after self-attention among the combinations that each of them makes."""
    of_text = of_text.transpose(1, 2)  # t v i j
    of_video = of_video.permute(0, 2, 3, 1)  # t v j i
    i_mask = None if i_mask is None else i_mask[:, None, None, :, 0, 0]
    j_mask = None if inputs.video_mask is None else inputs.video_mask[None, :, None]
    of_text = _attend(of_text, inputs.video[None], i_mask)
    of_video = _attend(of_video, inputs.text[:, None], j_mask)
    return of_text.transpose(1, 2), of_video.permute(0, 3, 1, 2)


def _attend(weights: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
    """Self-attention among the combinations C = weights rows, as new weights of the same rows.

    weights: t v i j.  rows: t|1 v|1 j d.  mask: the i that may be seen, t|1 v|1 1 i.
    """
    scores = weights @ (rows @ rows.mT) @ weights.mT * rows.shape[-1] ** -0.5  # C Cᵀ / sqrt(d), t v i i
    return _softmax(scores, mask, -1) @ weights


def _unit(inputs: TokenInputs) -> TokenInputs:
    """The same with unit rows, float32 at least."""
    work = torch.promote_types(inputs.text.dtype, torch.float32)
    text, video = (F.normalize(x.to(work), dim=-1, eps=EPS) for x in (inputs.text, inputs.video))
    return replace(inputs, text=text, video=video)


class _Blocks(torch.autograd.Function):
    """A score of all pairs, block by block of texts and videos; backward computes each block again."""

    @staticmethod
    def forward(ctx: Any, text: Tensor, video: Tensor, inputs: TokenInputs, score: Score) -> Tensor:
        ctx.save_for_backward(text, video)
        ctx.score, ctx.masks = score, (inputs.text_mask, inputs.video_mask)
        scores = text.new_zeros(len(text), len(video))  # t v
        for rows, columns in _cut(inputs):
            scores[rows, columns] = score(_block(inputs, rows, columns))
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        text, video = ctx.saved_tensors
        inputs = TokenInputs(text=text, video=video, text_mask=ctx.masks[0], video_mask=ctx.masks[1])
        text_grad, video_grad = torch.zeros_like(text), torch.zeros_like(video)
        for rows, columns in _cut(inputs):
            block = _block(inputs, rows, columns)
            leaves = block.text.detach().requires_grad_(), block.video.detach().requires_grad_()
            with torch.enable_grad():
                scores = ctx.score(replace(block, text=leaves[0], video=leaves[1]))
            of_text, of_video = torch.autograd.grad(scores, leaves, grads[0][rows, columns])
            text_grad[rows] += of_text
            video_grad[columns] += of_video
        return text_grad, video_grad, None, None


def _in_blocks(score: Score, inputs: TokenInputs) -> Tensor:
    return _Blocks.apply(inputs.text, inputs.video, inputs, score)  # type: ignore[return-value]


def _cut(inputs: TokenInputs) -> Iterator[tuple[slice, slice]]:
    """Blocks of texts and videos with at most BLOCK cosines, and at least one pair, in each."""
    texts, videos = len(inputs.text), len(inputs.video)
    pairs = max(1, BLOCK // (inputs.text.shape[1] * inputs.video.shape[1]))
    columns = max(1, min(videos, pairs))
    rows = max(1, pairs // columns)
    for row in range(0, texts, rows):
        for column in range(0, videos, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _block(inputs: TokenInputs, rows: slice, columns: slice) -> TokenInputs:
    return TokenInputs(
        text=inputs.text[rows],
        video=inputs.video[columns],
        text_mask=None if inputs.text_mask is None else inputs.text_mask[rows],
        video_mask=None if inputs.video_mask is None else inputs.video_mask[columns],
    )
