"""Symmetric contrastive cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, EXCLUDED, expect_shape, sum_dtype
from discovla.ops.column_shard import ColumnShard, column_losses
from discovla.ops.dispatch import Impl, choose, run_reference
from discovla.ops.streamed.losses import contrastive_columns, contrastive_streamed


def info_nce(
    text: Tensor,
    video: Tensor,
    logit_scale: Tensor,
    *,
    ignore: Tensor | None = None,
    columns: ColumnShard | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Mean cross-entropy of the matching pairs over both directions.

    S = s t̂ v̂ᵀ;  loss = -1/(2n) sum_i [log softmax_row(S)_ii + log softmax_col(S)_ii].

    Args:
        text, video: n d, un-normalised; row i of one belongs to row i of the other.
        logit_scale: scalar, s (not its logarithm).
        ignore: n n, bool, pairs left out of every softmax (captions of one video); never on the diagonal.
        columns: given if each process has its own videos; video v d and ignore n v are then of this process.
        impl: reference (S in memory), torch (streamed over blocks of S, computed again in backward),
            triton, or auto: the reference if S has at most 4 million entries, else torch.

    Returns:
        Scalar, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """
    expect_shape("video", video, (len(text if columns is None else video), text.shape[1]))
    expect_shape("ignore", ignore, (len(text), len(video)))
    small = len(text) * len(video) <= ELEMENTS
    chosen = choose("info_nce", impl, text.device.type, small=small, operands=(text, video, ignore))
    if chosen in ("reference", "compiled"):
        return run_reference(chosen, info_nce_reference, text, video, logit_scale, ignore, columns)
    tensors = (text, video, None, None, None, None, logit_scale.to(sum_dtype(text)), ignore)
    if columns is None:
        return contrastive_streamed(*tensors, 0.0, False, chosen)[0][0]
    options = {"kl_weight": 0.0, "detach_teacher": False, "impl": chosen}
    return contrastive_columns(*tensors, columns=columns, **options)[0]


def info_nce_reference(
    text: Tensor,
    video: Tensor,
    logit_scale: Tensor,
    ignore: Tensor | None,
    columns: ColumnShard | None = None,
) -> Tensor:
    """The formula of `info_nce`, with S in memory."""
    logits = logit_scale * cosine_similarity(text, video)  # t v
    return contrastive_loss(logits if ignore is None else logits.masked_fill(ignore, EXCLUDED), columns)


def cosine_similarity(text: Tensor, video: Tensor) -> Tensor:
    """t̂ v̂ᵀ of un-normalised rows: t d, v d -> t v, float32 at least."""
    text, video = text.to(sum_dtype(text)), video.to(sum_dtype(text))
    return (text / text.norm(dim=-1, keepdim=True)) @ (video / video.norm(dim=-1, keepdim=True)).T


def contrastive_loss(logits: Tensor, columns: ColumnShard | None = None) -> Tensor:
    """The symmetric cross-entropy of `info_nce` on logits n n, matching on the diagonal; n v with columns."""
    if columns is not None:
        return column_losses(logits, None, columns)[0]
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
