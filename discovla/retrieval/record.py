"""Per-query results of an evaluation: ranks, best videos and a sample of scores, and their file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from discovla.files import remove_unfinished, replacing
from discovla.retrieval.ranks import Array, Ranks

TOP = 5  # best videos kept for every text
NEGATIVES = 20_000  # largest number of scores kept of texts with videos of others


@dataclass(frozen=True, kw_only=True)
class EvaluatedClip:
    """A clip of the evaluated split; video, start and end locate its frames."""

    id: str
    video: str
    captions: tuple[str, ...]
    split: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Per-query results, of the scores that give the metrics.

    ranks: setting ("raw", "dual softmax", "QB-Norm") to direction ("t2v", "v2t") to ranks from 1, ties
        counted against the query.
    groups: t, int64, the video of each text.
    top: t k, int64, the k best videos of each text, best first.
    top_scores: t k, float32, their cosines, or token-wise similarities.
    positive: t, float32, score of each text with its own video.
    negative: n, float32, scores of a seeded sample of texts and videos that do not belong together.
    clips: v, in the order of the videos.
    title: of the evaluated model.  step: optimizer steps taken.
    """

    ranks: Mapping[str, Mapping[str, Array]]
    groups: Array
    top: Array
    top_scores: Array
    positive: Array
    negative: Array
    clips: tuple[EvaluatedClip, ...] = ()
    title: str = ""
    step: int = 0

    @property
    def captions(self) -> list[str]:
        """Return the captions of all clips, in the order of the texts."""
        return [caption for clip in self.clips for caption in clip.captions]

    def save(self, path: Path) -> None:
        """Write an .npz file, completely or not at all."""
        names = ("groups", "top", "top_scores", "positive", "negative")
        arrays = {name: getattr(self, name) for name in names}
        for i, directions in enumerate(self.ranks.values()):
            arrays |= {f"ranks_{i}_{direction}": ranks for direction, ranks in directions.items()}
        meta = {
            "title": self.title,
            "step": self.step,
            "settings": list(self.ranks),
            "clips": [asdict(clip) for clip in self.clips],
        }
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        remove_unfinished(path.parent, path.name)
        with replacing(path) as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> EvaluationRecord:
        """Read a file that `save` wrote.

        Raises:
            ValueError: another file, or a damaged one; the message has its name.
            OSError: the file cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            meta = json.loads(arrays.pop("meta").tobytes())
            ranks = {
                setting: {
                    direction: arrays.pop(f"ranks_{i}_{direction}")
                    for direction in ("t2v", "v2t")
                    if f"ranks_{i}_{direction}" in arrays
                }
                for i, setting in enumerate(meta.pop("settings"))
            }
            clips = tuple(
                EvaluatedClip(**{**clip, "captions": tuple(clip["captions"])}) for clip in meta.pop("clips")
            )
            return cls(**arrays, **meta, ranks=ranks, clips=clips)
        except OSError:
            raise
        except Exception as error:  # whatever zip, numpy, JSON or a missing key raise
            raise ValueError(f"{path}: expected a record of an evaluation: {error}") from None


class ScoreCollector:
    """Collects the best videos, the scores of matching pairs and a sample of the others, tile by tile.

    Every pair of a text and a video must be added once, in any number of tiles.

    Args:
        groups: t, the video of each text.
        videos: their number.
        scale: number by which scores are divided.
    """

    def __init__(self, groups: Array, videos: int, *, scale: float = 1.0) -> None:
        self.groups, self.videos, self.scale = groups, videos, scale
        k = min(TOP, videos)
        self.top = np.full((len(groups), k), -1, np.int64)
        self.top_scores = np.full((len(groups), k), -np.inf, np.float64)
        self.positive = np.full(len(groups), np.nan, np.float32)
        self.pairs = negative_pairs(groups, videos)
        self.negative = np.full(len(self.pairs[0]), np.nan, np.float32)
        self._row_of = np.full(len(groups), -1)  # row of each text in the current tile

    def add(self, texts: Array, columns: slice, scores: Array) -> None:
        """Add the scores of some texts and a run of videos, t v."""
        scores = np.asarray(scores, np.float64) / self.scale
        k = self.top.shape[1]
        best = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
        values = np.concatenate([self.top_scores[texts], np.take_along_axis(scores, best, 1)], axis=1)
        indices = np.concatenate([self.top[texts], best + columns.start], axis=1)
        order = np.lexsort((indices, -values))[:, :k]
        self.top_scores[texts] = np.take_along_axis(values, order, 1)
        self.top[texts] = np.take_along_axis(indices, order, 1)

        own = self.groups[texts]
        inside = (own >= columns.start) & (own < columns.stop)
        self.positive[texts[inside]] = scores[inside, own[inside] - columns.start]
        self._row_of[texts] = np.arange(len(texts))
        rows, videos = self._row_of[self.pairs[0]], self.pairs[1]
        inside = (rows >= 0) & (videos >= columns.start) & (videos < columns.stop)
        self.negative[inside] = scores[rows[inside], videos[inside] - columns.start]
        self._row_of[texts] = -1

    def record(self, ranks: Mapping[str, Mapping[str, Ranks]]) -> EvaluationRecord:
        """Return the record of all tiles with the ranks of every setting and direction."""
        return EvaluationRecord(
            ranks=ranks_of(ranks),
            groups=self.groups,
            top=self.top,
            top_scores=self.top_scores.astype(np.float32),
            positive=self.positive,
            negative=self.negative,
        )


def ranks_of(ranks: Mapping[str, Mapping[str, Ranks]]) -> dict[str, dict[str, Array]]:
    """Return the ranks with ties counted against the query."""
    return {
        setting: {direction: values.ties_against for direction, values in directions.items()}
        for setting, directions in ranks.items()
    }


def negative_pairs(groups: Array, videos: int) -> tuple[Array, Array]:
    """Return a seeded sample of texts and of videos that do not belong to them; empty for one video."""
    if videos < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    generator = np.random.default_rng(0)
    count = min(NEGATIVES, 20 * len(groups))
    texts = generator.integers(len(groups), size=count)
    others = generator.integers(videos - 1, size=count)
    return texts, others + (others >= groups[texts])


def with_clips(
    record: EvaluationRecord, clips: Sequence[Any], *, title: str = "", step: int = 0
) -> EvaluationRecord:
    """Return the record with its clips, which have the fields of a manifest's `Clip`."""
    evaluated = tuple(
        EvaluatedClip(
            id=clip.id,
            video=str(clip.video),
            captions=tuple(clip.captions),
            split=clip.split,
            start=clip.start,
            end=clip.end,
        )
        for clip in clips
    )
    return replace(record, clips=evaluated, title=title, step=step)
