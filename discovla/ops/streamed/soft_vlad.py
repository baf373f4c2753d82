"""Pooling of some samples' tokens by soft assignment in plain torch, and its derivative.

The same functions as `discovla_kernels.soft_vlad`, which has the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS


def forward(tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor) -> Tensor:
    """n d of tokens n l d with mask n l; centres k d, both in float32 at least."""
    x = tokens.to(assignment.dtype)
    share = _shares(x, mask, assignment)
    unit, _ = _residuals(x, share, centres)
    mean = unit.mean(1)
    return mean / mean.norm(dim=-1, keepdim=True)


def gradients(
    grad: Tensor, tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by tokens (in their dtype), assignment and centres."""
    x = tokens.to(assignment.dtype)
    share = _shares(x, mask, assignment)
    unit, norm = _residuals(x, share, centres)
    mean = unit.mean(1)
    length = mean.norm(dim=-1, keepdim=True)
    y = mean / length
    grad = (grad - y * (y * grad).sum(-1, keepdim=True)) / (length * len(centres))  # by each unit residual
    grad = grad[:, None]
    slope = (grad - unit * (unit * grad).sum(-1, keepdim=True)) / norm  # dV, n k d
    slope_share = x @ slope.mT - (slope * centres).sum(-1)[:, None]  # n l k
    slope_logit = share * (slope_share - (share * slope_share).sum(-1, keepdim=True))
    token_grad = share @ slope + slope_logit @ assignment
    centre_grad = -torch.einsum("nk,nkd->kd", share.sum(1), slope)
    return token_grad.to(tokens.dtype), torch.einsum("nlk,nld->kd", slope_logit, x), centre_grad


def samples_per_block(tokens: Tensor, assignment: Tensor) -> int:
    """How many samples are pooled at once, so that what there is of them stays within ELEMENTS."""
    (_, length, d), k = tokens.shape, len(assignment)
    return max(1, ELEMENTS // ((length + 4 * k) * d))


def _shares(x: Tensor, mask: Tensor, assignment: Tensor) -> Tensor:
    """a of real tokens, n l k."""
    return (x @ assignment.T).softmax(-1) * mask[..., None]


def _residuals(x: Tensor, share: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """V / ‖V‖, n k d, and ‖V‖, n k 1."""
    residuals = share.mT @ x - share.sum(1)[..., None] * centres
    norm = residuals.norm(dim=-1, keepdim=True)
    return residuals / norm, norm
