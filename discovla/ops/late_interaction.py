"""Late interaction: every row of one side finds its best match on the other, and the matches are summed."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from discovla.ops.blocks import expect_shape, pair_blocks, wide
from discovla.ops.dispatch import Impl, kernel
from discovla.ops.frame_similarity import part
from discovla.ops.streamed import late_interaction as streamed
from discovla.ops.token_similarity import TokenInputs, chosen_and_unit


def max_sim(inputs: TokenInputs, *, impl: Impl = "auto") -> Tensor:
    """sum_i max_j S_ij, S the cosines of a text's rows i and a video's rows j.

    A maximum sends its gradient to one index, the lowest where several tie.

    Args:
        inputs: the rows; padding has no match and is none.  A pair with a side without a real row scores 0.
        impl: reference (S of all pairs in memory), torch: the same in blocks of pairs, which are computed
            again in backward, triton, or auto, which is torch.

    Returns:
        t v, float32 at least: cosines, as many as the text has real rows, added up.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: ColBERT (arXiv 2004.12832), equation 3.
    """
    ones = torch.ones(inputs.text.shape[:2], dtype=wide(inputs.text), device=inputs.text.device)
    return _chosen(inputs, ones, None, impl)


def weighted_token_interaction(
    inputs: TokenInputs, text_weight: Tensor, video_weight: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """(sum_i w_i max_j S_ij + sum_j u_j max_i S_ij) / 2, S as in `max_sim`, which has the arguments.

    Args:
        text_weight: t i, w.  video_weight: v j, u.  Of each sample they should add up to 1 over its real
            rows (a softmax of what a small network makes of them); those of padding are not looked at.

    Source: weighted token-wise interaction of DRL (arXiv 2203.07111), section 3.2.
    """
    expect_shape("text_weight", text_weight, tuple(inputs.text.shape[:2]))
    expect_shape("video_weight", video_weight, tuple(inputs.video.shape[:2]))
    work = wide(inputs.text)
    return _chosen(inputs, text_weight.to(work) / 2, video_weight.to(work) / 2, impl)


def late_interaction_reference(
    inputs: TokenInputs, text_weight: Tensor, video_weight: Tensor | None
) -> Tensor:
    """sum_i a_i max_j S_ij + sum_j b_j max_i S_ij of unit rows, with S of all pairs in memory."""
    match = torch.einsum("tid,vjd->tvij", inputs.text, inputs.video)
    i_mask = None if inputs.text_mask is None else inputs.text_mask[:, None, :, None]
    j_mask = None if inputs.video_mask is None else inputs.video_mask[None, :, None, :]
    for mask in (mask for mask in (i_mask, j_mask) if mask is not None):
        match = match.masked_fill(~mask, -torch.inf)
    best, back = match.max(3).values, match.max(2).values  # t v i, t v j; -inf where there is no real match
    out = (text_weight[:, None] * best.masked_fill(best == -torch.inf, 0)).sum(-1)
    if video_weight is None:
        return out
    return out + (video_weight * back.masked_fill(back == -torch.inf, 0)).sum(-1)


def _chosen(inputs: TokenInputs, text_weight: Tensor, video_weight: Tensor | None, impl: Impl) -> Tensor:
    chosen, unit = chosen_and_unit("late_interaction", impl, inputs)
    if chosen == "reference":
        return late_interaction_reference(unit, text_weight, video_weight)
    masks = (unit.text_mask, unit.video_mask)
    return _late_interaction(unit.text, unit.video, text_weight, video_weight, *masks, chosen)


def _tiles(impl: str) -> ModuleType:
    return kernel("late_interaction") if impl == "triton" else streamed


@torch.library.custom_op("discovla::late_interaction_streamed", mutates_args=())
def _late_interaction(
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    impl: str,
) -> Tensor:
    """`late_interaction_reference` block by block."""
    tiles = _tiles(impl)
    out = text.new_empty(len(text), len(video), dtype=wide(text))
    for rows, across in pair_blocks(len(text), len(video), tiles.pairs_per_block(text, video)):
        for columns in across:
            weights, masks = _parts(text_weight, video_weight, rows, columns), (text_mask, video_mask)
            found = tiles.scores(text[rows], video[columns], *weights, _parts(*masks, rows, columns))
            out[rows, columns] = found
    return out


@_late_interaction.register_fake
def _(text, video, text_weight, video_weight, text_mask, video_mask, impl):
    return text.new_empty(len(text), len(video), dtype=wide(text))


@torch.library.custom_op("discovla::late_interaction_streamed_backward", mutates_args=())
def _late_interaction_backward(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by text, video and both weights (0 where there are none), float32 at least."""
    tiles, work = _tiles(impl), wide(text)
    sums = [torch.zeros_like(x, dtype=work) for x in (text, video, text_weight)]
    sums.append(video.new_zeros(video.shape[:2], dtype=work))
    for rows, across in pair_blocks(len(text), len(video), tiles.pairs_per_block(text, video)):
        for columns in across:
            weights = _parts(text_weight, video_weight, rows, columns)
            masks = _parts(text_mask, video_mask, rows, columns)
            found = tiles.gradients(grad[rows, columns], text[rows], video[columns], *weights, masks)
            for total, own, where in zip(sums, found, (rows, columns, rows, columns), strict=True):
                total[where] += own
    return sums[0], sums[1], sums[2], sums[3]


@_late_interaction_backward.register_fake
def _(grad, text, video, text_weight, *rest):
    rows = (torch.empty_like(x, dtype=wide(text)) for x in (text, video, text_weight))
    return *rows, video.new_empty(video.shape[:2], dtype=wide(text))


def _parts(
    of_text: Tensor | None, of_video: Tensor | None, rows: slice, columns: slice
) -> tuple[Tensor | None, Tensor | None]:
    return part(of_text, rows), part(of_video, columns)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    text, video, _, video_weight, *_ = ctx.saved_tensors
    found = _late_interaction_backward(grad.contiguous(), *ctx.saved_tensors, ctx.impl)
    weights = (found[2], None if video_weight is None else found[3])
    return found[0].to(text.dtype), found[1].to(video.dtype), *weights, None, None, None


_late_interaction.register_autograd(_differentiate, setup_context=_keep)
