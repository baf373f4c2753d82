"""How many groups of items score as high as the right one, by csrc/rank_of_positive.cu."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.cuda.library import ops, rows, unsupported_tensors


def unsupported(query: Tensor, items: Tensor, groups: Tensor | None) -> str:
    """Why the kernel does not take these; empty where it does."""
    return unsupported_tensors(query, items, groups)


def counts(
    query: Tensor,
    items: Tensor,
    positive: Tensor,
    groups: Tensor | None,
    dual: tuple[Tensor | None, Tensor, float],
) -> tuple[Tensor, Tensor]:
    """Groups other than the right one that score at least as high, and higher: n each, int64.

    query, items: n d and m d, unit rows.  groups: m, or None where every item is one.  dual: sums of the
    items, lowest logit and scale of a dual softmax, or None, unused, unused.
    """
    lse, lowest, scale = dual
    lowest = None if lse is None else lowest
    group = starts = None
    if groups is not None:
        group, order = groups.sort(stable=True)
        items, lse = items[order], None if lse is None else lse[order]
        starts = F.pad(torch.bincount(groups).cumsum(0), (1, 0))
    count = ops().rank_of_positive(
        rows(query), rows(items), positive.contiguous(), group, starts, lse, lowest, scale
    )
    return count[0].long(), count[1].long()
