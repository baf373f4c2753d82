"""Pairwise sigmoid loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from discovla.ops.blocks import ELEMENTS, expect_shape, matmul, product_dtype, row_strips, sum_dtype
from discovla.ops.column_shard import ColumnShard
from discovla.ops.dispatch import Impl, choose, compiled
from discovla.ops.info_nce import cosine_similarity
from discovla.ops.streamed.chunks import FACTOR, power_of_four


def sigmoid_loss(
    text: Tensor,
    video: Tensor,
    logit_scale: Tensor,
    bias: Tensor,
    *,
    ignore: Tensor | None = None,
    columns: ColumnShard | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """-1/n sum_ij log sigmoid(z_ij (s t̂_i·v̂_j + bias)), with z = 1 for the n matching pairs, else -1.

    No sum over pairs comes before the loss, so in blocks the gradients are computed beside it, once.

    Args:
        text, video: n d, un-normalised; row i of one belongs to row i of the other.
        logit_scale: scalar, s (not its logarithm).  bias: scalar.
        ignore: n n, bool, pairs that are left out.
        columns: given if each process has its own videos; video v d and ignore n v are then of this process.
        impl: reference (all logits in memory), torch (in blocks of pairs), chunks (in larger blocks, all but
            the products fused by torch.compile), or auto: torch.

    Returns:
        Scalar, float32 at least, the same on all processes.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: SigLIP (arXiv 2303.15343), algorithm 1; in blocks as in siglip-kernel (Apache-2.0).
    """
    expect_shape("video", video, (len(text if columns is None else video), text.shape[1]))
    expect_shape("ignore", ignore, (len(text), len(video)))
    chosen = choose("sigmoid_loss", impl, text.device.type, operands=(text, video, ignore))
    if chosen == "reference":
        logits = logit_scale * cosine_similarity(text, video)
        return sigmoid_loss_of_logits(logits, bias, ignore, columns)
    dtype, product = sum_dtype(text), product_dtype(text, len(text) * len(video))
    rows = ((x / x.norm(dim=-1, keepdim=True)).to(product) for x in (text.to(dtype), video.to(dtype)))
    first = 0 if columns is None else columns.first_text
    total = _Blocks.apply(*rows, logit_scale.to(dtype), bias.to(dtype), ignore, first, chosen)
    return total if columns is None else columns.all_reduce(total)[0]


def sigmoid_loss_of_logits(
    logits: Tensor, bias: Tensor, ignore: Tensor | None = None, columns: ColumnShard | None = None
) -> Tensor:
    """`sigmoid_loss` of logits s t̂_i·v̂_j in memory: n n, or n v with `columns`."""
    first = 0 if columns is None else columns.first_text
    matches = torch.zeros_like(logits, dtype=torch.bool)
    matches.diagonal(-first).fill_(True)
    logits = logits + bias.to(logits.dtype)
    loss = -F.logsigmoid(torch.where(matches, logits, -logits))
    if ignore is not None:
        loss = loss.masked_fill(ignore, 0.0)
    total = loss.sum() / len(logits)
    return total if columns is None else columns.all_reduce(total)[0]


class _Blocks(Function):
    """The loss of unit rows t d and v d, and beside it the gradients by all four tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        text: Tensor,
        video: Tensor,
        scale: Tensor,
        bias: Tensor,
        ignore: Tensor | None,
        first: int,
        impl: str,
    ) -> Tensor:
        dtype, block, pairs = scale.dtype, _block, ELEMENTS // 4
        if impl == "chunks":
            block, pairs = compiled(_block), power_of_four(FACTOR * pairs)
        dtext, dvideo = (torch.zeros_like(x, dtype=dtype) for x in (text, video))
        sums = scale.new_zeros(3)  # of the loss, and of its derivatives by scale and bias
        for rows, across in row_strips(len(text), len(video), pairs):
            for columns in across:
                cosine = matmul(text[rows], video[columns].T, dtype)
                shift = torch.full((), first + columns.start - rows.start, device=text.device)
                left_out = None if ignore is None else ignore[rows, columns]
                part, dcosine = block(cosine, scale, bias, left_out, shift)
                sums += part
                dcosine = dcosine.to(text.dtype)
                dtext[rows] += matmul(dcosine, video[columns], dtype)
                dvideo[columns] += matmul(dcosine.T, text[rows], dtype)
        ctx.save_for_backward(dtext.to(text.dtype), dvideo.to(video.dtype), sums / len(text))
        ctx.n = len(text)
        return sums[0] / len(text)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        dtext, dvideo, sums = ctx.saved_tensors
        share = grad / ctx.n
        return dtext * share.to(dtext.dtype), dvideo * share.to(dvideo.dtype), *(grad * sums[1:]), *[None] * 3


def _block(
    cosine: Tensor, scale: Tensor, bias: Tensor, ignore: Tensor | None, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sums of a block's losses and of their derivatives by scale and bias, and those by cosines.

    shift: of matching pairs, row = column + shift.
    """
    rows, columns = (torch.arange(size, device=cosine.device) for size in cosine.shape)
    sign = torch.where(rows[:, None] - columns == shift, 1.0, -1.0).to(cosine.dtype)
    z = sign * (scale * cosine + bias)
    loss, slope = F.softplus(-z), -sign * torch.sigmoid(-z)
    if ignore is not None:
        loss, slope = loss.masked_fill(ignore, 0.0), slope.masked_fill(ignore, 0.0)
    return torch.stack([loss.sum(), (slope * cosine).sum(), slope.sum()]), scale * slope
