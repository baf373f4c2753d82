"""T2VParser's token-wise similarities: rows of a caption against rows of a video."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import (
    ELEMENTS,
    expect_shape,
    pair_blocks,
    product_dtype,
    select_rows,
    sum_dtype,
)
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.streamed import token_similarity as streamed
from discovla.ops.streamed.token_similarity import masked_softmax

Padding = Literal["masked", "official"]

KAPPA = 100.0
EPS = 1e-6  # smallest norm that a row is divided by


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Un-normalised rows of texts and videos.

    text: t i d.  video: v j d.
    text_mask, video_mask: t i and v j, bool, true on real rows; None for all.
    """

    text: Tensor
    video: Tensor
    text_mask: Tensor | None = None
    video_mask: Tensor | None = None


def token_similarity(inputs: TokenInputs, *, kappa: float = KAPPA, impl: Impl = "auto") -> Tensor:
    """The similarity T2VParser ranks with: softmax-weighted best matches from both sides, averaged.

    With S_ij = â_i · b̂_j of one caption and one video, and softmaxes over the named index:
    P = softmax_j(k S), r_i = sum_j P_ij S_ij, w = softmax_i(k r);
    R = softmax_i(k S), q_j = sum_i R_ij S_ij, u = softmax_j(k q);
    s = (sum_i w_i r_i + sum_j u_j q_j) / 2.

    Args:
        inputs: the rows; padding is in no softmax.  A side without a real row contributes 0.
        kappa: k.
        impl: reference (S of all pairs in memory), torch (in blocks of pairs, computed again in backward),
            triton, or auto: the reference if S of all pairs has at most 4 million entries, else torch.

    Returns:
        s: t v, before any temperature, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: Mug-STAN's frame-token similarity in T2VParser's released code; specification, section 5.2.
    """
    chosen, unit = choose_and_normalise("token_similarity", impl, inputs)
    if chosen == "reference":
        return token_similarity_reference(unit, kappa)
    return _token_similarity(unit.text, unit.video, unit.text_mask, unit.video_mask, kappa, "ranking", chosen)


