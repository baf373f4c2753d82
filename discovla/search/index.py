"""The index of videos: create, open, add, search, remove, compact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from discovla.model import Model
from discovla.retrieval.embeddings import Embeddings
from discovla.search.records import (
    AddReport,
    IndexProgress,
    IndexStatus,
    MomentMode,
    Query,
    SearchResult,
    Value,
    VideoEntry,
)

Source = str | Path | tuple[str | Path, float, float] | Mapping[str, Any]


class Index:
    """A folder with the moments of videos, embedded by one model.

    `create` and `open` make it.  It is a context that `close` ends.  One process at a time may write; any
    number may read.  `search`, `thumbnail` and the other reading methods may be called from several threads.
    """

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: str | Path | Model,
        *,
        moments: MomentMode = "shots",
        device: str = "auto",
    ) -> Self:
        """Make an empty index.

        Args:
            path: folder; it must not exist, or be empty.
            model: run, checkpoint, export or plain CLIP, as in `discovla.load`, or an opened one.
            moments: how files are cut: "shots" at changes of shot, "windows" of equal length, "whole" not at
                all.
            device: as in `discovla.load`.

        Raises:
            ValueError: the folder is not empty, the model cannot be loaded, or LanceDB is not installed.
        """
        raise NotImplementedError

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: str | Path | Model | None = None,
        device: str | None = None,
        read_only: bool = False,
    ) -> Self:
        """Open an index.

        Args:
            model: the model of the index, if it has moved; default: loaded from where it was when it is first
                needed.
            device: as in `discovla.load`; default: "auto".
            read_only: never write, also not to remove what an interrupted `add` left behind.

        Raises:
            ValueError: no index there, or the model is another one.
        """
        raise NotImplementedError

    def add(
        self, videos: Sequence[Source], *, progress: Callable[[IndexProgress], None] | None = None
    ) -> AddReport:
        """Index videos; those that are there and have not changed are left as they are.

        Args:
            videos: each a file, a folder, a table (.csv) or manifest (.jsonl), a (path, start, end) in
                seconds, or a mapping with `video`, optionally `start` and `end`, and columns of the user.
            progress: called after each video.

        Raises:
            LockHeld: another process is writing.
            ValueError: no video.
            OSError: the disk is full; what was written before stays.
        """
        raise NotImplementedError

    def search(
        self, query: Query, k: int = 10, *, where: str | None = None, merge: bool = True, exact: bool = False
    ) -> SearchResult:
        """Find the moments that are closest to a query.

        Args:
            query: text, or a `TextQuery`, `ImageQuery`, `VideoQuery` or `LikeQuery`.
            k: largest number of hits.
            where: condition on columns, such as `year > 2020 and title like '%dog%'`.
            merge: join neighbouring moments of a video into one hit.
            exact: score all moments by the method's similarity; default: those with the closest pooled
                features, where the method compares tokens.

        Raises:
            ValueError: an unknown moment, a condition on an unknown column, or k below 1.
            DecodeError: the image or video of the query cannot be read.
        """
        raise NotImplementedError

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts by the model of the index; one row of it is `TextQuery.embedding`."""
        raise NotImplementedError

    def thumbnail(self, moment_id: int) -> bytes:
        """Return the JPEG of a moment, at most 320 pixels wide.

        Raises:
            KeyError: no such moment.
        """
        raise NotImplementedError

    def media_path(self, moment_id: int) -> Path:
        """Return the file of a moment.

        Raises:
            KeyError: no such moment.
        """
        raise NotImplementedError

    def frame_scores(self, moment_id: int, query: Query) -> list[tuple[float, float]]:
        """Return, for each sampled frame of a moment, its seconds in the file and its cosine with the query.

        Raises:
            KeyError: no such moment.
        """
        raise NotImplementedError

    def videos(self) -> list[VideoEntry]:
        """Return the videos of the index, by path and start."""
        raise NotImplementedError

    def refused(self) -> list[VideoEntry]:
        """Return the videos that could not be read, with reasons."""
        raise NotImplementedError

    def status(self) -> IndexStatus:
        """Return what is in the index."""
        raise NotImplementedError

    def refresh(self) -> bool:
        """Read what another process has written since; return True if anything has changed."""
        raise NotImplementedError

    def remove(self, videos: Sequence[str | Path]) -> int:
        """Remove the videos with these paths, or below these folders; return their number."""
        raise NotImplementedError

    def prune(self) -> int:
        """Remove the videos whose files are gone; return their number."""
        raise NotImplementedError

    def compact(self) -> None:
        """Remove replaced moments and old versions from the disk."""
        raise NotImplementedError

    def rebuild(
        self,
        *,
        model: str | Path | Model | None = None,
        moments: MomentMode | None = None,
        progress: Callable[[IndexProgress], None] | None = None,
    ) -> AddReport:
        """Index all videos again in a folder beside this one, then take its place.

        Args:
            model: another model; default: the same.
            moments: another way to cut files; default: the same.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release the lock and memory."""
        raise NotImplementedError


def columns_of(row: Mapping[str, Any]) -> dict[str, Value]:
    """Return the user's own columns of a mapping given to `Index.add`."""
    return {key: value for key, value in row.items() if key not in ("video", "start", "end")}
