"""Scores of queries against items, a run of queries at a time, never all of them in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, expect_shape, product, unit_rows, wide

GPU_FACTOR = 16  # how much larger a block is on a GPU, which small ones would leave idle


@dataclass(frozen=True, kw_only=True)
class DualSoftmax:
    """How much an item prefers a query: scores are log(s c - lowest) + s c - log sum over queries exp(s c).

    scale: s.  lowest: the least logit of all, or 0 where none is negative.  lse: m, the sums of the items.
    """

    scale: float
    lowest: Tensor
    lse: Tensor

    def __call__(self, cosines: Tensor) -> Tensor:
        """Logarithms of the re-weighed scores, which keep apart what a product would round to 0."""
        logits = self.scale * cosines
        return (logits - self.lowest).clamp(min=0).log() + logits - self.lse


def dual_softmax(query: Tensor, items: Tensor, scale: float) -> DualSoftmax:
    """The first pass over unit rows n d and m d."""
    lowest, lse = (
        query.new_zeros((), dtype=wide(query)),
        query.new_full((len(items),), -torch.inf, dtype=wide(query)),
    )
    for rows in runs(query, items):
        logits = scale * product(query[rows], items.T, wide(query))
        lowest, lse = torch.minimum(lowest, logits.min()), torch.logaddexp(lse, logits.logsumexp(0))
    return DualSoftmax(scale=scale, lowest=lowest, lse=lse)


def score_blocks(
    query: Tensor, items: Tensor, groups: Tensor | None, dual: DualSoftmax | None
) -> Iterator[tuple[slice, Tensor]]:
    """Runs of queries and their scores with every item, or every group by its best item."""
    for rows in runs(query, items):
        scores = product(query[rows], items.T, wide(query))  # n m
        scores = scores if dual is None else dual(scores)
        if groups is not None:
            best = scores.new_full((len(scores), int(groups.max()) + 1), -torch.inf)
            scores = best.scatter_reduce_(1, groups.expand_as(scores), scores, "amax")
        yield rows, scores


def checked_units(query: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of both.

    Raises:
        ValueError: other dimensions, or a row that is zero or not finite: a NaN would rank first.
    """
    expect_shape("items", items, (len(items), query.shape[1]))
    pairs = len(query) * len(items)
    units = unit_rows(query, pairs)[0], unit_rows(items, pairs)[0]
    for name, unit in zip(("query", "items"), units, strict=True):
        if len(bad := (~unit.isfinite().all(1)).nonzero()):
            raise ValueError(f"{name}: expected finite rows that are not 0, found row {bad[0].item()}")
    return units


def runs(query: Tensor, items: Tensor) -> Iterator[slice]:
    """Runs of queries whose scores with all items are one block."""
    size = max(1, ELEMENTS * (GPU_FACTOR if query.is_cuda else 1) // len(items))
    for first in range(0, len(query), size):
        yield slice(first, min(first + size, len(query)))
