"""Ranks of the matching item and the tie rule, from a similarity matrix or from its tiles.

The tie rule: a tie counts against the query. The rank of the matching item is 1 + the number of other items
with a score at least as high; the optimistic rank beside it is 1 + the number with a strictly higher score.
A model that gives every pair the same score is therefore last, not first. `count_above` and
`Ranks.from_counts` implement the rule; `ops.rank_of_positive` implements it again for GPUs and is tested
against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
TileOf = Callable[[Array, slice], Array]  # indices of texts, slice of videos -> scores t v


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Ranks of the matching item from 1, one per query.

    ties_against: n, int64, ties counted against the query.  optimistic: n, int64, ties counted for it.
    """

    ties_against: Array
    optimistic: Array

    @classmethod
    def from_counts(cls, counts: Array) -> Ranks:
        """Make ranks from the summed results of `count_above`, 2 n."""
        return cls(ties_against=counts[0], optimistic=1 + counts[1])


def count_above(scores: Array, target: Array, *, axis: int) -> Array:
    """Count the scores that reach the target and those that exceed it, 2 n.

    The target's own score is among `scores`, in one of the tiles if there are several, and reaches itself.
    """
    return np.stack([(scores >= target).sum(axis=axis), (scores > target).sum(axis=axis)])


def text_to_video_ranks(similarity: Array, groups: Sequence[int] | Array | None = None) -> Ranks:
    """Rank each text's video among all videos.

    Args:
        similarity: t v, any real dtype; higher is closer.
        groups: t, the video of each text; None if text i describes video i.

    Raises:
        ValueError: a score that is not finite, or groups that do not fit the matrix.
    """
    similarity, groups = checked(similarity, groups)
    target = similarity[np.arange(len(groups)), groups]
    return Ranks.from_counts(count_above(similarity, target[:, None], axis=1))


def video_to_text_ranks(similarity: Array, groups: Sequence[int] | Array | None = None) -> Ranks:
    """Rank each video's best text among the best texts of all videos; arguments as `text_to_video_ranks`.

    With U[g, v] = max over texts i with groups[i] = g of similarity[i, v], the rank of v is that of U[v, v]
    in column v.
    """
    similarity, groups = checked(similarity, groups)
    best = best_of_groups(similarity, groups)  # g v
    return Ranks.from_counts(count_above(best, best.diagonal(), axis=0))


def best_of_groups(similarity: Array, groups: Array) -> Array:
    """Return the maximum over the texts of each group, g v, groups in ascending order."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return np.maximum.reduceat(similarity[order], starts, axis=0)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A similarity matrix cut into tiles: complete groups of texts by runs of videos.

    groups: t, int64, the video of each text.  videos: their number.  block: largest number of rows and
    columns of a tile, except that all captions of one video share a tile.
    """

    groups: Array
    videos: int
    block: int

    def rows(self) -> Iterator[tuple[Array, slice]]:
        """Yield the texts of a run of videos and that run, over all videos."""
        order = np.argsort(self.groups, kind="stable")
        ends = np.cumsum(np.bincount(self.groups, minlength=self.videos))
        first = 0
        while first < self.videos:
            start = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, start + self.block, side="right")))
            yield order[start : ends[last - 1]], slice(first, last)
            first = last

    def columns(self) -> Iterator[slice]:
        """Yield runs of videos, over all videos."""
        for first in range(0, self.videos, self.block):
            yield slice(first, min(first + self.block, self.videos))


