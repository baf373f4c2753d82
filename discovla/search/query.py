"""Score the moments of an index against a query: pooled features first, then the method's own similarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from discovla.batch import Embedding
from discovla.methods.base import Method
from discovla.ops.top_k import top_of_scores
from discovla.retrieval.embed import evaluating
from discovla.retrieval.rerank import dual_softmax, qb_norm
from discovla.retrieval.similarity import similarity_matrix, similarity_tile
from discovla.search.filters import Column
from discovla.search.store import Contents, Store, VideoRow

Correction = Literal["none", "dual-softmax", "qb-norm"]

CANDIDATES = 200  # moments with the closest pooled features that tokens are compared with, at least
PAIRS = 20  # the same where a network scores each pair
BACKGROUND = 256  # moments whose scores tell the level of a query's
TOKEN_MEMORY = 1 << 30  # bytes of tokens that are kept in memory
COPIED = 512  # moments whose vectors are turned at once
TOUCHING = 0.5  # seconds between two moments that may be merged


@dataclass(frozen=True, kw_only=True)
class EmbeddedQuery:
    """A query: pooled, d, of unit length; text is the embedding of one text, None of other queries.

    excluded: place of a moment that is no answer, or -1.
    """

    pooled: Tensor
    text: Embedding | None = None
    excluded: int = -1


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of the best moments, best first.

    places: c, of the moments.  values: c float32, by the method's similarity.  cosines: n float32, of pooled
    features, of all moments.  background: scores of many moments, in the unit of `values`.
    deviation: standard deviation of `cosines`.
    """

    places: np.ndarray
    values: np.ndarray
    cosines: np.ndarray
    background: np.ndarray

    @cached_property
    def deviation(self) -> float:
        return float(self.cosines.std())


@dataclass
class Loaded:
    """Contents, vectors and columns of one version of the tables, in memory."""

    store: Store
    contents: Contents
    device: torch.device

    @cached_property
    def matrix(self) -> Tensor:
        """Pooled features of all moments as unit columns, d n float32, on the device.

        On a CPU a query is multiplied with columns in 0.6 of the time that rows take.
        """
        vectors = self.store.pooled(self.contents)  # n d
        columns = torch.empty(vectors.shape[1], len(vectors))
        for first in range(0, len(vectors), COPIED):
            rows = torch.from_numpy(vectors[first : first + COPIED].astype(np.float32))
            rows /= rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
            columns[:, first : first + COPIED] = rows.T
        return columns.to(self.device)

    @cached_property
    def runs(self) -> np.ndarray:
        """Places at which the moments of another video begin, and the number of moments."""
        changes = np.flatnonzero(np.diff(self.contents.video_id)) + 1
        return np.concatenate([[0], changes, [len(self.contents)]])

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Columns of the moments: video, name, start, end, duration and the user's own."""
        contents, videos = self.contents, list(self.contents.videos.values())
        number = {row.video_id: i for i, row in enumerate(videos)}
        of_moment = np.array([number[int(one)] for one in contents.video_id], np.int64)
        whole = np.ones(len(contents), bool)
        columns = {}
        for name, column in video_columns(videos).items():
            columns[name] = Column(
                type=column.type, values=column.values[of_moment], known=column.known[of_moment]
            )
        numbers = {"start": contents.start, "end": contents.end, "duration": contents.end - contents.start}
        for name, values in numbers.items():
            columns.setdefault(name, Column(type="float", values=values, known=whole))
        return columns

    @cached_property
    def background(self) -> np.ndarray:
        """Places of a sample of moments, the same each time."""
        count = min(BACKGROUND, len(self.contents))
        return np.sort(np.random.default_rng(0).choice(len(self.contents), count, replace=False))

    @cached_property
    def background_embedding(self) -> Embedding:
        """Embedding of the moments of `background`."""
        return self.read_embedding(self.background)

    @cached_property
    def every_embedding(self) -> Embedding | None:
        """Embedding of all moments with their tokens; None if they do not fit in memory."""
        if not len(self.contents):
            return None
        first = self.read_embedding(np.zeros(1, np.int64))
        size = sum(x.numel() * x.element_size() for x in first.tensors().values())
        if size * len(self.contents) > TOKEN_MEMORY:
            return None
        return self.read_embedding(np.arange(len(self.contents)))

    def embedding(self, places: np.ndarray) -> Embedding:
        """Return the embedding of some moments, from memory if they are there."""
        every = self.every_embedding
        return self.read_embedding(places) if every is None else every[torch.from_numpy(places)]

    def read_embedding(self, places: np.ndarray) -> Embedding:
        """Read the embedding of some moments, float32 as the method compares it."""
        rows = self.store.read(self.contents, places, ["pooled", "tokens", "mask"])
        tokens = [x for row in rows if (x := self.store.vectors(row, "tokens")) is not None]
        masks = [np.frombuffer(row["mask"], bool) for row in rows if row["mask"] is not None]
        return Embedding(
            pooled=torch.from_numpy(np.stack([row["pooled"] for row in rows]).astype(np.float32)),
            tokens=torch.from_numpy(np.stack(tokens).astype(np.float32)) if tokens else None,
            mask=torch.from_numpy(np.stack(masks)) if masks else None,
        )


