"""Count the groups of items that score at least as high as the positive, by csrc/rank_of_positive.cu."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.cuda.library import align_rows, ops, unsupported_tensors
from discovla.ops.streamed.scores import DualSoftmax


def unsupported(query: Tensor, items: Tensor, groups: Tensor | None) -> str:
    """Return why the kernel cannot take these tensors, or ""."""
    return unsupported_tensors(query, items, groups)


def count_better(
    query: Tensor, items: Tensor, positive: Tensor, groups: Tensor | None, dual: DualSoftmax | None
) -> tuple[Tensor, Tensor]:
    """Count, per query, other groups that score at least as high as the positive, and higher: n, int64.

    query, items: n d and m d, unit rows.  groups: m; None if every item is a group.
    """
    lse = lowest = group = starts = None
    if dual is not None:
        lse, lowest = dual.lse, dual.lowest
    if groups is not None:
        group, order = groups.sort(stable=True)
        items, lse = items[order], None if lse is None else lse[order]
        starts = F.pad(torch.bincount(groups).cumsum(0), (1, 0))
    scale = 1.0 if dual is None else dual.scale
    count = ops().rank_of_positive(
        align_rows(query), align_rows(items), positive.contiguous(), group, starts, lse, lowest, scale
    )
    return count[0].long(), count[1].long()
