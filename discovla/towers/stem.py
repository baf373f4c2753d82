"""MobileCLIP's patch embedding: three convolutions of 4, 2 and 2 pixels, which do not overlap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNELS = (4, 2, 2)


class StoredNorm(nn.Module):
    """Batch norm by its stored mean and variance, in training too."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Norm n c y x in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, variance, weight, bias = (
            v.to(wide) for v in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(x.to(wide), mean, variance, weight, bias, eps=1e-5).to(x.dtype)


class Convolution(nn.Module):
    """A convolution whose stride is its kernel; but for the last one, followed by a norm and GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=kernel, bias=last)
        self.bn = None if last else StoredNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.conv.bias is None else self.conv.bias.to(x.dtype)
        y = F.conv2d(x, self.conv.weight.to(x.dtype), bias, stride=self.conv.stride)
        return y if self.bn is None else F.gelu(self.bn(y))


class ConvolutionalStem(nn.Sequential):
    """Frames n c y x to patches n w y x of 16 pixels.

    Source: MobileCLIP (arXiv 2311.17049), ViT-B/16; as timm computes it.
    """

    def __init__(self, width: int) -> None:
        channels = (3, width // 4, width // 4, width)
        super().__init__(
            *(
                Convolution(channels[i], channels[i + 1], kernel, last=i == len(KERNELS) - 1)
                for i, kernel in enumerate(KERNELS)
            )
        )