def video_columns(videos: Sequence[VideoRow]) -> dict[str, Column]:
    """Return the columns of videos: path, name of the file, and the user's own."""
    own = [row.own_columns() for row in videos]
    names = dict.fromkeys(name for columns in own for name in columns)
    values: dict[str, list[Any]] = {
        "video": [row.video for row in videos],
        "name": [Path(row.video).name for row in videos],
    }
    values |= {name: [columns.get(name) for columns in own] for name in names}
    return {name: Column.of(column) for name, column in values.items()}


def score(
    method: Method,
    loaded: Loaded,
    query: EmbeddedQuery,
    k: int,
    *,
    allowed: np.ndarray | None = None,
    exact: bool = False,
    bank: Embedding | None = None,
    correction: Correction = "none",
) -> Scores:
    """Score moments; at least k of them, or all that are allowed, are returned in order.

    Args:
        allowed: n bool, the moments that may be answers; None allows all.
        exact: compare the tokens of all moments, not of the candidates only.
        bank: other texts, by which `correction` weighs scores.
    """
    cosines = query.pooled.to(loaded.device) @ loaded.matrix  # n
    limited = cosines
    if allowed is not None:
        barred = torch.from_numpy(~allowed).to(cosines.device)
        limited = limited.masked_fill(barred, -torch.inf)
    if query.excluded >= 0:
        limited = limited.index_fill(0, torch.tensor([query.excluded], device=cosines.device), -torch.inf)
    count = len(cosines) if allowed is None else int(allowed.sum())
    count -= query.excluded >= 0 and (allowed is None or bool(allowed[query.excluded]))
    whole = query.text is not None and (not method.scores_pooled or correction != "none")
    wanted = max(4 * k, 64)
    if whole:
        wanted = max(PAIRS, k) if method.scores_pairs else max(CANDIDATES, 10 * k)
    wanted = count if exact else min(wanted, count)
    every = cosines.cpu().numpy()
    scale = _scale(method)
    if not wanted:
        none = np.zeros(0, np.float32)
        return Scores(places=none.astype(np.int64), values=none, cosines=every, background=scale * every)
    values, places = (x[0].cpu().numpy() for x in top_of_scores(limited[None], wanted))
    if not whole:
        return Scores(places=places, values=scale * values, cosines=every, background=scale * every)
    assert query.text is not None, "tokens are compared with those of a text"
    values = _similarity(method, query.text, loaded, places)[0]
    background = _similarity(method, query.text, loaded, loaded.background)[0]
    if correction != "none":
        assert bank is not None and len(bank), "texts to correct by"
        values = corrected(values, _similarity(method, bank, loaded, places), correction, scale)
    order = np.lexsort((places, -values))
    return Scores(places=places[order], values=values[order], cosines=every, background=background)


def corrected(values: np.ndarray, bank: np.ndarray, correction: Correction, scale: float) -> np.ndarray:
    """Weigh the scores of one text by those that other texts give the same moments.

    Args:
        values: c, scores of the text.  bank: b c, scores of the other texts.
        scale: by which scores are divided for QB-Norm, which takes cosines.

    Returns:
        c: dual softmax over the text and the bank, or QB-Norm by the bank; comparable with each other only.
    """
    if correction == "dual-softmax":
        return dual_softmax(np.concatenate([values[None], bank]))[0][0]
    return qb_norm(values[None] / scale, bank / scale)[0]


def merged(loaded: Loaded, scores: Scores, place: int, allowed: np.ndarray | None) -> range:
    """Return the places of the moments around one that answer together with it.

    They touch it or each other, and their cosines are nearer to its own than to the median of its video, or
    less than half a standard deviation of all moments below.
    """
    contents, cosines = loaded.contents, scores.cosines
    run = int(np.searchsorted(loaded.runs, place, side="right")) - 1
    low, high = int(loaded.runs[run]), int(loaded.runs[run + 1])
    above = cosines[place] - np.median(cosines[low:high])
    least = cosines[place] - max(above, scores.deviation) / 2

    def joins(one: int, first: int, second: int) -> bool:
        touches = contents.start[second] - contents.end[first] <= TOUCHING
        return bool(touches and cosines[one] >= least and (allowed is None or allowed[one]))

    first = last = place
    while first > low and joins(first - 1, first - 1, first):
        first -= 1
    while last + 1 < high and joins(last + 1, last, last + 1):
        last += 1
    return range(first, last + 1)


def frame_features(store: Store, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return times f and unit features f d of the frames of a moment, from a row of `Store.read`."""
    times = np.frombuffer(row["times"], np.float32)
    features = store.vectors(dict(row), "frames", "float16")
    if features is None:
        features = store.vectors(dict(row), "tokens")
    assert features is not None, "stored with the features of frames"
    features = features[: len(times)].astype(np.float32)
    return times, features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)


def _similarity(method: Method, text: Embedding, loaded: Loaded, places: np.ndarray) -> np.ndarray:
    """Return the method's similarity of texts and the moments at some places, t c float32."""
    parts = []
    for first in range(0, len(places), 1024):
        some = places[first : first + 1024]
        same = np.array_equal(some, loaded.background)
        video = loaded.background_embedding if same else loaded.embedding(some)
        tile = similarity_tile(method, text, video, loaded.device)
        parts.append(similarity_matrix(tile, len(text), len(video)))
    return np.concatenate(parts, axis=1)


def _scale(method: Method) -> float:
    with evaluating(method):
        return float(method.logit_scale())
