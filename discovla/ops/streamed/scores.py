"""Scores of queries against items, some queries at a time; the whole matrix is never in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, matmul, sum_dtype, unit_rows

ROWS = 1 << 11  # of one block: more make no product faster, and new memory takes time
GPU_FACTOR = 16  # blocks are this much larger on a GPU, which small ones would leave idle


@dataclass(frozen=True, kw_only=True)
class DualSoftmax:
    """Scores re-weighted by how much an item prefers a query among all queries.

    With logits z = s c of cosines c, a score is log(z - lowest) + z - logsumexp over queries of z.

    scale: s.  lowest: the smallest logit of all, or 0 if none is negative.  lse: m, the log-sum-exp of
    every item.
    """

    scale: float
    lowest: Tensor
    lse: Tensor

    def __call__(self, cosines: Tensor) -> Tensor:
        """Return log scores, in which values stay distinct that a product would round to 0."""
        logits = self.scale * cosines
        return (logits - self.lowest).clamp(min=0).log() + logits - self.lse


def dual_softmax(query: Tensor, items: Tensor, scale: float) -> DualSoftmax:
    """Compute the statistics over all queries, n d, in a first pass; items: m d, unit rows."""
    dtype = sum_dtype(query)
    lowest, lse = query.new_zeros((), dtype=dtype), query.new_full((len(items),), -torch.inf, dtype=dtype)
    for _, unit in _unit_queries(query, items):
        logits = scale * matmul(unit, items.T, dtype)
        lowest, lse = torch.minimum(lowest, logits.min()), torch.logaddexp(lse, logits.logsumexp(0))
    return DualSoftmax(scale=scale, lowest=lowest, lse=lse)


def score_blocks(
    query: Tensor, items: Tensor, groups: Tensor | None, dual: DualSoftmax | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of queries and their scores n m; with groups n g, each group by its best item.

    Args:
        query: n d, un-normalised.  items: m d, unit rows.
        groups: m, int64.  dual: over all queries.

    Raises:
        ValueError: a query is zero or not finite.
    """
    for rows, unit in _unit_queries(query, items):
        scores = matmul(unit, items.T, sum_dtype(query))  # n m
        scores = scores if dual is None else dual(scores)
        if groups is not None:
            best = scores.new_full((len(scores), int(groups.max()) + 1), -torch.inf)
            scores = best.scatter_reduce_(1, groups.expand_as(scores), scores, "amax")
        yield rows, scores


def finite_unit_rows(name: str, x: Tensor, pairs: int, first: int = 0) -> Tensor:
    """Normalise rows that will be multiplied to `pairs` scores; `first` is the number of the first row.

    Raises:
        ValueError: a row is zero or not finite: a NaN would rank first.
    """
    unit, inverse = unit_rows(x, pairs)
    if len(bad := (~(inverse.isfinite() & (inverse > 0))).nonzero()):  # 1 / NaN, 1 / 0, 1 / inf
        raise ValueError(f"{name}: expected finite rows that are not 0, found row {first + bad[0, 0].item()}")
    return unit


def _unit_queries(query: Tensor, items: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of queries whose scores with all items make one block, and their unit rows."""
    size = min(ROWS, max(1, ELEMENTS // len(items))) * (GPU_FACTOR if query.is_cuda else 1)
    for first in range(0, len(query), size):
        rows = slice(first, min(first + size, len(query)))
        yield rows, finite_unit_rows("query", query[rows], len(query) * len(items), first)
