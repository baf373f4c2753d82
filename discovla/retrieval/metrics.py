"""Ranks and figures of text-video retrieval from a similarity matrix.

One tie rule: a tie counts against the query. The rank of the right item is 1 + the number of other items
that score at least as high; beside it stands the optimistic rank, 1 + the number that score strictly higher.
A model that gives every pair the same score is thus last, not first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RECALLS = (1, 5, 10, 50)

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Ranks of the right item, one per query, from 1.

    ties_against: n, int64, ties counted against the query.  optimistic: n, int64, ties counted for it.
    """

    ties_against: Array
    optimistic: Array


def retrieval_metrics(similarity: Array, groups: Sequence[int] | Array | None = None) -> dict[str, Any]:
    """Recall, median and mean rank in both directions.

    Text to video: every text is a query against all videos. Video to text: every video is a query against the
    texts of all videos, which stand for their video by the one that scores best:
    U[v, g] = max over texts i with groups[i] = g of similarity[i, v]; v's rank is that of U[v, v] in row v.

    Args:
        similarity: t v, any real dtype, higher is nearer.
        groups: t, the video of each text; None where text i describes video i.

    Returns:
        `t2v` and `v2t`, each with R@1 R@5 R@10 R@50 in percent, MdR (the median; of an even number of ranks
        the mean of the middle two) and MnR, and the same under `optimistic`.

    Raises:
        ValueError: a score that is not finite, or groups that do not fit the matrix.

    Source: CLIP4Clip section 4 for the measures, https://arxiv.org/abs/2104.08860; the tie rule is ours.
    """
    return {
        "t2v": summary(text_to_video_ranks(similarity, groups)),
        "v2t": summary(video_to_text_ranks(similarity, groups)),
    }


def summary(ranks: Ranks) -> dict[str, Any]:
    """R@k in percent, MdR and MnR of ranks, and the same keys under `optimistic`."""
    return {**_figures(ranks.ties_against), "optimistic": _figures(ranks.optimistic)}


def text_to_video_ranks(similarity: Array, groups: Sequence[int] | Array | None = None) -> Ranks:
    """For every text the rank of its video among all videos; arguments as in `retrieval_metrics`."""
    similarity, groups = checked(similarity, groups)
    target = similarity[np.arange(len(groups)), groups]
    return _ranks_in_rows(similarity, target)


def video_to_text_ranks(similarity: Array, groups: Sequence[int] | Array | None = None) -> Ranks:
    """For every video the rank of its best text among all videos' best texts."""
    similarity, groups = checked(similarity, groups)
    best = best_of_groups(similarity, groups)  # g v
    return _ranks_in_rows(best.T, best.diagonal())


