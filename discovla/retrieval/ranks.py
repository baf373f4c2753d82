"""Ranks without the whole similarity matrix: tile after tile, never more than one in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.methods.base import Method
from discovla.ops.rank_of_positive import rank_of_positive
from discovla.retrieval.embed import evaluating
from discovla.retrieval.metrics import Ranks, best_of_groups, checked_groups, require_finite

Array = np.ndarray[Any, np.dtype[Any]]
TileOf = Callable[[Array, slice], Array]  # indices of texts, slice of videos -> t v


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a similarity matrix is cut: whole groups of texts by runs of videos.

    groups: t, int64, the video of each text.  videos: how many.  block: how many rows and columns a tile has
    at most; but a video with more captions than that still has all of them in one tile.
    """

    groups: Array
    videos: int
    block: int

    def rows(self) -> Iterator[tuple[Array, slice]]:
        """Texts of a run of videos, and that run, until every video has had its turn."""
        order = np.argsort(self.groups, kind="stable")
        ends = np.cumsum(np.bincount(self.groups, minlength=self.videos))
        first = 0
        while first < self.videos:
            start = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, start + self.block, side="right")))
            yield order[start : ends[last - 1]], slice(first, last)
            first = last

    def columns(self) -> Iterator[slice]:
        """Runs of videos."""
        for first in range(0, self.videos, self.block):
            yield slice(first, min(first + self.block, self.videos))


def similarity_tile(method: Method, text: Embedding, video: Embedding, device: torch.device | str) -> TileOf:
    """The function that makes a tile of `method.similarity` on `device`, as a float array on the CPU.

    It scores in evaluation mode, in whichever mode the method is.
    """

    def tile(texts: Array, videos: slice) -> Array:
        rows = text[torch.from_numpy(texts)].to(device)
        with evaluating(method):
            return method.similarity(rows, video[videos].to(device)).cpu().numpy()

    return tile


def streamed_ranks(
    tile: TileOf, texts: int, videos: int, groups: Sequence[int] | Array | None = None, *, block: int = 1024
) -> tuple[Ranks, Ranks]:
    """Ranks text to video and video to text, equal to those of the whole matrix.

    The scores of the right pairs are taken first, from the very tiles they are then compared in: a tile of
    another shape may round differently, and a score must tie with itself.

    Args:
        tile: gives the scores of some texts and a run of videos, t v; the same each time it is asked.
        texts, videos: how many there are.
        groups: t, the video of each text; None where text i describes video i.
        block: rows and columns of a tile.

    Raises:
        ValueError: a score that is not finite, or groups that do not fit.
    """
    tiles = Tiles(groups=checked_groups(groups, texts, videos), videos=videos, block=block)
    text_target, video_target = _targets(tile, tiles)
    text_counts, video_counts = np.zeros((2, texts), np.int64), np.zeros((2, videos), np.int64)
    for rows, _ in tiles.rows():
        for columns in tiles.columns():
            scores = _finite(tile(rows, columns), rows, columns)
            text_counts[:, rows] += _counts(scores, text_target[rows, None], axis=1)
            best = best_of_groups(scores, tiles.groups[rows])
            video_counts[:, columns] += _counts(best, video_target[columns], axis=0)
    return _ranks(text_counts), _ranks(video_counts)


def pooled_ranks(
    text: Tensor,
    video: Tensor,
    groups: Sequence[int] | Array | None = None,
    *,
    dual_softmax_scale: float | None = None,
) -> tuple[Ranks, Ranks]:
    """Ranks text to video and video to text by the cosines of pooled features, which no memory ever holds.

    Args:
        text: t d.  video: v d.  Un-normalised, on one device.
        groups: t, the video of each text; None where text i describes video i.
        dual_softmax_scale: re-weigh as `metrics.dual_softmax` does the cosines times this, in a second pass.

    Raises:
        ValueError: groups that do not fit, or a feature that is zero or not finite.
    """
    found = checked_groups(groups, len(text), len(video))
    own, every = torch.from_numpy(found).to(text.device), torch.arange(len(video), device=video.device)
    t2v = rank_of_positive(text, video, own, dual_softmax_scale=dual_softmax_scale)
    v2t = rank_of_positive(video, text, every, groups=own, dual_softmax_scale=dual_softmax_scale)
    return _as_ranks(*t2v), _as_ranks(*v2t)


def similarity_matrix(tile: TileOf, texts: int, videos: int, *, block: int = 1024) -> Array:
    """The whole matrix, t v, for sets that are small enough."""
    rows = [np.arange(first, min(first + block, texts)) for first in range(0, texts, block)]
    columns = [slice(first, min(first + block, videos)) for first in range(0, videos, block)]
    return np.concatenate([np.concatenate([tile(row, column) for column in columns], axis=1) for row in rows])


def _targets(tile: TileOf, tiles: Tiles) -> tuple[Array, Array]:
    """Score of each text with its video, and of each video with the best of its texts."""
    text_target = np.zeros(len(tiles.groups))
    for rows, own in tiles.rows():
        for columns in tiles.columns():
            if columns.start >= own.stop or columns.stop <= own.start:
                continue
            video = tiles.groups[rows]
            here = (video >= columns.start) & (video < columns.stop)
            scores = _finite(tile(rows, columns), rows, columns)
            text_target[rows[here]] = scores[here, video[here] - columns.start]
    return text_target, best_of_groups(text_target[:, None], tiles.groups)[:, 0]


def _counts(scores: Array, target: Array, *, axis: int) -> Array:
    """How many scores reach the target and how many exceed it, 2 n."""
    return np.stack([(scores >= target).sum(axis=axis), (scores > target).sum(axis=axis)])


def _ranks(counts: Array) -> Ranks:
    return Ranks(ties_against=counts[0], optimistic=1 + counts[1])


def _as_ranks(ties_against: Tensor, optimistic: Tensor) -> Ranks:
    return Ranks(ties_against=ties_against.cpu().numpy(), optimistic=optimistic.cpu().numpy())


def _finite(scores: Array, rows: Array, columns: slice) -> Array:
    require_finite(scores, texts=rows, first_video=columns.start)
    return scores
