"""Compare the probabilities of an index with how often its hits are right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from discovla.search.calibrate import LEAST
from discovla.search.index import Index
from discovla.search.records import TextQuery
from discovla.search.sources import SourceVideo

CAPTIONS = 500  # that are searched at most
EDGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)  # of the bins of probability


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Queries whose best hit has a probability from `low` to `high`.

    queries: their number.  probability: mean of their best hits.  right: share whose best hit is right.
    """

    low: float
    high: float
    queries: int
    probability: float
    right: float


def measure_reliability(index: Index, captions: Sequence[tuple[str, SourceVideo]]) -> list[ReliabilityBin]:
    """Compare the probability of best hits with how often they are right.

    Each caption counts twice: with all videos, and without its own, where its best hit is wrong.  Half of the
    queries thus have an answer in the index, as the calibration expects.

    Args:
        captions: each with its video, which is in the index; of more than `CAPTIONS` a sample is taken.

    Returns:
        Bins that have queries; none if the index has no probabilities.
    """
    if not index.status().calibrated:
        return []
    if len(captions) > CAPTIONS:
        captions = random.Random(0).sample(list(captions), CAPTIONS)
    ids = {(entry.video, entry.start, entry.end): entry.video_id for entry in index.videos()}
    embedded = index.embed_texts([caption for caption, _ in captions])
    probability, right = [], []
    for row, (caption, source) in enumerate(captions):
        own = ids[source.video, source.start, source.end]
        query = TextQuery(text=caption, embedding=embedded[row : row + 1])
        first, second = index.search(query, 2, merge=False).hits
        others = second if first.video_id == own else first
        probability += [first.probability, others.probability]
        right += [first.video_id == own, False]
    return reliability_bins(np.array(probability, float), np.array(right, bool))


def reliability_bins(probability: np.ndarray, right: np.ndarray) -> list[ReliabilityBin]:
    """Sort queries into bins by the probability n of their best hit, which is right n or not."""
    place = np.searchsorted(EDGES[1:-1], probability, side="right")
    return [
        ReliabilityBin(
            low=EDGES[i],
            high=EDGES[i + 1],
            queries=int(inside.sum()),
            probability=float(probability[inside].mean()),
            right=float(right[inside].mean()),
        )
        for i in range(len(EDGES) - 1)
        if (inside := place == i).any()
    ]


def reliability_table(bins: Sequence[ReliabilityBin]) -> str:
    """Return the bins as lines, under a sentence that says what they are."""
    if not bins:
        return (
            f"the index has no probabilities: it has fewer than {LEAST} moments, or captions to calibrate it"
        )
    lines = [
        "best hits of captions, each with its own clip in the index and without:",
        "probability   queries   mean   right",
    ]
    for one in bins:
        span = f"{one.low:.1f} to {one.high:.1f}"
        lines.append(f"{span:11s} {one.queries:9,d} {one.probability:6.2f} {one.right:7.2f}")
    return "\n".join(lines)