def best_of_groups(similarity: Array, groups: Array) -> Array:
    """Maximum over the texts of each group, g v, groups in ascending order."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return np.maximum.reduceat(similarity[order], starts, axis=0)


def checked(similarity: Array, groups: Sequence[int] | Array | None) -> tuple[Array, Array]:
    """The matrix and the groups as arrays, after all that can be wrong with them has been looked for."""
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity: expected a matrix of texts x videos, found shape {similarity.shape}")
    if similarity.dtype.kind not in "fiu":
        raise ValueError(f"similarity: expected real numbers, found {similarity.dtype}")
    require_finite(similarity)
    return similarity, checked_groups(groups, *similarity.shape)


def require_finite(scores: Array, *, texts: Array | None = None, first_video: int = 0) -> None:
    """Refuse NaN and infinity; `texts` and `first_video` say which part of the whole matrix `scores` is."""
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        row, column = bad[0]
        text = row if texts is None else texts[row]
        raise ValueError(
            f"similarity: expected finite scores, found {len(bad)} that are not, "
            f"the first {scores[row, column]} at text {text}, video {first_video + column}"
        )


def checked_groups(groups: Sequence[int] | Array | None, texts: int, videos: int) -> Array:
    """The video of each text as t int64; None pairs text i with video i."""
    if groups is None:
        if texts != videos:
            raise ValueError(
                f"similarity: expected as many texts as videos without groups, found {texts} and {videos}"
            )
        return np.arange(texts)
    found = np.asarray(groups)
    if found.shape != (texts,) or found.dtype.kind not in "iu":
        raise ValueError(
            f"groups: expected the video of each of {texts} texts as integers, "
            f"found {found.dtype} of shape {found.shape}"
        )
    outside = np.flatnonzero((found < 0) | (found >= videos))
    if len(outside):
        raise ValueError(f"groups: expected 0..{videos - 1}, found {found[outside[0]]} for text {outside[0]}")
    bare = np.flatnonzero(np.bincount(found, minlength=videos) == 0)
    if len(bare):
        raise ValueError(
            f"groups: expected a text for every video, found none for {len(bare)}, e.g. video {bare[0]}"
        )
    return found.astype(np.int64)


def _ranks_in_rows(scores: Array, target: Array) -> Ranks:
    """Rank of each row's target among the scores of that row, the target's own among them."""
    column = target[:, None]
    return Ranks(
        ties_against=(scores >= column).sum(axis=1),
        optimistic=1 + (scores > column).sum(axis=1),
    )


def _figures(ranks: Array) -> dict[str, float]:
    recalls = {f"R@{k}": 100.0 * float(np.mean(ranks <= k)) for k in RECALLS}
    return {**recalls, "MdR": float(np.median(ranks)), "MnR": float(np.mean(ranks))}


def dual_softmax(similarity: Array) -> tuple[Array, Array]:
    """Similarities weighed by how much each item prefers its query: one matrix per direction.

    text to video: S[i, j] · exp(S[i, j]) / Σ_k exp(S[k, j]), over all texts k of the test set;
    video to text: S[i, j] · exp(S[i, j]) / Σ_k exp(S[i, k]), over all its videos.
    Where S has negative entries the factor S is first lifted by its minimum, since a product with a negative
    score would reverse the order. It needs every query at once and supposes that queries and items pair off:
    figures with it belong beside the raw ones, never in their place.

    Args:
        similarity: t v, logits as they enter the softmax of the training loss.

    Returns:
        The matrix to rank texts' videos by and the one to rank videos' texts by, both t v float64.

    Source: the dual softmax of CAMoE, applied at test time, https://arxiv.org/abs/2109.04290
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    require_finite(similarity)
    lifted = similarity - min(similarity.min(), 0.0)
    return lifted * _softmax(similarity, axis=0), lifted * _softmax(similarity, axis=1)


def qb_norm(similarity: Array, bank: Array, *, beta: float = 20.0, k: int = 1) -> Array:
    """Text-to-video similarities normalised by a bank of other texts, where a hub is suspected.

    A video is active if it is among the k best of some text of the bank. A text whose best video is active
    gets β S[i, j] - log Σ_b exp(β bank[b, j]), the logarithm of the dynamic inverted softmax; any other keeps
    the order of its scores. Only one row's scores are comparable: this ranks videos for a text, nothing else.

    Args:
        similarity: t v, cosines of the test texts and videos.
        bank: b v, cosines of other texts (the training captions) and the same videos.
        beta: inverse temperature.
        k: how many videos each text of the bank makes active.

    Returns:
        t v float64.

    Raises:
        ValueError: the two have different videos, the bank is empty, or a score is not finite.

    Source: querybank normalisation with the dynamic inverted softmax, https://arxiv.org/abs/2112.12777
    """
    similarity, bank = np.asarray(similarity, dtype=np.float64), np.asarray(bank, dtype=np.float64)
    if bank.ndim != 2 or not len(bank) or bank.shape[1:] != similarity.shape[1:]:
        raise ValueError(f"bank: expected texts x {similarity.shape[1]} videos, found shape {bank.shape}")
    if not 1 <= k <= bank.shape[1]:
        raise ValueError(f"k: expected 1..{bank.shape[1]}, found {k}")
    require_finite(similarity)
    require_finite(bank)
    active = np.unique(np.argpartition(-bank, k - 1, axis=1)[:, :k])
    hubbed = np.isin(similarity.argmax(axis=1), active)
    scaled = beta * similarity
    return np.where(hubbed[:, None], scaled - _log_sum_exp(beta * bank, axis=0), scaled)


def _log_sum_exp(x: Array, *, axis: int) -> Array:
    top = x.max(axis=axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))


def _softmax(x: Array, *, axis: int) -> Array:
    return np.exp(x - _log_sum_exp(x, axis=axis))
