"""Late interaction (ColBERT's MaxSim): each row of a text is compared with its best match in a video."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from discovla.ops.blocks import pair_blocks, select_rows, sum_dtype
from discovla.ops.dispatch import Impl, kernel
from discovla.ops.streamed import late_interaction as streamed
from discovla.ops.token_similarity import TokenInputs, choose_and_normalise


def late_interaction(inputs: TokenInputs, *, impl: Impl = "auto") -> Tensor:
    """sum_i max_j S_ij, S the cosines of a text's rows i and a video's rows j.

    A maximum sends its gradient to one index, the lowest of equal ones.

    Args:
        inputs: the rows; padding is left out on both sides.  A side without a real row scores 0.
        impl: reference (S of all pairs in memory), torch (in blocks of pairs, computed again in backward),
            triton, or auto: the reference if S has at most 4 million entries, else torch.

    Returns:
        t v, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: ColBERT (arXiv 2004.12832), equation 3.
    """
    chosen, unit = choose_and_normalise("late_interaction", impl, inputs)
    if chosen == "reference":
        return late_interaction_reference(unit)
    return _late_interaction(unit.text, unit.video, unit.text_mask, unit.video_mask, chosen)


def late_interaction_reference(inputs: TokenInputs) -> Tensor:
    """The formula of `late_interaction` on unit rows, with S of all pairs in memory."""
    match = torch.einsum("tid,vjd->tvij", inputs.text, inputs.video)
    if inputs.video_mask is not None:
        match = match.masked_fill(~inputs.video_mask[None, :, None], -torch.inf)
    best = match.max(3).values  # t v i; -inf without a real match
    real = best > -torch.inf if inputs.text_mask is None else (best > -torch.inf) & inputs.text_mask[:, None]
    return best.masked_fill(~real, 0).sum(-1)


def block_functions(impl: str) -> ModuleType:
    """Return the module that computes one block of pairs: `scores`, `gradients`, `pairs_per_block`."""
    return kernel("late_interaction") if impl == "triton" else streamed


@torch.library.custom_op("discovla::late_interaction_streamed", mutates_args=())
def _late_interaction(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, impl: str
) -> Tensor:
    """`late_interaction` block by block, of unit rows."""
    functions = block_functions(impl)
    out = text.new_empty(len(text), len(video), dtype=sum_dtype(text))
    for rows, columns in pair_blocks(len(text), len(video), functions.pairs_per_block(text, video)):
        masks = select_rows(text_mask, rows), select_rows(video_mask, columns)
        out[rows, columns] = functions.scores(text[rows], video[columns], *masks)
    return out


@_late_interaction.register_fake
def _(text, video, text_mask, video_mask, impl):
    return text.new_empty(len(text), len(video), dtype=sum_dtype(text))


@torch.library.custom_op("discovla::late_interaction_streamed_backward", mutates_args=())
def _late_interaction_backward(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients by text and video, float32 at least; the cosines of each block are computed again."""
    functions = block_functions(impl)
    dtext, dvideo = (torch.zeros_like(x, dtype=sum_dtype(x)) for x in (text, video))
    for rows, columns in pair_blocks(len(text), len(video), functions.pairs_per_block(text, video)):
        masks = select_rows(text_mask, rows), select_rows(video_mask, columns)
        gradients = functions.gradients(grad[rows, columns], text[rows], video[columns], *masks)
        dtext[rows] += gradients[0]
        dvideo[columns] += gradients[1]
    return dtext, dvideo


@_late_interaction_backward.register_fake
def _(grad, text, video, text_mask, video_mask, impl):
    return torch.empty_like(text, dtype=sum_dtype(text)), torch.empty_like(video, dtype=sum_dtype(video))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    text, video, text_mask, video_mask = ctx.saved_tensors
    tensors = (grad.contiguous(), text, video, text_mask, video_mask)
    dtext, dvideo = _late_interaction_backward(*tensors, ctx.impl)
    return dtext.to(text.dtype), dvideo.to(video.dtype), None, None, None


_late_interaction.register_autograd(_backward, setup_context=_setup_context)
