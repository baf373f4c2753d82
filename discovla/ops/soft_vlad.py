"""Pooling of tokens by soft assignment to centres: the mean of normalised residuals."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.streamed import soft_vlad as streamed


def soft_vlad(
    tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """Pool each set of tokens to one unit vector: residuals to shared centres, normalised, then averaged.

    n(x) = x / ‖x‖;  a_lk = softmax_k(x_l · c_k);  V_k = sum_l m_l a_lk (x_l - e_k);
    out = n(1/K sum_k n(V_k)).

    Args:
        tokens: n l d, un-normalised x.
        mask: n l, bool, m; every row must have a true entry.
        assignment: k d, c.  centres: k d, e.
        impl: reference, torch (some samples at a time, computed again in backward), triton, or auto: the
            reference for at most 4 million numbers, else torch.

    Returns:
        n d, unit, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: CLIP2Video (arXiv 2106.11097), Temporal Alignment Block; VLAD with the mean over centres.
    """
    expect_shape("mask", mask, tuple(tokens.shape[:2]))
    expect_shape("assignment", assignment, (len(assignment), tokens.shape[2]))
    expect_shape("centres", centres, tuple(assignment.shape))
    chosen = choose(
        "soft_vlad",
        impl,
        tokens.device.type,
        small=tokens.numel() <= ELEMENTS,
        operands=(tokens, mask, assignment),
    )
    work = sum_dtype(tokens)
    assignment, centres = assignment.to(work), centres.to(work)
    if chosen == "reference":
        return soft_vlad_reference(tokens.to(work), mask, assignment, centres)
    return _soft_vlad(tokens, mask, assignment, centres, chosen)


def soft_vlad_reference(tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor) -> Tensor:
    """The formula of `soft_vlad`, with sum_l m a x - (sum_l m a) e in place of n l k d residuals."""
    share = soft_assignment(tokens, assignment) * mask[..., None]  # n l k
    residuals = share.mT @ tokens - share.sum(1)[..., None] * centres  # n k d
    mean = (residuals / residuals.norm(dim=-1, keepdim=True)).mean(1)
    return mean / mean.norm(dim=-1, keepdim=True)


def soft_assignment(tokens: Tensor, assignment: Tensor) -> Tensor:
    """Return a of `soft_vlad`: n l d, k d -> n l k."""
    return (tokens @ assignment.T).softmax(-1)


def block_functions(impl: str) -> ModuleType:
    """Return the module that computes some samples: `forward`, `gradients`, `samples_per_block`."""
    return kernel("soft_vlad") if impl == "triton" else streamed


@torch.library.custom_op("discovla::soft_vlad_streamed", mutates_args=())
def _soft_vlad(tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor, impl: str) -> Tensor:
    """`soft_vlad`, some samples at a time."""
    functions = block_functions(impl)
    size = functions.samples_per_block(tokens, assignment)
    blocks = zip(tokens.split(size), mask.split(size), strict=True)
    return torch.cat([functions.forward(*block, assignment, centres) for block in blocks])


@_soft_vlad.register_fake
def _(tokens, mask, assignment, centres, impl):
    return tokens.new_empty(len(tokens), tokens.shape[2], dtype=assignment.dtype)


@torch.library.custom_op("discovla::soft_vlad_streamed_backward", mutates_args=())
def _soft_vlad_backward(
    grad: Tensor, tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by tokens, assignment and centres; assignments are computed again."""
    functions = block_functions(impl)
    size = functions.samples_per_block(tokens, assignment)
    dtokens = torch.empty_like(tokens)
    dassignment, dcentres = torch.zeros_like(assignment), torch.zeros_like(centres)
    for first in range(0, len(tokens), size):
        rows = slice(first, first + size)
        gradients = functions.gradients(grad[rows], tokens[rows], mask[rows], assignment, centres)
        dtokens[rows] = gradients[0]
        dassignment += gradients[1]
        dcentres += gradients[2]
    return dtokens, dassignment, dcentres


@_soft_vlad_backward.register_fake
def _(grad, tokens, mask, assignment, centres, impl):
    return torch.empty_like(tokens), torch.empty_like(assignment), torch.empty_like(centres)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    dtokens, dassignment, dcentres = _soft_vlad_backward(grad, *ctx.saved_tensors, ctx.impl)
    return dtokens, None, dassignment, dcentres, None


_soft_vlad.register_autograd(_backward, setup_context=_setup_context)
