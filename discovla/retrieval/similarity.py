"""Scores of embedded captions and videos: tiles, the complete matrix, and ranks of pooled features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.methods.base import Method
from discovla.ops.rank_of_positive import rank_of_positive
from discovla.retrieval.embed import evaluating
from discovla.retrieval.ranks import Array, Ranks, TileOf, checked_groups


def similarity_tile(method: Method, text: Embedding, video: Embedding, device: torch.device | str) -> TileOf:
    """Return the function that computes a tile of `method.similarity` on `device`, as an array on the CPU.

    The method scores in evaluation mode and returns to the mode it was in.
    """

    def tile(texts: Array, videos: slice) -> Array:
        rows = text[torch.from_numpy(texts)].to(device)
        with evaluating(method):
            return method.similarity(rows, video[videos].to(device)).cpu().numpy()

    return tile


def similarity_matrix(tile: TileOf, texts: int, videos: int, *, block: int = 1024) -> Array:
    """Compute the complete matrix, t v, tile by tile; for sets that fit in memory."""
    rows = [np.arange(first, min(first + block, texts)) for first in range(0, texts, block)]
    columns = [slice(first, min(first + block, videos)) for first in range(0, videos, block)]
    return np.concatenate([np.concatenate([tile(row, column) for column in columns], axis=1) for row in rows])


def pooled_ranks(
    text: Tensor,
    video: Tensor,
    groups: Sequence[int] | Array | None = None,
    *,
    dual_softmax_scale: float | None = None,
) -> tuple[Ranks, Ranks]:
    """Rank text to video and video to text by the cosines of pooled features, without storing the matrix.

    Args:
        text: t d.  video: v d.  Un-normalised, on one device.
        groups: t, the video of each text; None if text i describes video i.
        dual_softmax_scale: re-rank by `rerank.dual_softmax` of the cosines times this, in a second pass.

    Raises:
        ValueError: groups that do not fit, or a feature that is zero or not finite.
    """
    own = torch.from_numpy(checked_groups(groups, len(text), len(video))).to(text.device)
    every = torch.arange(len(video), device=video.device)
    t2v = rank_of_positive(text, video, own, dual_softmax_scale=dual_softmax_scale)
    v2t = rank_of_positive(video, text, every, groups=own, dual_softmax_scale=dual_softmax_scale)
    return _as_ranks(*t2v), _as_ranks(*v2t)


def _as_ranks(ties_against: Tensor, optimistic: Tensor) -> Ranks:
    return Ranks(ties_against=ties_against.cpu().numpy(), optimistic=optimistic.cpu().numpy())