def streamed_ranks(
    tile: TileOf,
    texts: int,
    videos: int,
    groups: Sequence[int] | Array | None = None,
    *,
    block: int = 1024,
    on_tile: Callable[[Array, slice, Array], None] | None = None,
) -> tuple[Ranks, Ranks]:
    """Rank text to video and video to text with one tile in memory at a time; equal to ranks of the matrix.

    The scores of matching pairs are read first, from the same tiles as they are compared in: a tile of
    another shape may round differently, and a score must tie with itself.

    Args:
        tile: returns the scores of some texts and a run of videos, t v, and the same scores each time.
        texts, videos: their numbers.
        groups: t, the video of each text; None if text i describes video i.
        block: rows and columns of a tile.
        on_tile: called once with each tile: its texts, its run of videos and its scores.

    Raises:
        ValueError: a score that is not finite, or groups that do not fit.
    """
    tiles = Tiles(groups=checked_groups(groups, texts, videos), videos=videos, block=block)
    text_target, video_target = _targets(tile, tiles)
    text_counts, video_counts = np.zeros((2, texts), np.int64), np.zeros((2, videos), np.int64)
    for rows, _ in tiles.rows():
        for columns in tiles.columns():
            scores = _finite(tile(rows, columns), rows, columns)
            if on_tile is not None:
                on_tile(rows, columns, scores)
            text_counts[:, rows] += count_above(scores, text_target[rows, None], axis=1)
            best = best_of_groups(scores, tiles.groups[rows])
            video_counts[:, columns] += count_above(best, video_target[columns], axis=0)
    return Ranks.from_counts(text_counts), Ranks.from_counts(video_counts)


def _targets(tile: TileOf, tiles: Tiles) -> tuple[Array, Array]:
    """Return the score of each text with its video, and of each video with the best of its texts."""
    text_target = np.zeros(len(tiles.groups))
    for rows, own in tiles.rows():
        for columns in tiles.columns():
            if columns.start >= own.stop or columns.stop <= own.start:
                continue
            video = tiles.groups[rows]
            inside = (video >= columns.start) & (video < columns.stop)
            scores = _finite(tile(rows, columns), rows, columns)
            text_target[rows[inside]] = scores[inside, video[inside] - columns.start]
    return text_target, best_of_groups(text_target[:, None], tiles.groups)[:, 0]


def _finite(scores: Array, rows: Array, columns: slice) -> Array:
    require_finite(scores, texts=rows, first_video=columns.start)
    return scores


def checked(similarity: Array, groups: Sequence[int] | Array | None) -> tuple[Array, Array]:
    """Return the matrix and the groups as arrays, or raise ValueError if either is unfit."""
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity: expected a matrix of texts x videos, found shape {similarity.shape}")
    if similarity.dtype.kind not in "fiu":
        raise ValueError(f"similarity: expected real numbers, found {similarity.dtype}")
    require_finite(similarity)
    return similarity, checked_groups(groups, *similarity.shape)


def require_finite(scores: Array, *, texts: Array | None = None, first_video: int = 0) -> None:
    """Raise ValueError on NaN or infinity; `texts` and `first_video` locate a tile in the matrix."""
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        row, column = bad[0]
        text = row if texts is None else texts[row]
        raise ValueError(
            f"similarity: expected finite scores, found {len(bad)} that are not, "
            f"the first {scores[row, column]} at text {text}, video {first_video + column}"
        )


def checked_groups(groups: Sequence[int] | Array | None, texts: int, videos: int) -> Array:
    """Return the video of each text, t int64; None pairs text i with video i."""
    if groups is None:
        if texts != videos:
            raise ValueError(
                f"similarity: expected as many texts as videos without groups, found {texts} and {videos}"
            )
        return np.arange(texts)
    groups = np.asarray(groups)
    if groups.shape != (texts,) or groups.dtype.kind not in "iu":
        raise ValueError(
            f"groups: expected the video of each of {texts} texts as integers, "
            f"found {groups.dtype} of shape {groups.shape}"
        )
    outside = np.flatnonzero((groups < 0) | (groups >= videos))
    if len(outside):
        raise ValueError(
            f"groups: expected 0..{videos - 1}, found {groups[outside[0]]} for text {outside[0]}"
        )
    bare = np.flatnonzero(np.bincount(groups, minlength=videos) == 0)
    if len(bare):
        raise ValueError(
            f"groups: expected a text for every video, found none for {len(bare)}, e.g. video {bare[0]}"
        )
    return groups.astype(np.int64)
