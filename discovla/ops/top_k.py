"""The best items of every query, without the matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.blocks import expect_shape
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.streamed.scores import finite_unit_rows, score_blocks

LOW = 0xFFFFFFFF  # the lower half of a key


@torch.no_grad()
def top_k(
    query: Tensor, items: Tensor, k: int, *, groups: Tensor | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The k items of highest cosine for every query, best first; equal ones in order of their index.

    Args:
        query: n d.  items: m d.  Both un-normalised; scores are compared in float32.
        k: number of items, 1 to m (or to the number of groups).
        groups: m, int64, 0 to g - 1, all used: a group of items scores as its best item.
        impl: reference (the matrix in memory), torch (some queries at a time), cuda, or auto, which is
            torch.

    Returns:
        Scores n k, float32, and indices n k, int64, of items or of groups.

    Raises:
        ValueError: k out of range, or a row is zero or not finite.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    count = len(items) if groups is None else int(groups.max()) + 1
    if not 1 <= k <= count:
        raise ValueError(f"k: expected 1..{count}, found {k}")
    chosen = choose("top_k", impl, query.device.type, operands=(query, items, groups))
    expect_shape("items", items, (len(items), query.shape[1]))
    pairs = len(query) * len(items)
    items = finite_unit_rows("items", items, pairs)
    if chosen != "torch":
        query = finite_unit_rows("query", query, pairs)
        best = top_k_reference if chosen == "reference" else kernel("top_k", "cuda").best
        return best(query, items, k, groups)
    values = query.new_empty(len(query), k, dtype=torch.float32)
    indices = query.new_empty(len(query), k, dtype=torch.int64)
    for rows, scores in score_blocks(query, items, groups, None):
        values[rows], indices[rows] = top_of_scores(scores, k)
    return values, indices


@torch.no_grad()
def top_of_scores(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items of every query from their scores; equal ones in order of their index.

    `torch.topk` orders equal scores at will.  Queries with two equal scores among their best k + 1, which are
    few, are therefore selected again by keys that differ.

    Args:
        scores: n m, not NaN.
        k: number of items, 1 to m.

    Returns:
        Scores n k, float32, and indices n k, int64.
    """
    scores = scores.float()
    best, places = _largest(scores, min(k + 1, scores.shape[1]))
    values, indices = best[:, :k], places[:, :k]
    if len(rows := (best[:, 1:] == best[:, :-1]).any(1).nonzero()[:, 0]):
        values, indices = values.clone(), indices.clone()
        values[rows], indices[rows] = _decode(_encode(scores[rows]).topk(k, dim=1).values)
    return values, indices


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return `scores.topk(k)`, of few among many positive scores on a CPU in 0.7 of its time.

    Floats above 0 order like the whole numbers of their bits, which torch compares without looking for NaN.
    """
    if scores.device.type == "cpu" and 16 * k <= scores.shape[1]:
        best = scores.view(torch.int32).topk(k, dim=1)
        if (best.values > 0).all():  # bits of negative scores are negative
            return best.values.view(torch.float32), best.indices
    values, indices = scores.topk(k, dim=1)
    return values, indices


def top_k_reference(query: Tensor, items: Tensor, k: int, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, of unit rows, by a stable sort of all scores."""
    scores = query @ items.T
    if groups is not None:
        scores = torch.stack([scores[:, groups == g].amax(1) for g in range(int(groups.max()) + 1)], dim=1)
    ordered = scores.float().sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def _encode(scores: Tensor) -> Tensor:
    """Return distinct int64 keys, ordered by score and, for equal scores, by falling index.

    The upper half holds the bits of the float32, which order like the numbers once those of negative ones
    are flipped.
    """
    bits = (scores.float() + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0 equals 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (LOW - torch.arange(scores.shape[1], device=scores.device))


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores and indices of keys."""
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(torch.int32).view(torch.float32), LOW - (keys & LOW)
