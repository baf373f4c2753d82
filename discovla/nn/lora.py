"""Low-rank updates of frozen projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """y -> (y aᵀ) bᵀ, without scale, dropout or bias.

    Added to a fused qkv projection it is one joint rank-r update of queries, keys and values.  b starts at
    zero, and with it the update.  Parameters: a r x i, uniform in ±1/sqrt(i); b o x r.

    Source: LoRA (arXiv 2106.09685); shape and initial values as in DiscoVLA's code.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """Compute the update; `outputs` selects some of its columns."""
        b = self.b.to(x.dtype)
        return (x @ self.a.to(x.dtype).T) @ (b if outputs is None else b[outputs]).T

    def delta(self) -> Tensor:
        """The update as a weight, b a, o x i; adding it to the frozen weight merges them."""
        return self.b @ self.a
