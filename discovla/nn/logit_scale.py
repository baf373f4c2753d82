"""The learned temperature of contrastive similarities."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

START = math.log(1 / 0.07)
LIMIT = math.log(100)
BIAS_START = -10.0  # of the sigmoid loss


class LogitScale(nn.Module):
    """s = exp(log), and the bias of logits of the sigmoid loss.

    A module, so that ZeRO-3 gathers the parameters when they are used.

    Args:
        bias: add `bias`, which starts at -10.

    Source: CLIP (arXiv 2103.00020), section 2.5: starts at 1 / 0.07 and is clipped at 100; SigLIP
    (arXiv 2303.15343), section 3.2.
    """

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(START))
        self.bias = nn.Parameter(torch.tensor(BIAS_START)) if bias else None

    def forward(self) -> Tensor:
        return self.log.exp()

    @torch.no_grad()
    def clip(self) -> None:
        """Bound s by 100, unless the logits have a bias; call after each optimiser step."""
        if self.bias is None:  # SigLIP's s is above 100
            self.log.clamp_(max=LIMIT)
