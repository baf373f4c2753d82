"""`soft_vlad` of some samples in plain torch, and its gradients.

Same functions as `discovla_kernels.soft_vlad`, where the gradients are derived.
"""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS


def forward(tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor) -> Tensor:
    """Pool tokens n l d with mask n l to n d; assignment and centres k d, in float32 at least."""
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
    """Return how many samples are pooled at once, so that their temporaries stay within ELEMENTS."""
    (_, length, d), k = tokens.shape, len(assignment)
    return max(1, ELEMENTS // ((length + 4 * k) * d))


def _shares(x: Tensor, mask: Tensor, assignment: Tensor) -> Tensor:
    """Return a, n l k; 0 for padding."""
    return (x @ assignment.T).softmax(-1) * mask[..., None]


def _residuals(x: Tensor, share: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return V / ‖V‖, n k d, and ‖V‖, n k 1."""
    residuals = share.mT @ x - share.sum(1)[..., None] * centres
    norm = residuals.norm(dim=-1, keepdim=True)
    return residuals / norm, norm
