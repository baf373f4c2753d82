"""Recall, median and mean rank of text-video retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from discovla.retrieval.ranks import Array, Ranks, text_to_video_ranks, video_to_text_ranks

RECALLS = (1, 5, 10, 50)


def retrieval_metrics(similarity: Array, groups: Sequence[int] | Array | None = None) -> dict[str, Any]:
    """Compute the metrics of both directions from a similarity matrix.

    Text to video: every text is a query against all videos. Video to text: every video is a query against all
    videos' texts, each video represented by its best-scoring text.

    Args:
        similarity: t v, any real dtype; higher is closer.
        groups: t, the video of each text; None if text i describes video i.

    Returns:
        `t2v` and `v2t`, each with R@1 R@5 R@10 R@50 in percent, MdR (median rank; of an even number of ranks
        the mean of the middle two), MnR (mean rank), and the same keys under `optimistic`. Ties: see
        `ranks`.

    Raises:
        ValueError: a score that is not finite, or groups that do not fit the matrix.

    Source: CLIP4Clip section 4 for the measures, https://arxiv.org/abs/2104.08860; the tie rule is ours.
    """
    return {
        "t2v": summary(text_to_video_ranks(similarity, groups)),
        "v2t": summary(video_to_text_ranks(similarity, groups)),
    }


def summary(ranks: Ranks) -> dict[str, Any]:
    """Return R@k in percent, MdR and MnR of ranks, and the same keys under `optimistic`."""
    return {**_metrics(ranks.ties_against), "optimistic": _metrics(ranks.optimistic)}


def _metrics(ranks: Array) -> dict[str, float]:
    recalls = {f"R@{k}": 100.0 * float(np.mean(ranks <= k)) for k in RECALLS}
    return {**recalls, "MdR": float(np.median(ranks)), "MnR": float(np.mean(ranks))}
