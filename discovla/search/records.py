"""Records of the search: queries, hits, and reports of an index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from discovla.retrieval.embeddings import Embeddings

MomentMode = Literal["shots", "windows", "whole"]
Value = str | int | float | bool | None  # of a user's own column


@dataclass(frozen=True, kw_only=True)
class TextQuery:
    """A text.

    embedding: its embedding by the model of the index, one row, if it is known (a server encodes the texts of
        several requests at once by `Index.embed_texts`); None embeds it when it is searched.
    """

    text: str
    embedding: Embeddings | None = None


@dataclass(frozen=True, kw_only=True)
class ImageQuery:
    """An image: a path, or the bytes of a file (JPEG, PNG, WebP and others that Pillow reads)."""

    image: str | Path | bytes


@dataclass(frozen=True, kw_only=True)
class VideoQuery:
    """A video file, or its span in seconds; None is the start or end of the file."""

    path: str | Path
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, kw_only=True)
class LikeQuery:
    """A moment of the index, to which others are sought that resemble it; it is no hit itself."""

    moment_id: int


Query = str | TextQuery | ImageQuery | VideoQuery | LikeQuery


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answer to a query: a moment, or neighbouring moments of a video that were merged.

    moment_id: the moment with the highest score among those merged.
    video: path of the file.  video_id: of its entry in the index.
    start, end: seconds from the first frame.
    best_frame: seconds of the sampled frame that is closest to the query.
    score: the method's own similarity of the query and the moment; higher is closer.
    probability: that the hit is what the query asks for, see `calibrate`; None if the index is not
        calibrated, or the query is no text.
    columns: the user's own columns of the video.
    """

    moment_id: int
    video: str
    video_id: int
    start: float
    end: float
    best_frame: float
    score: float
    probability: float | None
    columns: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """Answers to a query, best first.

    probability_best: the probability of the first hit; None without hits or calibration.
    note: one line if the best hit is probably not what was asked for, or if nothing was searched; else "".
    seconds: time that the search took, the encoding of the query included.
    """

    hits: list[Hit]
    probability_best: float | None
    note: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AddReport:
    """Numbers of videos by what `Index.add` did with them.

    added: new.  changed: their file has changed, and their moments were replaced.  unchanged: left as they
    are.  gone: files of the index that are no longer there.  refused: path and reason of each video that
    cannot be read.  seconds: of video added or replaced.  encoding: seconds in which the model was busy.
    """

    added: int
    unchanged: int
    changed: int
    gone: int
    refused: list[tuple[str, str]]
    seconds: float = 0.0
    encoding: float = 0.0


@dataclass(frozen=True, kw_only=True)
class IndexProgress:
    """State of an `Index.add` that runs, also in another process.

    done, total: videos.  moments: written so far.  seconds: since the start.
    remaining: estimate of the seconds left; None before the first video is done.
    """

    done: int
    total: int
    moments: int
    seconds: float
    remaining: float | None


@dataclass(frozen=True, kw_only=True)
class VideoEntry:
    """A video of the index: a file, or a clip of one.

    start, end: span of a clip of a manifest or table in seconds; None for a whole file.
    state: indexed, refused (with a reason), or gone (the file is no longer there).
    duration: seconds.  moments: their number.
    """

    video_id: int
    video: str
    start: float | None
    end: float | None
    state: Literal["indexed", "refused", "gone"]
    reason: str
    duration: float
    moments: int
    columns: Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class IndexStatus:
    """Contents of an index.

    model: name or path from which it was made.  fingerprint: short checksum of the model.
    videos, moments, refused, gone: numbers.  seconds: total duration of the indexed videos.
    size: bytes on disk.
    columns: type of each column that `where` knows: "text", "int" or "float".
    calibrated: number of random captions by which probabilities are calibrated; 0 if they are not.
    progress: of an `Index.add` that runs; None if none does.
    """

    model: str
    fingerprint: str
    moment_mode: MomentMode
    videos: int
    moments: int
    refused: int
    gone: int
    seconds: float
    size: int
    columns: Mapping[str, str]
    calibrated: int
    progress: IndexProgress | None
