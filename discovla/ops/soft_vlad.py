"""Soft assignment of tokens to centres and the mean of their residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.dispatch import Impl, choose


def soft_vlad(
    tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """One unit vector of a set of tokens: residuals to shared centres, each normalised, then averaged.

    n(x) = x / ‖x‖;  a_lk = softmax_k(x_l · c_k);  V_k = sum_l m_l a_lk (x_l - e_k);
    out = n(1/K sum_k n(V_k)).

    Args:
        tokens: n l d, un-normalised x.
        mask: n l, bool, m; every row must have a true entry.
        assignment: k d, c.  centres: k d, e.

    Returns:
        n d, unit, float32 at least.

    Source: CLIP2Video (arXiv 2106.11097), Temporal Alignment Block; VLAD with the mean over centres.
    """
    choose("soft_vlad", impl, tokens.device.type)
    work = torch.promote_types(tokens.dtype, torch.float32)
    return soft_vlad_reference(tokens.to(work), mask, assignment.to(work), centres.to(work))


def soft_vlad_reference(tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor) -> Tensor:
    """The formula of `soft_vlad`, with sum_l m a x - (sum_l m a) e in place of n l k d residuals."""
    share = soft_assignment(tokens, assignment) * mask[..., None]  # n l k
    residuals = share.mT @ tokens - share.sum(1)[..., None] * centres  # n k d
    mean = (residuals / residuals.norm(dim=-1, keepdim=True)).mean(1)
    return mean / mean.norm(dim=-1, keepdim=True)


def soft_assignment(tokens: Tensor, assignment: Tensor) -> Tensor:
    """a of `soft_vlad`: n l d, k d -> n l k."""
    return (tokens @ assignment.T).softmax(-1)
