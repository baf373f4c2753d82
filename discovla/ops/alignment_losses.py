"""Video-level and frame-level contrastive losses, and the distillation between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, EXCLUDED, expect_shape, select_rows, sum_dtype
from discovla.ops.column_shard import (
    ALL_COLUMNS,
    ColumnShard,
    Statistics,
    column_losses,
    logit_statistics,
    merge_statistics,
    pad_statistics,
)
from discovla.ops.dispatch import Impl, choose, kernel, run_reference
from discovla.ops.frame_similarity import frame_similarity
from discovla.ops.info_nce import contrastive_loss, cosine_similarity, info_nce
from discovla.ops.streamed.losses import contrastive_columns, contrastive_streamed

KLNorm = Literal["official", "fixed"]


@dataclass(frozen=True, kw_only=True)
class AlignmentInputs:
    """The four embeddings that the losses compare, un-normalised; row i of each belongs to sample i.

    text, video: n d.  text_frames: n i e, frame captions.  video_frames: n j e, frames.
    text_mask, video_mask: n i and n j, bool, true on real parts; None for all.
    columns: given if each process has its own videos; video tensors then have v rows, those of this process.
    group: number of neighbouring samples among which frames are compared; None for all.
    """

    text: Tensor
    video: Tensor
    text_frames: Tensor
    video_frames: Tensor
    text_mask: Tensor | None = None
    video_mask: Tensor | None = None
    columns: ColumnShard | None = None
    group: int | None = None

    @property
    def grouped(self) -> bool:
        """True if the batch has more than one group."""
        return self.group is not None and self.group < len(self.text)

    def select(self, texts: slice, videos: slice) -> AlignmentInputs:
        """Return some of the texts and some of the videos, without columns and groups."""
        return AlignmentInputs(
            text=self.text[texts],
            video=self.video[videos],
            text_frames=self.text_frames[texts],
            video_frames=self.video_frames[videos],
            text_mask=select_rows(self.text_mask, texts),
            video_mask=select_rows(self.video_mask, videos),
        )


@dataclass(frozen=True, kw_only=True)
class AlignmentLosses:
    """Unweighted scalars, video-level, frame-level and distillation, and their weighted sum."""

    video: Tensor
    frame: Tensor
    distill: Tensor
    total: Tensor


def alignment_losses(
    inputs: AlignmentInputs,
    logit_scale: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    kl_norm: KLNorm = "official",
    detach_teacher: bool = False,
    ignore: Tensor | None = None,
    impl: Impl = "auto",
) -> AlignmentLosses:
    """InfoNCE on the video-level matrix S and the frame-level matrix G, and KL(G ‖ S) in both directions.

    S = cosine of (text, video);  G = `frame_similarity` of the frames;
    P = softmax_rows(s G), Q = softmax_rows(s S);  K = w sum_ij P (log P - log Q);
    w = 100 / n² (official: the weight per row falls as 1/n) or 100 / (128 n) (fixed: equal at n = 128, and
    independent of n).  With groups of m neighbouring samples G, P and the Q of K cover pairs within a group
    only, and w = 100 / (m n) or 100 / (128 n): the mean over groups of the losses of each group as a batch.

    Args:
        inputs: the embeddings and masks.
        logit_scale: scalar, s.
        alpha, beta: weights in the total, video + alpha frame + beta distill.
        kl_norm: selects w.
        detach_teacher: stop the gradient of the distillation into G.  The released code does not.
        ignore: n n, bool, pairs left out of every softmax; never on the diagonal.
        impl: reference (everything in memory), torch (streamed over blocks of pairs, computed again in
            backward: neither matrix is stored), triton (streamed too; pairs that fit one block have fewer,
            fused kernels), or auto: the reference if the products of parts are at most 4 million, else torch.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: DiscoVLA (arXiv 2506.08887), alignment distillation; weight and undetached teacher as in its code.
    """
    _check(inputs, ignore)
    text, video, text_frames, video_frames = x = (
        inputs.text, inputs.video, inputs.text_frames, inputs.video_frames
    )  # fmt: skip
    columns, weight = inputs.columns, kl_weight(kl_norm, len(text))
    if inputs.grouped:
        options = {"kl_norm": kl_norm, "detach_teacher": detach_teacher, "ignore": ignore}
        loss = info_nce(text, video, logit_scale, ignore=ignore, columns=columns, impl=impl)
        return _add_total(loss, *_group_losses(None, inputs, logit_scale, **options), alpha, beta)
    masks = inputs.text_mask, inputs.video_mask
    products = len(text) * len(video) * text_frames.shape[1] * video_frames.shape[1]
    operands = (text_frames, video_frames, text, video, *masks, ignore)
    chosen = choose("alignment_losses", impl, text.device.type, small=products <= ELEMENTS, operands=operands)
    if chosen in ("reference", "compiled"):
        options = (inputs, logit_scale, kl_norm, detach_teacher, ignore)
        own, frame, distill = run_reference(chosen, alignment_losses_reference, *options)
        return _add_total(own, frame, distill, alpha, beta)
    scale = logit_scale.to(sum_dtype(text))
    if chosen == "triton" and columns is None and fits_one_block(text, text_frames, video_frames):
        contiguous = (tensor.contiguous() for tensor in x)
        total, *losses = _alignment_block(
            *contiguous, *masks, scale, ignore, weight, alpha, beta, detach_teacher
        )[:4]
        return AlignmentLosses(total=total, video=losses[0], frame=losses[1], distill=losses[2])
    tensors = (*x, *masks, scale, ignore)
    if columns is None:
        losses = contrastive_streamed(*tensors, weight, detach_teacher, chosen)[0]
    else:
        options = {"kl_weight": weight, "detach_teacher": detach_teacher, "impl": chosen}
        losses = contrastive_columns(*tensors, columns=columns, **options)
    return _add_total(losses[0], losses[1], losses[2], alpha, beta)


def alignment_losses_reference(
    inputs: AlignmentInputs,
    logit_scale: Tensor,
    kl_norm: KLNorm,
    detach_teacher: bool,
    ignore: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of the three losses of `alignment_losses`, with both matrices in memory."""
    student = logit_scale * cosine_similarity(inputs.text, inputs.video)  # t v
    if ignore is not None:
        student = student.masked_fill(ignore, EXCLUDED)
    frame = _frame_logits(inputs, logit_scale, ignore, "reference")
    if inputs.columns is not None:
        options = {"kl_weight": kl_weight(kl_norm, len(student)), "detach_teacher": detach_teacher}
        losses = column_losses(student, frame, inputs.columns, **options)
        return losses[0], losses[1], losses[2]
    return contrastive_loss(student), *_frame_losses(student, frame, kl_norm, detach_teacher)


