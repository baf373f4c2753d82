"""Pairwise sigmoid loss: every pair is a question of its own, so nothing is normalised over the batch."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, expect_shape, pair_blocks, product, through_unit, unit_rows, wide
from discovla.ops.column_shard import ColumnShard
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.info_nce import cosine_similarity
from discovla.ops.streamed import sigmoid_loss as streamed


def sigmoid_loss(
    text: Tensor,
    video: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    columns: ColumnShard | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """-1/n sum_ij log sigmoid(z_ij (s t̂_i · v̂_j + b)), z_ij = 1 where i = j, else -1.

    Args:
        text, video: n d, un-normalised; row i of one belongs to row i of the other.
        logit_scale: scalar, s (not its logarithm).
        logit_bias: scalar, b; SigLIP starts it at -10.
        columns: where each process has its own videos: video is v d, of this one.
        impl: reference (the matrix in memory), torch (streamed over blocks, made again in backward), triton,
            or auto: the reference while there are at most 4 million pairs and torch above.

    Returns:
        Scalar, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: SigLIP (arXiv 2303.15343), equation 1.
    """
    expect_shape("video", video, (len(text if columns is None else video), text.shape[1]))
    small = len(text) * len(video) <= ELEMENTS
    chosen = choose("sigmoid_loss", impl, text.device.type, small=small, operands=(text, video))
    scale, bias = logit_scale.to(wide(text)), logit_bias.to(wide(text))
    first = 0 if columns is None else columns.first_text
    if chosen == "reference":
        own = sigmoid_loss_reference(text, video, scale, bias, first)
    else:
        own = _sigmoid_loss(text, video, scale, bias, chosen, first)
    return own if columns is None else columns.all_reduce(own)[0]


def sigmoid_loss_reference(
    text: Tensor, video: Tensor, scale: Tensor, bias: Tensor, first: int = 0
) -> Tensor:
    """The formula of `sigmoid_loss`, with the matrix in memory; text `first` matches the first video."""
    logits = scale * cosine_similarity(text, video) + bias  # t v
    sign = torch.full_like(logits, -1.0)
    sign.diagonal(-first).fill_(1)
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def _tiles(impl: str) -> ModuleType:
    return kernel("sigmoid_loss") if impl == "triton" else streamed


@torch.library.custom_op("discovla::sigmoid_loss_streamed", mutates_args=())
def _sigmoid_loss(
    text: Tensor, video: Tensor, scale: Tensor, bias: Tensor, impl: str, first: int = 0
) -> Tensor:
    """`sigmoid_loss` block by block; text `first` matches the first video."""
    tiles, n, pairs = _tiles(impl), len(text), len(text) * len(video)
    text, video = unit_rows(text, pairs)[0], unit_rows(video, pairs)[0]
    loss = torch.zeros_like(scale)
    for rows, across in pair_blocks(n, len(video), tiles.pairs_per_block(text)):
        for columns in across:
            shift = first + columns.start - rows.start
            loss += tiles.forward(text[rows], video[columns], scale, bias, shift)
    return loss / n


@_sigmoid_loss.register_fake
def _(text, video, scale, bias, impl, first=0):
    return torch.empty_like(scale)


@torch.library.custom_op("discovla::sigmoid_loss_streamed_backward", mutates_args=())
def _sigmoid_loss_backward(
    grad: Tensor, text: Tensor, video: Tensor, scale: Tensor, bias: Tensor, impl: str, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by text, video, scale and bias."""
    tiles, n, pairs = _tiles(impl), len(text), len(text) * len(video)
    text_grad, scale_grad, bias_grad = torch.empty_like(text), torch.zeros_like(scale), torch.zeros_like(bias)
    video_dtype, weight = video.dtype, (grad / n).to(scale.dtype)
    (text, text_inverse), (video, video_inverse) = unit_rows(text, pairs), unit_rows(video, pairs)
    video_sum = torch.zeros_like(video, dtype=wide(video))
    for rows, across in pair_blocks(n, len(video), tiles.pairs_per_block(text)):
        text_sum = torch.zeros_like(text[rows], dtype=wide(text))
        for columns in across:
            block = (text[rows], video[columns], scale, bias, first + columns.start - rows.start)
            dx, ds, db = tiles.backward(*block, weight)
            text_sum += product(dx, video[columns], wide(text))
            video_sum[columns] += product(dx.T, text[rows], wide(text))
            scale_grad += ds
            bias_grad += db
        text_grad[rows] = through_unit(text_sum, text[rows], text_inverse[rows]).to(text_grad.dtype)
    return text_grad, through_unit(video_sum, video, video_inverse).to(video_dtype), scale_grad, bias_grad


@_sigmoid_loss_backward.register_fake
def _(grad, text, video, scale, bias, impl, first):
    return torch.empty_like(text), torch.empty_like(video), torch.empty_like(scale), torch.empty_like(bias)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.impl, ctx.first = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    return *_sigmoid_loss_backward(grad, *ctx.saved_tensors, ctx.impl, ctx.first), None, None


_sigmoid_loss.register_autograd(_differentiate, setup_context=_keep)
