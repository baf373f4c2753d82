"""T2VParser's token-wise similarities: rows of a caption against rows of a video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, multiplied_dtype, pair_blocks, wide
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.frame_similarity import part
from discovla.ops.streamed import token_similarity as streamed
from discovla.ops.streamed.token_similarity import masked_softmax

Padding = Literal["masked", "official"]

KAPPA = 100.0
EPS = 1e-6  # below it a norm counts as that


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
        impl: reference, torch: the same in blocks of pairs, which are computed again in backward, triton (no
            `communication`), or auto, which is torch.

    Returns:
        s: t v, before any temperature, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: T2VParser's released code, training adapter; specification, section 5.1.
    """
    op = "token_communication" if communication else "token_training_similarity"
    chosen, unit = chosen_and_unit(op, impl, inputs)
    if chosen == "reference":
        return token_training_similarity_reference(unit, kappa, padding, communication)
    masks = (unit.text_mask, unit.video_mask)
    if communication:
        return _Communication.apply(unit.text, unit.video, masks, (kappa, padding))  # type: ignore[return-value]
    mode = "official" if padding == "official" else "training"
    return _token_similarity(unit.text, unit.video, *masks, kappa, mode, chosen)


def token_similarity(inputs: TokenInputs, *, kappa: float = KAPPA, impl: Impl = "auto") -> Tensor:
    """The similarity T2VParser ranks with: softmax-weighted best matches from both sides, averaged.

    With S, P, R, r, q, w, u as in `token_training_similarity`:  s = (sum_i w_i r_i + sum_j u_j q_j) / 2.

    Args:
        inputs: the rows; padding is in no softmax.  A side without a real row contributes 0.
        kappa: k.
        impl: reference, torch: the same in blocks of pairs, which are computed again in backward, triton, or
            auto, which is torch.

    Returns:
        s: t v, before any temperature, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: Mug-STAN's frame-token similarity in T2VParser's released code; specification, section 5.2.
    """
    chosen, unit = chosen_and_unit("token_similarity", impl, inputs)
    if chosen == "reference":
        return token_similarity_reference(unit, kappa)
    masks = (unit.text_mask, unit.video_mask)
    return _token_similarity(unit.text, unit.video, *masks, kappa, "ranking", chosen)


def chosen_and_unit(op: str, impl: Impl, inputs: TokenInputs) -> tuple[str, TokenInputs]:
    """The implementation that serves `op`, and the inputs with unit rows, in what that one multiplies."""
    text, video, masks = inputs.text, inputs.video, (inputs.text_mask, inputs.video_mask)
    expect_shape("video", video, (*video.shape[:2], text.shape[2]))
    expect_shape("text_mask", masks[0], tuple(text.shape[:2]))
    expect_shape("video_mask", masks[1], tuple(video.shape[:2]))
    chosen = choose(op, impl, text.device.type, operands=(text, video, *masks))
    pairs = len(text) * len(video) if chosen != "reference" and op != "token_communication" else 0
    multiplied = multiplied_dtype(text, pairs)
    text, video = (F.normalize(x.to(wide(text)), dim=-1, eps=EPS).to(multiplied) for x in (text, video))
    return chosen, replace(inputs, text=text, video=video)


def token_training_similarity_reference(
    inputs: TokenInputs, kappa: float, padding: Padding, communication: bool
) -> Tensor:
    """The formula of `token_training_similarity` on unit rows, with S of all pairs in memory."""
    match, i_mask, j_mask = _match(inputs)
    of_video = masked_softmax(kappa * match, i_mask, 1)  # R, t i v j
    seen = match
    if padding == "official" and i_mask is not None:
        seen, i_mask = match * i_mask, None
    of_text = masked_softmax(kappa * seen, j_mask, -1)  # P, t i v j
    if communication:
        of_text, of_video = _communicate(inputs, of_text, of_video, i_mask)
    w = masked_softmax(kappa * (of_text * match).sum(-1, keepdim=True), i_mask, 1)  # t i v 1
    u = masked_softmax(kappa * (of_video * match).sum(1, keepdim=True), j_mask, -1)  # t 1 v j
    return ((w * match).sum(1) * u[:, 0]).sum(-1)


def token_similarity_reference(inputs: TokenInputs, kappa: float) -> Tensor:
    """The formula of `token_similarity` on unit rows, with S of all pairs in memory."""
    match, i_mask, j_mask = _match(inputs)
    r = (masked_softmax(kappa * match, j_mask, -1) * match).sum(-1, keepdim=True)  # t i v 1
    q = (masked_softmax(kappa * match, i_mask, 1) * match).sum(1, keepdim=True)  # t 1 v j
    of_text = (masked_softmax(kappa * r, i_mask, 1) * r).sum((1, 3))
    of_video = (masked_softmax(kappa * q, j_mask, -1) * q).sum((1, 3))
    return (of_text + of_video) / 2


