"""Re-ranking of a similarity matrix at test time: dual softmax and QB-Norm."""

from __future__ import annotations

import numpy as np

from discovla.retrieval.ranks import Array, require_finite


def dual_softmax(similarity: Array) -> tuple[Array, Array]:
    """Weight every score by how much its item prefers the query, one matrix for each direction.

    text to video: S[i, j] · exp(S[i, j]) / Σ_k exp(S[k, j]), over all texts k of the test set;
    video to text: S[i, j] · exp(S[i, j]) / Σ_k exp(S[i, k]), over all its videos.
    If S has negative entries, the factor S is first raised by its minimum, because a product with a negative
    score would reverse the order. The result depends on all queries and assumes that queries and items pair
    off: report it beside the raw metrics, never in their place.

    Args:
        similarity: t v, logits as they enter the softmax of the training loss.

    Returns:
        The matrix that ranks videos for texts and the one that ranks texts for videos, both t v float64.

    Source: the dual softmax of CAMoE, applied at test time, https://arxiv.org/abs/2109.04290
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    require_finite(similarity)
    lifted = similarity - min(similarity.min(), 0.0)
    return lifted * _softmax(similarity, axis=0), lifted * _softmax(similarity, axis=1)


def qb_norm(similarity: Array, bank: Array, *, beta: float = 20.0, k: int = 1) -> Array:
    """Normalise text-to-video scores by a bank of other texts, for texts whose best video is a likely hub.

    A video is active if it is among the k best of some text of the bank. A text whose best video is active
    gets β S[i, j] - log Σ_b exp(β bank[b, j]), the logarithm of the dynamic inverted softmax; any other text
    keeps the order of its scores. Scores are comparable within one row only: they rank videos for a text.

    Args:
        similarity: t v, cosines of the test texts and videos.
        bank: b v, cosines of other texts (the training captions) and the same videos.
        beta: inverse temperature.
        k: number of videos that each text of the bank makes active.

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
