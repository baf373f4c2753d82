"""Video-level and frame-level contrastive losses, and the distillation between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from discovla.ops.alignment_block import alignment_block, fits_a_block
from discovla.ops.blocks import ELEMENTS, EXCLUDED, expect_shape, wide
from discovla.ops.column_shard import (
    ALL_COLUMNS,
    ColumnShard,
    column_losses,
    merged_losses,
    placed,
    statistics,
)
from discovla.ops.contrastive import contrastive_columns, contrastive_streamed
from discovla.ops.dispatch import Impl, choose
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import contrastive_loss, cosine_similarity, info_nce

KLNorm = Literal["official", "fixed"]


@dataclass(frozen=True, kw_only=True)
class AlignmentInputs:
    """The four embeddings the losses compare, un-normalised, row i of each from sample i.

    text, video: n d.  text_frames: n i d, frame captions.  video_frames: n j d, frames.
    text_mask, video_mask: n i and n j, bool, or None where every part counts.
    columns: where each process has its own videos: what is of videos is v rows, of this one's.
    group: how many neighbouring samples frames are compared among; None for all.
    """

    text: Tensor
    video: Tensor
    text_frames: Tensor
    video_frames: Tensor
    text_mask: Tensor | None = None
    video_mask: Tensor | None = None
    columns: ColumnShard | None = None
    group: int | None = None


@dataclass(frozen=True, kw_only=True)
class AlignmentLosses:
    """Unweighted scalars: video-level, frame-level, distillation; and their weighted sum."""

    video: Tensor
    frame: Tensor
    distill: Tensor
    total: Tensor


def alignment_losses(
    inputs: AlignmentInputs,
    logit_scale: Tensor,
    *,
    weights: tuple[float, float] = (1.0, 1.0),
    kl_norm: KLNorm = "official",
    detach_teacher: bool = False,
    ignore: Tensor | None = None,
    impl: Impl = "auto",
) -> AlignmentLosses:
    """InfoNCE on the video-level matrix S and the frame-level matrix G, and KL(G ‖ S) in both directions.

    S = cosine of (text, video);  G = `frame_similarity` of the frames;
    P = softmax_rows(s G), Q = softmax_rows(s S);  K = w sum_ij P (log P - log Q);
    w = 100 / n² (official: the weight per row falls as 1/n) or 100 / (128 n) (fixed: equal at n = 128, free
    of n).  With groups of m neighbouring samples G, P and the Q of K are of pairs inside a group alone, and
    w = 100 / (m n) or 100 / (128 n): the mean over groups of what each would have as a batch of its own.

    Args:
        inputs: the embeddings and masks.
        logit_scale: scalar, s.
        weights: alpha and beta of the total, video + alpha frame + beta distill.
        kl_norm: which w.
        detach_teacher: stop the gradient of the distillation into G.  The released code does not.
        ignore: n n, bool, pairs left out of every softmax; never on the diagonal.
        impl: reference (everything in memory), torch (streamed over blocks of pairs, made again in backward:
            neither matrix is stored), triton (streamed too, unless the pairs are one block, which has kernels
            of its own), or auto: the reference while the products of parts are at most 4 million and torch
            above.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: DiscoVLA (arXiv 2506.08887), alignment distillation; weight and undetached teacher as in its code.
    """
    _expect_shapes(inputs, ignore)
    n, parts = len(inputs.text), inputs.text_frames.shape[1] * inputs.video_frames.shape[1]
    pairs, columns = n * len(inputs.video), inputs.columns
    how = {"kl_norm": kl_norm, "detach_teacher": detach_teacher, "ignore": ignore}
    if _grouped(inputs):
        pooled = (inputs.text, inputs.video, logit_scale)
        video = info_nce(*pooled, ignore=ignore, columns=columns, impl=impl)
        return _weighed(video, *_losses_of_groups(None, inputs, logit_scale, **how), weights)
    tensors = (inputs.text, inputs.video, inputs.text_frames, inputs.video_frames)
    masks = (inputs.text_mask, inputs.video_mask)
    chosen = choose(
        "alignment_losses",
        impl,
        inputs.text.device.type,
        small=pairs * parts <= ELEMENTS,
        operands=(inputs.text_frames, inputs.video_frames, inputs.text, inputs.video, *masks, ignore),
    )
    if chosen == "reference":
        losses = alignment_losses_reference(inputs, logit_scale, kl_norm, detach_teacher, ignore)
        return _weighed(*losses, weights)
    if chosen == "triton" and columns is None and fits_a_block(inputs.text, *tensors[2:]):
        given = (*(x.contiguous() for x in tensors), *masks, logit_scale.to(wide(inputs.text)), ignore)
        found = alignment_block(*given, kl_weight(kl_norm, n), *weights, detach_teacher)
        return AlignmentLosses(total=found[0], video=found[1], frame=found[2], distill=found[3])
    given = (*tensors, *masks, logit_scale.to(wide(inputs.text)), ignore)
    how = (kl_weight(kl_norm, n), detach_teacher, chosen)
    losses = (
        contrastive_streamed(*given, *how)[0]
        if columns is None
        else contrastive_columns(given, columns, *how)
    )
    return _weighed(losses[0], losses[1], losses[2], weights)


def _weighed(video: Tensor, frame: Tensor, distill: Tensor, weights: tuple[float, float]) -> AlignmentLosses:
    total = video + weights[0] * frame + weights[1] * distill
    return AlignmentLosses(video=video, frame=frame, distill=distill, total=total)


def _expect_shapes(inputs: AlignmentInputs, ignore: Tensor | None) -> None:
    """Refuse what does not belong to n samples, or to n texts and a process's videos."""
    n, text, video = len(inputs.text), inputs.text_frames, inputs.video_frames
    v = n if inputs.columns is None else len(inputs.video)
    expect_shape("video", inputs.video, (v, inputs.text.shape[1]))
    expect_shape("text_frames", text, (n, *text.shape[1:]))
    expect_shape("video_frames", video, (v, video.shape[1], text.shape[2]))
    expect_shape("text_mask", inputs.text_mask, tuple(text.shape[:2]))
    expect_shape("video_mask", inputs.video_mask, tuple(video.shape[:2]))
    expect_shape("ignore", ignore, (n, v))