def frame_alignment(
    student: Tensor,
    inputs: AlignmentInputs,
    logit_scale: Tensor,
    *,
    kl_norm: KLNorm = "official",
    detach_teacher: bool = False,
    ignore: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The frame-level loss and the distillation of `alignment_losses`, for given video-level logits.

    Args:
        student: n n, the logits s S of a method, with `ignore` already filled in; n v with `inputs.columns`.
        inputs: as in `alignment_losses`; the pooled features are not used.

    Returns:
        Unweighted scalars: frame-level loss, distillation.
    """
    if inputs.grouped:
        options = {"kl_norm": kl_norm, "detach_teacher": detach_teacher, "ignore": ignore}
        return _group_losses(student, inputs, logit_scale, **options)
    frame = _frame_logits(inputs, logit_scale, ignore, "auto")
    if inputs.columns is not None:
        options = {"kl_weight": kl_weight(kl_norm, len(student)), "detach_teacher": detach_teacher}
        _, loss, distill = column_losses(student, frame, inputs.columns, **options)
        return loss, distill
    return _frame_losses(student, frame, kl_norm, detach_teacher)


def kl_weight(kl_norm: KLNorm, n: int) -> float:
    """Return w of `alignment_losses`."""
    return 100 / n**2 if kl_norm == "official" else 100 / (128 * n)


def _check(inputs: AlignmentInputs, ignore: Tensor | None) -> None:
    """Raise ValueError unless all shapes belong to n samples, or to n texts and a process's videos."""
    n, text, video = len(inputs.text), inputs.text_frames, inputs.video_frames
    v = n if inputs.columns is None else len(inputs.video)
    expect_shape("video", inputs.video, (v, inputs.text.shape[1]))
    expect_shape("text_frames", text, (n, *text.shape[1:]))
    expect_shape("video_frames", video, (v, video.shape[1], text.shape[2]))
    expect_shape("text_mask", inputs.text_mask, tuple(text.shape[:2]))
    expect_shape("video_mask", inputs.video_mask, tuple(video.shape[:2]))
    expect_shape("ignore", ignore, (n, v))


def _add_total(video: Tensor, frame: Tensor, distill: Tensor, alpha: float, beta: float) -> AlignmentLosses:
    total = video + alpha * frame + beta * distill
    return AlignmentLosses(video=video, frame=frame, distill=distill, total=total)


def _frame_logits(inputs: AlignmentInputs, scale: Tensor, ignore: Tensor | None, impl: Impl) -> Tensor:
    """Return s G, n n, with ignored pairs excluded."""
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


def _group_losses(
    student: Tensor | None,
    inputs: AlignmentInputs,
    scale: Tensor,
    *,
    kl_norm: KLNorm,
    detach_teacher: bool,
    ignore: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Frame-level loss and distillation within groups; a student of None is the pooled cosines."""
    n, v, columns, group = len(inputs.text), len(inputs.video), inputs.columns or ALL_COLUMNS, inputs.group
    assert group is not None, "called with groups only"
    first_text = columns.first_text
    start, end = first_text // group * group, first_text + v
    parts: list[Statistics] = []
    # at least one group, even an empty one: every process must reach the same collectives in backward
    for first in range(start, max(end, start + 1), group):
        texts = slice(first, min(first + group, n))
        videos = slice(max(first - first_text, 0), min(first + group, end) - first_text)
        left_out = None if ignore is None else ignore[texts, videos]
        part = inputs.select(texts, videos)
        frame = _frame_logits(part, scale, left_out, "auto")
        if student is None:
            logits = scale * cosine_similarity(part.text, part.video)
        else:
            logits = student[texts, videos]
        logits = logits if left_out is None else logits.masked_fill(left_out, EXCLUDED)
        parts.append(logit_statistics(logits, frame, first_text + videos.start - first, detach_teacher))
    statistics = Statistics(
        rows=pad_statistics(torch.cat([part.rows for part in parts], dim=1), start, n),
        columns=torch.cat([part.columns for part in parts], dim=1),
        matched=torch.stack([part.matched for part in parts]).sum(0),
    )
    weight = 100 / (group * n) if kl_norm == "official" else kl_weight(kl_norm, n)
    _, frame, distill = merge_statistics(statistics, columns, weight, detach_teacher)[0]
    return frame, distill


def fits_one_block(text: Tensor, text_frames: Tensor, video_frames: Tensor) -> bool:
    """Return True if the fused kernels may hold all pairs of n texts and videos at once."""
    width = max(text.shape[1], text_frames.shape[2])
    if text.dtype != sum_dtype(text) or width > kernel("alignment_losses").MAX_WIDTH:
        return False
    pairs = kernel("frame_similarity").pairs_per_block(text_frames, video_frames, keep=True)
    return len(text) ** 2 <= min(pairs, kernel("info_nce").pairs_per_block(text, keep=True))


@torch.library.custom_op("discovla::alignment_block", mutates_args=())
def _alignment_block(
    text: Tensor,
    video: Tensor,
    text_frames: Tensor,
    video_frames: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    scale: Tensor,
    ignore: Tensor | None,
    kl_weight: float,
    alpha: float,
    beta: float,
    detach_teacher: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """`alignment_losses` of one block in four launches: total, the three losses, and what backward needs."""
    losses, saved = kernel("alignment_losses").forward(
        text, video, text_frames, video_frames, text_mask, video_mask, scale, ignore, kl_weight, alpha, beta
    )
    return *losses, *saved.tensors()


@_alignment_block.register_fake
def _(text, video, text_frames, video_frames, *rest):
    (n, i, e), j = text_frames.shape, video_frames.shape[1]
    shapes = (*((),) * 4, (n * (2 + i + j),), (n * (i + j), e), (2, 3, n), (3,), (n, n), (n, i, n))
    floats = [text.new_empty(shape) for shape in shapes]
    index = [text.new_empty(shape, dtype=torch.int16) for shape in ((n, i, n), (n, n, j))]
    return *floats, index[0], text.new_empty(n, n, j), index[1], text.new_empty(5, n, n)


@torch.library.custom_op("discovla::alignment_block_backward", mutates_args=())
def _alignment_block_backward(
    weights: Tensor,
    text: Tensor,
    video: Tensor,
    text_frames: Tensor,
    video_frames: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    scale: Tensor,
    ignore: Tensor | None,
    saved: list[Tensor],
    detach_teacher: bool,
    scale_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by text, video, their frames, and the scale (empty unless needed)."""
    return kernel("alignment_losses").backward(
        weights, text, video, text_frames, video_frames, text_mask, video_mask, scale, ignore, saved,
        detach_teacher, scale_needs_grad,
    )  # fmt: skip


@_alignment_block_backward.register_fake
def _(
    weights, text, video, text_frames, video_frames, text_mask, video_mask, scale, ignore, saved,
    detach_teacher, scale_needs_grad,
):  # fmt: skip
    tensors = [torch.empty_like(x) for x in (text, video, text_frames, video_frames)]
    return *tensors, scale.new_empty(() if scale_needs_grad else (0,))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.kl_weight, ctx.alpha, ctx.beta, ctx.detach_teacher = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(*tensors, *output[4:])


def _backward(ctx, total, video, frame, distill, *_):
    """Differentiate; as a rule only the total has an upstream gradient, rarely a single loss."""
    saved_tensors = ctx.saved_tensors
    tensors, saved = saved_tensors[:8], list(saved_tensors[8:])
    loss_weights = saved[3]
    weights = loss_weights if total is None else total * loss_weights
    if total is None or any(x is not None for x in (video, frame, distill)):
        n, zero = len(tensors[0]), torch.zeros_like(loss_weights[0])
        means = 1 / (2 * n), 1 / (2 * n), ctx.kl_weight / 2
        parts = [
            zero if x is None else x * mean for x, mean in zip((video, frame, distill), means, strict=True)
        ]
        weights = torch.stack(parts) + (0 if total is None else weights)
    scale_needs_grad = ctx.needs_input_grad[6]
    *grads, dscale = _alignment_block_backward(weights, *tensors, saved, ctx.detach_teacher, scale_needs_grad)
    return *grads, None, None, dscale if scale_needs_grad else None, *[None] * 5


_alignment_block.register_autograd(_backward, setup_context=_setup_context)
