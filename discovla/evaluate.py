"""Evaluation of a method on clips, of a similarity matrix from anywhere, and the table that shows either."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discovla.batch import Embedding
from discovla.data.dataset import check_captions, read_clips
from discovla.data.loader import DataConfig, text_batches, video_batches
from discovla.data.manifest import Clip
from discovla.data.video.errors import DecodeError
from discovla.methods.base import Method
from discovla.retrieval.embed import embed_texts, embed_videos, in_order
from discovla.retrieval.metrics import (
    Ranks,
    dual_softmax,
    qb_norm,
    retrieval_metrics,
    summary,
    text_to_video_ranks,
    video_to_text_ranks,
)
from discovla.retrieval.ranks import pooled_ranks, similarity_matrix, similarity_tile, streamed_ranks

logger = logging.getLogger(__name__)

LARGEST_MATRIX = 64_000_000  # scores; larger sets are ranked without it
BANK = 5_000  # captions QB-Norm takes at most; more change little and cost memory
FIGURES = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}

Metrics = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a set is evaluated.

    data: how clips are decoded and captions cut.  batch_size: clips or captions at once.
    rerank: whether dual softmax and QB-Norm stand beside the raw figures.
    bank: training captions for QB-Norm, which is left out without them.
    rank, world_size, gather: this process, how many there are, and what collects an object from all in order.
    """

    data: DataConfig
    device: torch.device | str = "cpu"
    batch_size: int = 64
    rerank: bool = False
    bank: Sequence[str] = ()
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda share: [share]


def evaluate(method: Method, clips: Sequence[Clip], how: Evaluation) -> dict[str, Metrics]:
    """Retrieval among the captions and videos of `clips`.

    Args:
        method: lies on `how.device`, whole on every process.
        clips: each with one caption or several.

    Returns:
        Name to figures: `raw` in both directions, then `dual softmax` and, text to video alone, `QB-Norm`.

    Raises:
        DecodeError: a clip that cannot be decoded: a figure over fewer clips would not be comparable.
        ValueError: no clips, similarities that are not finite, or captions longer than the context where
            `how.data` refuses them.
    """
    if not clips:
        raise ValueError("evaluation: expected at least one clip, found none")
    check_captions(clips, how.data.context_length, long=how.data.long_captions)
    texts = [caption for clip in clips for caption in clip.captions]
    groups = np.repeat(np.arange(len(clips)), [len(clip.captions) for clip in clips])
    text, video = _embedded_texts(method, texts, how), _embedded_videos(method, clips, how)
    large = len(texts) * len(clips) > LARGEST_MATRIX
    if method.scores_pooled and (large or not how.rerank):
        return _pooled_metrics(method, text, video, groups, how)
    tile = similarity_tile(method, text, video, how.device)
    if large:
        if how.rerank:
            logger.warning("%d x %d scores: ranked in tiles, without re-ranking", len(texts), len(clips))
        return {"raw": _summaries(streamed_ranks(tile, len(texts), len(clips), groups))}
    matrix = similarity_matrix(tile, len(texts), len(clips))
    results = {"raw": retrieval_metrics(matrix, groups)}
    if how.rerank:
        results["dual softmax"] = _dual_softmax_metrics(matrix, groups)
    if how.rerank and how.bank:
        bank = _bank_similarity(method, video, how)
        cosines = matrix / method.logit_scale().item()
        results["QB-Norm"] = {"t2v": summary(text_to_video_ranks(qb_norm(cosines, bank), groups))}
    return results


def evaluate_manifest(
    method: Method, manifest: str | Path | None, split: str, how: Evaluation
) -> dict[str, Metrics]:
    """`evaluate` on one split of a manifest, re-ranked too; QB-Norm's bank is its training captions, if any.

    Without a manifest the clips are those of `how.data`, from its manifest or its shards.

    Raises:
        ValueError: the manifest cannot be read or has no clips in the split; and as `evaluate`.
        DecodeError: as `evaluate`.
    """
    if manifest is not None:
        data = how.data.model_copy(update={"manifest": Path(manifest), "shards": None})
        how = replace(how, data=data)
    clips = read_clips(how.data, split)
    bank = []
    # a bank of the queries themselves would be dual softmax by another name
    if split != how.data.train_split:
        train = (clip for clip in read_clips(how.data, None) if clip.split == how.data.train_split)
        bank = [caption for clip in train for caption in clip.captions]
    return evaluate(method, clips, replace(how, rerank=True, bank=bank))