def kl_weight(kl_norm: KLNorm, n: int) -> float:
    """w of `alignment_losses`."""
    return 100 / n**2 if kl_norm == "official" else 100 / (128 * n)


def alignment_losses_reference(
    inputs: AlignmentInputs,
    logit_scale: Tensor,
    kl_norm: KLNorm = "official",
    detach_teacher: bool = False,
    ignore: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of the three of `alignment_losses`, with both matrices in memory."""
    video = logit_scale * cosine_similarity(inputs.text, inputs.video)  # t v
    if ignore is not None:
        video = video.masked_fill(ignore, EXCLUDED)
    frame = _frame_logits(inputs, logit_scale, ignore, "reference")
    if inputs.columns is not None:
        how = {"kl_weight": kl_weight(kl_norm, len(video)), "detach_teacher": detach_teacher}
        losses = column_losses(video, frame, inputs.columns, **how)
        return losses[0], losses[1], losses[2]
    return contrastive_loss(video), *_frame_losses(video, frame, kl_norm, detach_teacher)


def frame_alignment(
    student: Tensor,
    inputs: AlignmentInputs,
    logit_scale: Tensor,
    *,
    kl_norm: KLNorm = "official",
    detach_teacher: bool = False,
    ignore: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The frame-level loss and the distillation of `alignment_losses`, into any video-level logits.

    Args:
        student: n n, the logits s S that a method scores its pairs with; `ignore` is already filled in.
            With `inputs.columns` n v.
        inputs: as in `alignment_losses`; the pooled features are not looked at.

    Returns:
        Unweighted scalars: frame-level loss, distillation.
    """
    if _grouped(inputs):
        how = {"kl_norm": kl_norm, "detach_teacher": detach_teacher, "ignore": ignore}
        return _losses_of_groups(student, inputs, logit_scale, **how)
    frame = _frame_logits(inputs, logit_scale, ignore, "auto")
    if inputs.columns is not None:
        how = {"kl_weight": kl_weight(kl_norm, len(student)), "detach_teacher": detach_teacher}
        _, found, distill = column_losses(student, frame, inputs.columns, **how)
        return found, distill
    return _frame_losses(student, frame, kl_norm, detach_teacher)


def _grouped(inputs: AlignmentInputs) -> bool:
    return inputs.group is not None and inputs.group < len(inputs.text)


def _losses_of_groups(
    student: Tensor | None,
    inputs: AlignmentInputs,
    scale: Tensor,
    *,
    kl_norm: KLNorm,
    detach_teacher: bool,
    ignore: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Frame-level loss and distillation inside groups; the student is pooled cosines where none is given."""
    n, v, columns, group = len(inputs.text), len(inputs.video), inputs.columns or ALL_COLUMNS, inputs.group
    assert group is not None, "asked for"
    start, end = columns.first_text // group * group, columns.first_text + v
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    # one group at least, be it empty: every process must reach the same tensors in backward
    for first in range(start, max(end, start + 1), group):
        rows = slice(first, min(first + group, n))
        own = slice(max(first - columns.first_text, 0), min(first + group, end) - columns.first_text)
        left_out = None if ignore is None else ignore[rows, own]
        part = _part(inputs, rows, own)
        frame = _frame_logits(part, scale, left_out, "auto")
        logits = scale * cosine_similarity(part.text, part.video) if student is None else student[rows, own]
        logits = logits if left_out is None else logits.masked_fill(left_out, EXCLUDED)
        found.append(statistics(logits, frame, columns.first_text + own.start - first, detach_teacher))
    rows, across, matched = (list(parts) for parts in zip(*found, strict=True))
    of_rows = placed(torch.cat(rows, dim=1), start, n)
    weight = 100 / (group * n) if kl_norm == "official" else kl_weight(kl_norm, n)
    sums = (torch.cat(across, dim=1), torch.stack(matched).sum(0))
    _, frame, distill = merged_losses(of_rows, *sums, columns, weight, detach_teacher)[0]
    return frame, distill


def _part(inputs: AlignmentInputs, rows: slice, own: slice) -> AlignmentInputs:
    """Some of the texts and some of the videos."""
    masks = (inputs.text_mask, inputs.video_mask)
    return AlignmentInputs(
        text=inputs.text[rows],
        video=inputs.video[own],
        text_frames=inputs.text_frames[rows],
        video_frames=inputs.video_frames[own],
        text_mask=None if masks[0] is None else masks[0][rows],
        video_mask=None if masks[1] is None else masks[1][own],
    )


def _frame_logits(inputs: AlignmentInputs, scale: Tensor, ignore: Tensor | None, impl: Impl) -> Tensor:
    """s G, n n, without the pairs left out."""
    masks = {"text_mask": inputs.text_mask, "video_mask": inputs.video_mask}
    frame = scale * frame_similarity(inputs.text_frames, inputs.video_frames, scale, **masks, impl=impl)
    return frame if ignore is None else frame.masked_fill(ignore, EXCLUDED)


def _frame_losses(
    student: Tensor, frame: Tensor, kl_norm: KLNorm, detach_teacher: bool
) -> tuple[Tensor, Tensor]:
    teacher = frame.detach() if detach_teacher else frame
    distill = kl_weight(kl_norm, len(student)) * (_kl(student, teacher) + _kl(student.T, teacher.T)) / 2
    return contrastive_loss(frame), distill


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_ij P (log P - log Q), P of the teacher's rows, Q of the student's."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()
