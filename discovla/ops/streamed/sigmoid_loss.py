"""One block of the sigmoid loss in plain torch: the same functions as `discovla_kernels.sigmoid_loss`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, product, wide


def forward(text: Tensor, video: Tensor, scale: Tensor, bias: Tensor, shift: int) -> Tensor:
    """Sum of softplus(-z (s x + b)) over a block of unit rows; z is 1 where row = column + shift, else -1."""
    return F.softplus(-_signs(text, video, shift) * (scale * _cosines(text, video) + bias)).sum()


def backward(
    text: Tensor, video: Tensor, scale: Tensor, bias: Tensor, shift: int, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative by the block's cosines, r c, by the scale and by the bias, times `weight`."""
    cosines, sign = _cosines(text, video), _signs(text, video, shift)
    slope = -weight * sign * torch.sigmoid(-sign * (scale * cosines + bias))
    return (scale * slope).to(text.dtype), (slope * cosines).sum(), slope.sum()


def pairs_per_block(text: Tensor) -> int:
    """How many pairs one block may have."""
    return ELEMENTS // 4


def _cosines(text: Tensor, video: Tensor) -> Tensor:
    return product(text, video.T, wide(text))


def _signs(text: Tensor, video: Tensor, shift: int) -> Tensor:
    rows = torch.arange(len(text), device=text.device)[:, None]
    columns = torch.arange(len(video), device=text.device)
    return torch.where(rows == columns + shift, 1.0, -1.0).to(wide(text))