def evaluate_matrix(path: str | Path, groups: str | Path | None = None) -> Metrics:
    """Figures of a similarity matrix that any model has written.

    Args:
        path: a .npy file, texts x videos.
        groups: a JSON list with the video of each text; None where text i describes video i.

    Returns:
        As `retrieval_metrics`.

    Raises:
        ValueError: a file that does not hold what it should; it is named.
        OSError: a file that cannot be read.
    """
    try:
        matrix = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected a .npy file with a matrix of numbers: {error}") from None
    try:
        return retrieval_metrics(matrix, None if groups is None else _read_groups(groups))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def results_table(rows: Mapping[str, Metrics]) -> str:
    """The figures of several models or settings, one line each, both directions side by side.

    Where ties change a figure, a second line counts them for the query. A direction that was not measured
    shows dashes.
    """
    lines = {}
    for name, metrics in rows.items():
        lines[name] = _cells(metrics)
        for_query = {way: figures["optimistic"] for way, figures in metrics.items()}
        if _cells(for_query) != lines[name]:
            lines[f"{name}, ties for the query"] = _cells(for_query)
    width = max(map(len, lines), default=0)
    ways = "   ".join(title.center(7 * len(FIGURES)) for title in DIRECTIONS.values())
    heads = "   ".join("".join(f"{figure:>7}" for figure in FIGURES) for _ in DIRECTIONS)
    body = [f"{name:<{width}} {cells}" for name, cells in lines.items()]
    return "\n".join(line.rstrip() for line in [" " * width + " " + ways, " " * width + " " + heads, *body])


def _cells(metrics: Metrics) -> str:
    return "   ".join(
        "".join(f"{metrics[way][figure]:7.1f}" if way in metrics else f"{'-':>7}" for figure in FIGURES)
        for way in DIRECTIONS
    )


def _read_groups(path: str | Path) -> list[int]:
    """A JSON list of integers."""
    try:
        groups = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON list of integers: {error}") from None
    if not isinstance(groups, list) or not all(type(group) is int for group in groups):
        raise ValueError(f"{path}: expected a JSON list of integers, the video of each text")
    return groups


def _pooled_metrics(
    method: Method, text: Embedding, video: Embedding, groups: np.ndarray, how: Evaluation
) -> dict[str, Metrics]:
    """Figures of a method that scores pooled features, without a matrix; QB-Norm would need one."""
    features = text.pooled.to(how.device), video.pooled.to(how.device)
    results = {"raw": _summaries(pooled_ranks(*features, groups))}
    if how.rerank:
        scale = method.logit_scale().item()
        results["dual softmax"] = _summaries(pooled_ranks(*features, groups, dual_softmax_scale=scale))
    if how.rerank and how.bank:
        logger.warning("%d x %d scores: ranked without QB-Norm, which needs them all", len(text), len(video))
    return results


def _summaries(ranks: tuple[Ranks, Ranks]) -> Metrics:
    """Text to video and video to text."""
    return {"t2v": summary(ranks[0]), "v2t": summary(ranks[1])}


def _dual_softmax_metrics(matrix: np.ndarray, groups: np.ndarray) -> Metrics:
    by_text, by_video = dual_softmax(matrix)
    return _summaries((text_to_video_ranks(by_text, groups), video_to_text_ranks(by_video, groups)))


def _bank_similarity(method: Method, video: Embedding, how: Evaluation) -> np.ndarray:
    """Cosines of training captions, evenly drawn where there are too many, and the test videos."""
    step = -(-len(how.bank) // BANK)
    text = _embedded_texts(method, how.bank[::step], how)
    tile = similarity_tile(method, text, video, how.device)
    return similarity_matrix(tile, len(text), len(video)) / method.logit_scale().item()


def _embedded_texts(method: Method, texts: Sequence[str], how: Evaluation) -> Embedding:
    """Embeddings of all texts, each process doing its share."""
    share = _share(len(texts), how)
    batches = text_batches([texts[i] for i in share], how.data.context_length, how.batch_size)
    return _gathered(share, embed_texts(method, batches, how.device), len(texts), how)


def _embedded_videos(method: Method, clips: Sequence[Clip], how: Evaluation) -> Embedding:
    """Embeddings of all clips' videos, each process doing its share."""
    share = _share(len(clips), how)
    size = method.architecture.image_size
    batches = video_batches([clips[i] for i in share], how.data, size, how.batch_size)
    frames: Iterator = ((batch.frames, batch.frame_mask) for batch in batches)
    try:
        embedding = embed_videos(method, frames, how.device)
    except DecodeError as error:
        embedding = error  # told to every process: the others would wait for this one
    return _gathered(share, embedding, len(clips), how)


def _share(count: int, how: Evaluation) -> list[int]:
    """Which of `count` inputs this process embeds: as many as every other, or those that wait would hang."""
    return [i % count for i in range(how.rank, how.world_size * -(-count // how.world_size), how.world_size)]


def _gathered(
    share: Sequence[int], embedding: Embedding | DecodeError, count: int, how: Evaluation
) -> Embedding:
    """All shares in order, or on every process alike the error of those that have one."""
    shares = how.gather((torch.tensor(share), embedding))
    errors = [part for _, part in shares if isinstance(part, DecodeError)]
    if errors:
        raise DecodeError(errors[0].path, "; ".join(dict.fromkeys(error.reason for error in errors)))
    return in_order(shares, count)