def token_training_similarity(
    inputs: TokenInputs,
    *,
    kappa: float = KAPPA,
    padding: Padding = "masked",
    communication: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """The similarity T2VParser trains with: a bilinear form of convex combinations of both sides' rows.

    s = sum_ij w_i S_ij u_j, with S, w and u of `token_similarity`.  All is written in S: no row of a
    combination is formed, so nothing has the size t v i d.

    Args:
        inputs: the rows.  A pair with a side without a real row scores 0.
        kappa: k.
        padding: "masked" keeps padding out of every softmax; "official", as in the released code, lets
            padded text rows, which attend to the video's rows evenly, take part in w.
        communication: the combinations P b̂ of one pair attend to each other (scale 1/sqrt(d), no
            parameters) before they are compared, and so do those of R.
        impl: as in `token_similarity`; triton has no `communication`.

    Returns:
        s: t v, before any temperature, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: T2VParser's released code, training adapter; specification, section 5.1.
    """
    op = "token_communication" if communication else "token_training_similarity"
    chosen, unit = choose_and_normalise(op, impl, inputs)
    if chosen == "reference":
        return token_training_similarity_reference(unit, kappa, padding, communication)
    tensors = (unit.text, unit.video, unit.text_mask, unit.video_mask)
    if communication:
        return _Communication.apply(*tensors, kappa, padding)  # type: ignore[return-value]
    mode = "official" if padding == "official" else "training"
    return _token_similarity(*tensors, kappa, mode, chosen)


def choose_and_normalise(op: str, impl: Impl, inputs: TokenInputs) -> tuple[str, TokenInputs]:
    """Return the implementation that computes `op`, and unit rows in the dtype that it multiplies."""
    text, video = inputs.text, inputs.video
    expect_shape("video", video, (*video.shape[:2], text.shape[2]))
    expect_shape("text_mask", inputs.text_mask, tuple(text.shape[:2]))
    expect_shape("video_mask", inputs.video_mask, tuple(video.shape[:2]))
    operands = (text, video, inputs.text_mask, inputs.video_mask)
    small = text[..., 0].numel() * video[..., 0].numel() <= ELEMENTS
    chosen = choose(op, impl, text.device.type, small=small, operands=operands)
    pairs = len(text) * len(video) if chosen != "reference" and op != "token_communication" else 0
    dtype = product_dtype(text, pairs)
    text, video = (F.normalize(x.to(sum_dtype(text)), dim=-1, eps=EPS).to(dtype) for x in (text, video))
    return chosen, replace(inputs, text=text, video=video)


def token_similarity_reference(inputs: TokenInputs, kappa: float) -> Tensor:
    """The formula of `token_similarity` on unit rows, with S of all pairs in memory."""
    match, i_mask, j_mask = _match(inputs)
    r = (masked_softmax(kappa * match, j_mask, -1) * match).sum(-1, keepdim=True)  # t i v 1
    q = (masked_softmax(kappa * match, i_mask, 1) * match).sum(1, keepdim=True)  # t 1 v j
    text_side = (masked_softmax(kappa * r, i_mask, 1) * r).sum((1, 3))
    video_side = (masked_softmax(kappa * q, j_mask, -1) * q).sum((1, 3))
    return (text_side + video_side) / 2


def token_training_similarity_reference(
    inputs: TokenInputs, kappa: float, padding: Padding, communication: bool
) -> Tensor:
    """The formula of `token_training_similarity` on unit rows, with S of all pairs in memory."""
    match, i_mask, j_mask = _match(inputs)
    video_softmax = masked_softmax(kappa * match, i_mask, 1)  # R, t i v j
    logits = match
    if padding == "official" and i_mask is not None:
        logits, i_mask = match * i_mask, None
    text_softmax = masked_softmax(kappa * logits, j_mask, -1)  # P, t i v j
    if communication:
        text_softmax, video_softmax = _communicate(inputs, text_softmax, video_softmax, i_mask)
    w = masked_softmax(kappa * (text_softmax * match).sum(-1, keepdim=True), i_mask, 1)  # t i v 1
    u = masked_softmax(kappa * (video_softmax * match).sum(1, keepdim=True), j_mask, -1)  # t 1 v j
    return ((w * match).sum(1) * u[:, 0]).sum(-1)


def _match(inputs: TokenInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return S, t i v j (the layout of one matrix product), and both masks, broadcastable to it."""
    i_mask = None if inputs.text_mask is None else inputs.text_mask[:, :, None, None]
    return torch.einsum("tid,vjd->tivj", inputs.text, inputs.video), i_mask, inputs.video_mask


def _communicate(
    inputs: TokenInputs, text_softmax: Tensor, video_softmax: Tensor, i_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return P and R after self-attention among the combinations of rows that each defines."""
    p = text_softmax.transpose(1, 2)  # t v i j
    r = video_softmax.permute(0, 2, 3, 1)  # t v j i
    i_mask = None if i_mask is None else i_mask[:, None, None, :, 0, 0]
    j_mask = None if inputs.video_mask is None else inputs.video_mask[None, :, None]
    p = _self_attend(p, inputs.video[None], i_mask)
    r = _self_attend(r, inputs.text[:, None], j_mask)
    return p.transpose(1, 2), r.permute(0, 3, 1, 2)


def _self_attend(weights: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
    """Self-attention among the combinations C = weights rows, returned as new weights of the same rows.

    weights: t v i j.  rows: t|1 v|1 j d.  mask: the visible i, t|1 v|1 1 i.
    """
    scores = weights @ (rows @ rows.mT) @ weights.mT * rows.shape[-1] ** -0.5  # C Cᵀ / sqrt(d), t v i i
    return masked_softmax(scores, mask, -1) @ weights


def block_functions(impl: str) -> ModuleType:
    """Return the module that computes one block of pairs: `scores`, `gradients`, `pairs_per_block`."""
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
    """Either similarity of unit rows, block by block; mode: ranking, training, or official padding."""
    functions = block_functions(impl)
    out = text.new_empty(len(text), len(video), dtype=sum_dtype(text))
    for rows, columns in pair_blocks(len(text), len(video), functions.pairs_per_block(text, video)):
        masks = select_rows(text_mask, rows), select_rows(video_mask, columns)
        out[rows, columns] = functions.scores(text[rows], video[columns], *masks, kappa, mode)
    return out


@_token_similarity.register_fake
def _(text, video, text_mask, video_mask, kappa, mode, impl):
    return text.new_empty(len(text), len(video), dtype=sum_dtype(text))


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
    """Gradients by text and video, float32 at least; the cosines of each block are computed again."""
    functions = block_functions(impl)
    dtext, dvideo = (torch.zeros_like(x, dtype=sum_dtype(x)) for x in (text, video))
    for rows, columns in pair_blocks(len(text), len(video), functions.pairs_per_block(text, video)):
        masks = select_rows(text_mask, rows), select_rows(video_mask, columns)
        block = (grad[rows, columns], text[rows], video[columns], *masks)
        gradients = functions.gradients(*block, kappa, mode)
        dtext[rows] += gradients[0]
        dvideo[columns] += gradients[1]
    return dtext, dvideo


@_token_similarity_backward.register_fake
def _(grad, text, video, *rest):
    return torch.empty_like(text, dtype=sum_dtype(text)), torch.empty_like(video, dtype=sum_dtype(video))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.kappa, ctx.mode, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    text, video, *masks = ctx.saved_tensors
    tensors = (grad.contiguous(), text, video, *masks)
    dtext, dvideo = _token_similarity_backward(*tensors, ctx.kappa, ctx.mode, ctx.impl)
    return dtext.to(text.dtype), dvideo.to(video.dtype), None, None, None, None, None


_token_similarity.register_autograd(_backward, setup_context=_setup_context)


class _Communication(torch.autograd.Function):
    """`token_training_similarity` with communication, block by block; backward recomputes each block.

    Autograd differentiates a block, which a `torch.library` op cannot do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        text: Tensor,
        video: Tensor,
        text_mask: Tensor | None,
        video_mask: Tensor | None,
        kappa: float,
        padding: Padding,
    ) -> Tensor:
        ctx.save_for_backward(text, video, text_mask, video_mask)
        ctx.kappa, ctx.padding = kappa, padding
        scores = text.new_empty(len(text), len(video))  # t v
        for rows, columns in pair_blocks(len(text), len(video), streamed.pairs_per_block(text, video)):
            block = _select(text[rows], video[columns], text_mask, video_mask, rows, columns)
            scores[rows, columns] = token_training_similarity_reference(block, kappa, padding, True)
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        text, video, text_mask, video_mask = ctx.saved_tensors
        dtext, dvideo = torch.zeros_like(text), torch.zeros_like(video)
        for rows, columns in pair_blocks(len(text), len(video), streamed.pairs_per_block(text, video)):
            leaves = text[rows].detach().requires_grad_(), video[columns].detach().requires_grad_()
            block = _select(leaves[0], leaves[1], text_mask, video_mask, rows, columns)
            with torch.enable_grad():
                scores = token_training_similarity_reference(block, ctx.kappa, ctx.padding, True)
            gradients = torch.autograd.grad(scores, leaves, grads[0][rows, columns])
            dtext[rows] += gradients[0]
            dvideo[columns] += gradients[1]
        return dtext, dvideo, None, None, None, None


def _select(
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    rows: slice,
    columns: slice,
) -> TokenInputs:
    """Inputs of one block, of which text and video are already selected."""
    return TokenInputs(
        text=text,
        video=video,
        text_mask=select_rows(text_mask, rows),
        video_mask=select_rows(video_mask, columns),
    )