def _match(inputs: TokenInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """S, t i v j (the layout one matrix product gives), and both masks to go with it."""
    i_mask = None if inputs.text_mask is None else inputs.text_mask[:, :, None, None]
    j_mask = None if inputs.video_mask is None else inputs.video_mask
    return torch.einsum("tid,vjd->tivj", inputs.text, inputs.video), i_mask, j_mask


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
    return masked_softmax(scores, mask, -1) @ weights


def _tiles(impl: str) -> ModuleType:
    return kernel("token_similarity") if impl == "triton" else streamed


@torch.library.custom_op("discovla::token_similarity_streamed", mutates_args=())
def _token_similarity(
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    kappa: float,
    mode: str,
    impl: str,
) -> Tensor:
    """The similarity that `mode` names (ranking, training, official) of unit rows, block by block."""
    tiles = _tiles(impl)
    out = text.new_empty(len(text), len(video), dtype=wide(text))
    for rows, across in pair_blocks(len(text), len(video), tiles.pairs_per_block(text, video)):
        for columns in across:
            masks = part(text_mask, rows), part(video_mask, columns)
            out[rows, columns] = tiles.scores(text[rows], video[columns], masks, kappa, mode)
    return out


@_token_similarity.register_fake
def _(text, video, text_mask, video_mask, kappa, mode, impl):
    return text.new_empty(len(text), len(video), dtype=wide(text))


@torch.library.custom_op("discovla::token_similarity_streamed_backward", mutates_args=())
def _token_similarity_backward(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    kappa: float,
    mode: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients by text and video, float32 at least, each block's cosines made again."""
    tiles = _tiles(impl)
    text_grad, video_grad = (torch.zeros_like(x, dtype=wide(x)) for x in (text, video))
    for rows, across in pair_blocks(len(text), len(video), tiles.pairs_per_block(text, video)):
        for columns in across:
            block, masks = (text[rows], video[columns]), (part(text_mask, rows), part(video_mask, columns))
            of_text, of_video = tiles.gradients(grad[rows, columns], *block, masks, kappa, mode)
            text_grad[rows] += of_text
            video_grad[columns] += of_video
    return text_grad, video_grad


@_token_similarity_backward.register_fake
def _(grad, text, video, *rest):
    return torch.empty_like(text, dtype=wide(text)), torch.empty_like(video, dtype=wide(video))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.kappa, ctx.mode, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    how = (ctx.kappa, ctx.mode, ctx.impl)
    grads = _token_similarity_backward(grad.contiguous(), *ctx.saved_tensors, *how)
    kept = (x.to(like.dtype) for x, like in zip(grads, ctx.saved_tensors, strict=False))
    return *kept, None, None, None, None, None


_token_similarity.register_autograd(_differentiate, setup_context=_keep)


class _Communication(torch.autograd.Function):
    """Training scores with communication, block by block; backward computes each block again.

    Its derivative is left to autograd, inside a block, which a `torch.library` op cannot do.
    """

    @staticmethod
    def forward(ctx: Any, text: Tensor, video: Tensor, masks: Any, how: tuple[float, Padding]) -> Tensor:
        ctx.save_for_backward(text, video)
        ctx.masks, ctx.how = masks, how
        scores = text.new_empty(len(text), len(video))  # t v
        for rows, columns in _cut(text, video):
            block = _block(text[rows], video[columns], masks, rows, columns)
            scores[rows, columns] = token_training_similarity_reference(block, *how, communication=True)
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        text, video = ctx.saved_tensors
        text_grad, video_grad = torch.zeros_like(text), torch.zeros_like(video)
        for rows, columns in _cut(text, video):
            leaves = text[rows].detach().requires_grad_(), video[columns].detach().requires_grad_()
            block = _block(*leaves, ctx.masks, rows, columns)
            with torch.enable_grad():
                scores = token_training_similarity_reference(block, *ctx.how, communication=True)
            of_text, of_video = torch.autograd.grad(scores, leaves, grads[0][rows, columns])
            text_grad[rows] += of_text
            video_grad[columns] += of_video
        return text_grad, video_grad, None, None


def _cut(text: Tensor, video: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of texts and videos."""
    for rows, across in pair_blocks(len(text), len(video), streamed.pairs_per_block(text, video)):
        for columns in across:
            yield rows, columns


def _block(text: Tensor, video: Tensor, masks: Any, rows: slice, columns: slice) -> TokenInputs:
    """Rows of a block with their masks."""
    text_mask, video_mask = part(masks[0], rows), part(masks[1], columns)
    return TokenInputs(text=text, video=video, text_mask=text_mask, video_mask=video_mask)
