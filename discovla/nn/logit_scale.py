"""The learned temperature of contrastive similarities."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

START = math.log(1 / 0.07)
LIMIT = math.log(100)


class LogitScale(nn.Module):
    """s = exp(log).  A module, so that ZeRO-3 gathers the parameter when it is used.

    Source: CLIP (arXiv 2103.00020), section 2.5: starts at 1 / 0.07 and is clipped at 100.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(START))

    def forward(self) -> Tensor:
        return self.log.exp()

    @torch.no_grad()
    def clip(self) -> None:
        """Bound s by 100; call after each optimiser step."""
        self.log.clamp_(max=LIMIT)
