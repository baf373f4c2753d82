"""Evaluate a method on clips, or a similarity matrix from a file, and print the metrics as a table."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discovla import terminal
from discovla.batch import Embedding
from discovla.data.dataset import check_captions, read_clips
from discovla.data.loader import DataConfig, text_batches, video_batches
from discovla.data.manifest import Clip
from discovla.data.quarantine import QUARANTINE_HINT, without_quarantined
from discovla.data.video.errors import DecodeError
from discovla.foreign import parse_json
from discovla.inputs import check_inputs
from discovla.methods.base import Method
from discovla.ops.top_k import top_k
from discovla.retrieval.embed import embed_frames, embed_texts, embed_videos, encode_frames, in_order
from discovla.retrieval.matrix import read_matrix
from discovla.retrieval.metrics import retrieval_metrics, summary
from discovla.retrieval.ranks import Ranks, streamed_ranks, text_to_video_ranks, video_to_text_ranks
from discovla.retrieval.record import (
    TOP,
    EvaluationRecord,
    ScoreCollector,
    negative_pairs,
    ranks_of,
    with_clips,
)
from discovla.retrieval.rerank import dual_softmax, qb_norm
from discovla.retrieval.similarity import pooled_ranks, similarity_matrix, similarity_tile

logger = logging.getLogger(__name__)

LARGEST_MATRIX = 64_000_000  # scores; larger sets are ranked without storing them
BANK = 5_000  # largest number of captions for QB-Norm; more change little and cost memory
COLUMNS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}

Metrics = dict[str, Any]
RanksBySetting = dict[str, dict[str, Ranks]]  # "raw", "dual softmax", "QB-Norm" -> "t2v", "v2t"


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of an evaluation.

    name: of the pass, whose progress is shown.
    data: decoding of clips and length of captions.  batch_size: clips or captions per batch.
    rerank: also report dual softmax and QB-Norm.
    bank: training captions for QB-Norm, which is left out without them.
    rank, world_size: this process and the number of processes.
    gather: collects one object from every process, in the order of their ranks.
    on_record: called with the per-query results; None leaves them out.
    """

    name: str = "evaluation"
    data: DataConfig
    device: torch.device | str = "cpu"
    batch_size: int = 64
    rerank: bool = False
    bank: Sequence[str] = ()
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda share: [share]
    on_record: Callable[[EvaluationRecord], None] | None = None


