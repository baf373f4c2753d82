"""Confidence intervals of retrieval metrics: a seeded bootstrap over queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from discovla.retrieval.ranks import Array

RESAMPLES = 1000
FEWEST, DRAWS = 200, 20_000_000  # resamples of the largest sets, queries drawn for others
LEVEL = 95.0  # percent
RECALLS = (1, 5, 10)
NAMES = (*(f"R@{k}" for k in RECALLS), "MdR", "MnR")
CELLS = 5_000_000  # of a block of resampled queries in memory


@dataclass(frozen=True)
class Interval:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


def intervals(
    ranks: Array, groups: Array | None = None, *, resamples: int | None = None
) -> dict[str, Interval]:
    """Return R@1, R@5, R@10 in percent, MdR and MnR with 95 % intervals; equal on every call.

    Args:
        ranks: n, from 1.
        groups: n, the clip of each query: captions of one clip are drawn together, because they are not
            independent. None: every query is drawn by itself.
        resamples: number of draws; None: 1,000, or 200 to 1,000 for more than 20,000 queries.
    """
    ranks, units = np.asarray(ranks), _units(ranks, groups)
    whole = _metrics(ranks, np.ones((1, len(ranks)), np.float32))
    return _with_limits(whole, np.concatenate([_metrics(ranks, w) for w in _weights(units, resamples)]))


def gains(
    before: Array, after: Array, groups: Array | None = None, *, resamples: int | None = None
) -> dict[str, Interval]:
    """Return the differences after - before, with intervals from the same resampled queries for both.

    Args:
        before, after: n, ranks of the same queries.
        groups, resamples: as `intervals`.
    """
    before, after, units = np.asarray(before), np.asarray(after), _units(before, groups)
    one = np.ones((1, len(before)), np.float32)
    whole = _metrics(after, one) - _metrics(before, one)
    drawn = [_metrics(after, w) - _metrics(before, w) for w in _weights(units, resamples)]
    return _with_limits(whole, np.concatenate(drawn))


def values(ranks: Array) -> dict[str, float]:
    """Return the metrics without intervals."""
    found = _metrics(np.asarray(ranks), np.ones((1, len(ranks)), np.float32))
    return dict(zip(NAMES, map(float, found[0]), strict=True))


def _units(ranks: Array, groups: Array | None) -> Array:
    return np.arange(len(ranks)) if groups is None else np.unique(groups, return_inverse=True)[1]


def _weights(units: Array, resamples: int | None) -> Iterator[Array]:
    """Yield how often each query is drawn, b n, in blocks that fit in memory."""
    resamples = resamples or min(RESAMPLES, max(FEWEST, DRAWS // len(units)))
    count = int(units.max()) + 1
    if resamples * max(count, len(units)) <= CELLS:
        yield _all_draws(count, resamples)[:, units]
        return
    generator = np.random.default_rng(0)
    block = max(1, CELLS // max(count, len(units)))
    for first in range(0, resamples, block):
        yield _draw(generator, count, min(block, resamples - first))[:, units]


@lru_cache(maxsize=2)
def _all_draws(count: int, resamples: int) -> Array:
    """Return the draws of one set, which every row of a table uses."""
    return _draw(np.random.default_rng(0), count, resamples)


def _draw(generator: np.random.Generator, count: int, size: int) -> Array:
    return generator.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float32)


def _metrics(ranks: Array, weights: Array) -> Array:
    """Return the metrics of weighted queries, b 5, in the order of `NAMES`."""
    order = np.argsort(ranks, kind="stable")
    ranks, weights = ranks[order], weights[:, order]
    totals = weights.cumsum(axis=1, dtype=np.float64)
    total = totals[:, -1]
    columns = []
    for k in RECALLS:
        within = np.searchsorted(ranks, k, side="right")
        columns.append(100.0 * (totals[:, within - 1] if within else 0.0 * total) / total)
    half = total[:, None] / 2
    middle = ranks[(totals >= half).argmax(axis=1)] + ranks[(totals > half).argmax(axis=1)]
    return np.stack([*columns, middle / 2, weights @ ranks.astype(np.float64) / total], axis=1)


def _with_limits(whole: Array, drawn: Array) -> dict[str, Interval]:
    tail = (100.0 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100.0 - tail], axis=0)
    return {name: Interval(*map(float, row)) for name, *row in zip(NAMES, whole[0], low, high, strict=True)}