def evaluate(
    method: Method,
    clips: Sequence[Clip],
    options: EvalOptions,
    *,
    videos: Embedding | None = None,
    features: list[tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Metrics]:
    """Measure retrieval among the captions and videos of `clips`.

    Args:
        method: on `options.device`, complete on every process.
        clips: each with one caption or several.
        videos: their embedding, if it is known; None reads and embeds the clips.
        features: of the frames of this process's share, n f d, and masks n f, batch by batch, from an earlier
            evaluation of the same clips and frozen vision tower; an empty list is filled.

    Returns:
        `raw` metrics in both directions; with `rerank` also `dual softmax` and `QB-Norm` (text to video
        only).

    Raises:
        DecodeError: a clip cannot be decoded; metrics over fewer clips would not be comparable.
        ValueError: no clips, scores that are not finite, or a caption longer than the context where
            `options.data` refuses it.
    """
    if not clips:
        raise ValueError("evaluation: expected at least one clip, found none")
    data = options.data
    check_inputs(method.architecture, data)
    check_captions(clips, data.context_length, long=data.long_captions, tokenizer=data.tokenizer)
    captions = [caption for clip in clips for caption in clip.captions]
    groups = np.repeat(np.arange(len(clips)), [len(clip.captions) for clip in clips])
    text = _embed_texts(method, captions, options)
    video = _embed_videos(method, clips, options, features) if videos is None else videos
    large = len(captions) * len(clips) > LARGEST_MATRIX
    if method.scores_pooled and (large or not options.rerank):
        ranks, record = _pooled_ranks(method, text, video, groups, options)
    else:
        tile = similarity_tile(method, text, video, options.device)
        scale = method.logit_scale().item() if method.scores_pooled else 1.0
        collector = None
        if options.on_record is not None:
            collector = ScoreCollector(groups, len(clips), scale=scale)
        if large:
            if options.rerank:
                sizes = len(captions), len(clips)
                logger.warning("%d x %d scores: ranked in tiles, without re-ranking", *sizes)
            on_tile = None if collector is None else collector.add
            found = streamed_ranks(tile, len(captions), len(clips), groups, on_tile=on_tile)
            ranks = {"raw": _directions(found)}
        else:
            matrix = similarity_matrix(tile, len(captions), len(clips))
            if collector is not None:
                collector.add(np.arange(len(captions)), slice(0, len(clips)), matrix)
            ranks = _matrix_ranks(method, matrix, video, groups, options)
        record = None if collector is None else collector.record(ranks)
    if options.on_record is not None and record is not None:
        options.on_record(with_clips(record, clips))
    return {
        setting: {direction: summary(values) for direction, values in directions.items()}
        for setting, directions in ranks.items()
    }


def evaluation_clips(data: DataConfig, split: str, quarantine: str | Path | None = None) -> list[Clip]:
    """Read the clips of a split.

    Args:
        quarantine: list of clips to leave out, which makes the figures those of fewer clips.

    Raises:
        ValueError: manifest or shards are unreadable, or have no clips in the split.
    """
    clips = read_clips(data, split)
    return clips if quarantine is None else without_quarantined(clips, quarantine)


def training_captions(data: DataConfig, split: str) -> list[str]:
    """Read the training captions, the bank of QB-Norm, for the evaluation of a split.

    There are none for the training split: a bank of the queries themselves would amount to dual softmax.
    """
    if split == data.train_split:
        return []
    clips = read_clips(data, None)
    return [caption for clip in clips if clip.split == data.train_split for caption in clip.captions]


def evaluate_matrix(path: str | Path, groups: str | Path | None = None) -> Metrics:
    """Compute the metrics of a similarity matrix that any model wrote.

    Args:
        path: file of texts x videos, see `read_matrix`.
        groups: JSON list with the video of each text; None if text i describes video i.

    Returns:
        As `retrieval_metrics`.

    Raises:
        ValueError: wrong contents; the message has the file.
        OSError: unreadable file.
    """
    matrix = read_matrix(path)
    videos = None if groups is None else _read_groups(groups)
    try:
        return retrieval_metrics(matrix, videos)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def results_table(rows: Mapping[str, Metrics], *, width: int | None = None) -> str:
    """Format metrics as a table: one line per model or setting, both directions side by side.

    A direction without metrics shows dashes. If ties change R@1, a last line has the largest difference.

    Args:
        width: columns to keep to, if need be with one direction below the other; None for any number.
    """
    label = max(map(len, rows), default=0)
    columns = [
        [
            title.center(7 * len(COLUMNS)),
            "".join(f"{column:>7}" for column in COLUMNS),
            *(_cells(metrics.get(way)) for metrics in rows.values()),
        ]
        for way, title in DIRECTIONS.items()
    ]
    names = ["", "", *rows]
    below = width is not None and label + 1 + 2 * 7 * len(COLUMNS) + 3 > width
    tables = [[column] for column in columns] if below else [columns]
    lines = [
        "\n".join(
            f"{name:<{label}} {'   '.join(cells)}".rstrip()
            for name, *cells in zip(names, *table, strict=True)
        )
        for table in tables
    ]
    return "\n".join(["\n\n".join(lines), *_ties_line(rows)])


def _cells(metrics: Mapping[str, Any] | None) -> str:
    return "".join(f"{'-':>7}" if metrics is None else f"{metrics[column]:7.1f}" for column in COLUMNS)


def _ties_line(rows: Mapping[str, Metrics]) -> list[str]:
    """Return a line about the largest difference that ties make to R@1, if there is one."""
    gains = [
        (values["optimistic"]["R@1"] - values["R@1"], name)
        for name, metrics in rows.items()
        for values in metrics.values()
    ]
    gain, name = max(gains, key=lambda pair: pair[0], default=(0.0, ""))
    if round(gain, 1) == 0:
        return []
    return [f"Ties count against the query; counted for it, R@1 would be up to {gain:.1f} higher ({name})."]


def sampling_error(metrics: Metrics, clips: int) -> float:
    """Return the standard error of R@1 in points, the larger one of both directions.

    sqrt(p (1 - p) / n) with n clips: captions of one clip are not independent.
    """
    recalls = [values["R@1"] / 100 for values in metrics.values()]
    return 100 * max(math.sqrt(p * (1 - p) / clips) for p in recalls)


def _read_groups(path: str | Path) -> list[int]:
    try:
        groups = parse_json(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON list of integers: {error}") from None
    if not isinstance(groups, list) or not all(type(group) is int for group in groups):
        raise ValueError(f"{path}: expected a JSON list of integers, the video of each text")
    return groups


def _matrix_ranks(
    method: Method, matrix: np.ndarray, video: Embedding, groups: np.ndarray, options: EvalOptions
) -> RanksBySetting:
    """Rank by the complete matrix, and re-rank it if the options ask for it."""
    ranks = {"raw": _directions((text_to_video_ranks(matrix, groups), video_to_text_ranks(matrix, groups)))}
    if options.rerank:
        by_text, by_video = dual_softmax(matrix)
        both = text_to_video_ranks(by_text, groups), video_to_text_ranks(by_video, groups)
        ranks["dual softmax"] = _directions(both)
    if options.rerank and options.bank:
        cosines = matrix / method.logit_scale().item()
        normalised = qb_norm(cosines, _bank_cosines(method, video, options))
        ranks["QB-Norm"] = {"t2v": text_to_video_ranks(normalised, groups)}
    return ranks


def _pooled_ranks(
    method: Method, text: Embedding, video: Embedding, groups: np.ndarray, options: EvalOptions
) -> tuple[RanksBySetting, EvaluationRecord | None]:
    """Rank by pooled features without storing the matrix, which QB-Norm would need."""
    features = text.pooled.to(options.device), video.pooled.to(options.device)
    ranks = {"raw": _directions(pooled_ranks(*features, groups))}
    if options.rerank:
        scale = method.logit_scale().item()
        both = pooled_ranks(*features, groups, dual_softmax_scale=scale)
        ranks["dual softmax"] = _directions(both)
    if options.rerank and options.bank:
        logger.warning("%d x %d scores: ranked without QB-Norm, which needs them all", len(text), len(video))
    if options.on_record is None:
        return ranks, None
    scores, indices = top_k(*features, min(TOP, len(video)))
    unit = [torch.nn.functional.normalize(x.float(), dim=1).cpu().numpy() for x in features]
    texts, videos = negative_pairs(groups, len(video))
    record = EvaluationRecord(
        ranks=ranks_of(ranks),
        groups=groups,
        top=indices.cpu().numpy(),
        top_scores=scores.cpu().numpy(),
        positive=np.einsum("td,td->t", unit[0], unit[1][groups]),
        negative=np.einsum("td,td->t", unit[0][texts], unit[1][videos]),
    )
    return ranks, record


def _directions(ranks: tuple[Ranks, Ranks]) -> dict[str, Ranks]:
    return {"t2v": ranks[0], "v2t": ranks[1]}


def _bank_cosines(method: Method, video: Embedding, options: EvalOptions) -> np.ndarray:
    """Compute cosines of the bank's captions (evenly spaced if there are too many) and the test videos."""
    step = -(-len(options.bank) // BANK)
    text = _embed_texts(method, options.bank[::step], options, "captions of QB-Norm")
    tile = similarity_tile(method, text, video, options.device)
    return similarity_matrix(tile, len(text), len(video)) / method.logit_scale().item()


def _embed_texts(
    method: Method, captions: Sequence[str], options: EvalOptions, unit: str = "captions"
) -> Embedding:
    """Embed all captions, each process its share."""
    share = _share(len(captions), options)
    batches = text_batches(
        [captions[i] for i in share],
        options.data.context_length,
        options.batch_size,
        options.data.tokenizer,
    )
    with terminal.progress(options.name, len(share), unit) as bar:
        embedding = embed_texts(method, terminal.counted(batches, bar), options.device)
    return _gather(share, embedding, len(captions), options)


def _embed_videos(
    method: Method, clips: Sequence[Clip], options: EvalOptions, features: list[tuple[Tensor, Tensor]] | None
) -> Embedding:
    """Embed all videos, each process its share; `features` as in `evaluate`."""
    share = _share(len(clips), options)
    if features:
        return _gather(share, embed_frames(method, features, options.device), len(clips), options)
    size = method.architecture.image_size
    batches = video_batches([clips[i] for i in share], options.data, size, options.batch_size)
    frames: Iterator = ((batch.frames, batch.frame_mask) for batch in batches)
    try:
        with terminal.progress(options.name, len(share), "clips") as bar:
            frames = terminal.counted(frames, bar)
            if features is None:
                embedding = embed_videos(method, frames, options.device)
            else:
                features += list(encode_frames(method, frames, options.device))
                embedding = embed_frames(method, features, options.device)
    except DecodeError as error:
        embedding = error  # gathered, so that no process waits for an embedding that never follows
    return _gather(share, embedding, len(clips), options)


def _share(count: int, options: EvalOptions) -> list[int]:
    """Return the inputs of this process, equally many on each, so that collectives in the towers match."""
    world_size = options.world_size
    return [i % count for i in range(options.rank, world_size * -(-count // world_size), world_size)]


def _gather(
    share: Sequence[int], embedding: Embedding | DecodeError, count: int, options: EvalOptions
) -> Embedding:
    """Gather all shares in order; on every process, raise the DecodeError of those that failed."""
    shares = options.gather((torch.tensor(share), embedding))
    errors = [part for _, part in shares if isinstance(part, DecodeError)]
    if errors:
        reasons = "; ".join(dict.fromkeys(error.reason for error in errors))
        raise DecodeError(errors[0].path, f"{reasons}; {QUARANTINE_HINT}")
    return in_order(shares, count)
