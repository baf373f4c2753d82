"""Read an index: search it, and show what is in it."""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from discovla.batch import Embedding
from discovla.data.manifest import check_span
from discovla.data.sandbox import Sandbox, WorkerLost
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import resize_and_crop
from discovla.lock import NAME as LOCK
from discovla.model import Model, load
from discovla.nn.features import unit
from discovla.retrieval.embeddings import Embeddings
from discovla.search import calibrate
from discovla.search.calibrate import Calibration, standardised
from discovla.search.filters import rows_where
from discovla.search.indexing import ProgressFile, embed_moments, request_of
from discovla.search.query import (
    Correction,
    EmbeddedQuery,
    Loaded,
    Scores,
    frame_features,
    merged,
    score,
    video_columns,
)
from discovla.search.reading import MomentFrames, read_image, read_part
from discovla.search.records import (
    Hit,
    ImageQuery,
    IndexStatus,
    LikeQuery,
    Query,
    SearchResult,
    TextQuery,
    VideoEntry,
    VideoQuery,
)
from discovla.search.sources import SourceVideo
from discovla.search.store import StaleRead, Store, VideoRow, import_lancedb, read_settings, size_on_disk

IMAGE_SECONDS = 20.0  # that decoding an image of a query may take
LARGEST_K = 1000


class IndexReader:
    """The reading half of `Index`."""

    def __init__(
        self, path: Path, settings: dict[str, Any], model: str | Model, device: str, *, read_only: bool
    ) -> None:
        self.path, self.settings, self.read_only = path, settings, read_only
        self._given, self._device = model, device
        self._model: Model | None = None
        self._store = Store(path, settings["dimension"], settings["dtype"])
        self._mutex = threading.RLock()
        self._decoding = threading.Lock()  # apart, so that a slow file of a query does not hold up others
        self._images = Sandbox(read_image, limit=IMAGE_SECONDS)
        self._videos: Sandbox | None = None
        self._loaded: Loaded | None = None
        self._versions = (-1, -1)
        self._bank: Embedding | None = None

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
            read_only: refuse methods that write.

        Raises:
            ValueError: no index there, or the model is another one.
        """
        import_lancedb()
        path = Path(path).absolute()
        set_aside = aside(path)
        if not path.exists() and set_aside.exists():  # a rebuild was interrupted between its two renames
            set_aside.rename(path)
        settings = read_settings(path)
        given = settings["model"] if model is None else model if isinstance(model, Model) else str(model)
        index = cls(path, settings, given, device or "auto", read_only=read_only)
        index._store.open()
        if isinstance(model, Model):
            _ = index.model  # checks it
        return index

    @property
    def model(self) -> Model:
        """The model of the index, loaded when it is first needed.

        Raises:
            ValueError: it is another model than the index was made by, or it is no longer there.
        """
        with self._mutex:
            if self._model is None:
                given = self._given
                if not given:
                    raise ValueError(
                        f"{self.path}: expected model=, as the index was made by an opened model, found none"
                    )
                model = given if isinstance(given, Model) else self._load(given)
                self._check_identity(model)
                self._model = model
            return self._model

    def _load(self, given: str | Path) -> Model:
        return load(given, device=self._device, merge=self.settings.get("merge"))

    def _check_identity(self, model: Model) -> None:
        """Refuse a model whose embeddings are not those of the index."""
        stored, found = self.settings["identity"], json.loads(json.dumps(model.identity()))
        differing = [key for key in stored if stored[key] != found.get(key)]
        if differing:
            raise ValueError(
                f"{self.path}: expected the model of the index ({fingerprint(stored)}, "
                f"{self.settings['model']}), found {fingerprint(found)}, another {', '.join(differing)}; "
                "--rebuild indexes all videos anew"
            )

    def search(
        self,
        query: Query,
        k: int = 10,
        *,
        where: str | None = None,
        merge: bool = True,
        exact: bool = False,
        correction: Correction = "none",
    ) -> SearchResult:
        """Find the moments that are closest to a query.

        Args:
            query: text, or a `TextQuery`, `ImageQuery`, `VideoQuery` or `LikeQuery`.
            k: largest number of hits, 1 to 1,000.
            where: condition on columns, such as `year > 2020 and title like '%dog%'`.
            merge: join neighbouring moments of a video into one hit.
            exact: score all moments by the method's similarity; default: those with the closest pooled
                features, where the method compares tokens.
            correction: weigh the scores of a text by those of the captions that calibrate the index:
                "dual-softmax" or "qb-norm"; scores are then comparable within one search only, and have no
                probability.

        Raises:
            ValueError: an unknown column, k out of range, an empty text, or an image that cannot be read.
            KeyError: an unknown moment.
            DecodeError: the video of the query cannot be read.
        """
        if not 1 <= k <= LARGEST_K:
            raise ValueError(f"k: expected 1..{LARGEST_K}, found {k}")
        began = time.perf_counter()
        options = (query, k, where, merge, exact, correction)
        try:
            hits = self._search(self._current(), *options)
        except (StaleRead, OSError) as error:
            if isinstance(error, OSError) and error.filename != str(self.path):
                raise  # the file of the query
            self._versions = (-1, -1)
            hits = self._search(self._refreshed(), *options)
        best = hits[0].probability if hits else None
        return SearchResult(
            hits=hits,
            probability_best=best,
            note=calibrate.note(best, len(hits)),
            seconds=time.perf_counter() - began,
        )

    def _search(
        self,
        loaded: Loaded,
        query: Query,
        k: int,
        where: str | None,
        merge: bool,
        exact: bool,
        correction: Correction,
    ) -> list[Hit]:
        """Find hits in one version of the tables, see `search`."""
        allowed = None if where is None else rows_where(where, loaded.columns)
        if not len(loaded.contents) or (allowed is not None and not allowed.any()):
            return []
        embedded = self._embed(query, loaded)
        bank = self._caption_bank() if correction != "none" else None
        scores = score(
            self.model.method,
            loaded,
            embedded,
            k,
            allowed=allowed,
            exact=exact,
            bank=bank,
            correction=correction,
        )
        hits = self._hits(loaded, scores, embedded, k, allowed if merge else None, merge=merge)
        if correction != "none":
            hits = [replace(hit, probability=None) for hit in hits]
        return hits

    def _hits(
        self,
        loaded: Loaded,
        scores: Scores,
        query: EmbeddedQuery,
        k: int,
        allowed: np.ndarray | None,
        *,
        merge: bool,
    ) -> list[Hit]:
        """Return the best k moments as hits, neighbours merged."""
        contents, answered = loaded.contents, set()
        spans: list[tuple[int, float, range]] = []  # place, score, merged places
        for place, value in zip(scores.places.tolist(), scores.values.tolist(), strict=True):
            if place in answered:
                continue
            places = merged(loaded, scores, place, allowed) if merge else range(place, place + 1)
            answered.update(places)
            spans.append((place, value, places))
            if len(spans) == k:
                break
        calibration = self._calibration() if query.text is not None else None  # of captions
        z = standardised(np.array([value for _, value, _ in spans]), scores.background)
        rows = self._read([place for place, _, _ in spans], ["times", "frames", "tokens"], loaded)
        hits = []
        for (place, value, places), row, deviation in zip(spans, rows, z, strict=True):
            times, features = frame_features(self._store, row)
            video = contents.videos[int(contents.video_id[place])]
            hits.append(
                Hit(
                    moment_id=int(contents.moment_id[place]),
                    video=video.video,
                    video_id=video.video_id,
                    start=float(contents.start[list(places)].min()),
                    end=float(contents.end[list(places)].max()),
                    best_frame=float(times[int((features @ query.pooled.numpy()).argmax())]),
                    score=value,
                    probability=None if calibration is None else calibration.probability(float(deviation)),
                    columns=video.own_columns(),
                )
            )
        return hits

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts by the model of the index; one row of it is `TextQuery.embedding`."""
        with self._mutex:
            return self.model.embed_texts(texts, progress=False)

    def _embed(self, query: Query, loaded: Loaded) -> EmbeddedQuery:
        """Embed a query."""
        if isinstance(query, LikeQuery):
            place = loaded.contents.place(query.moment_id)
            return EmbeddedQuery(pooled=loaded.matrix[:, place].cpu(), excluded=place)
        if isinstance(query, ImageQuery | VideoQuery):
            moment = self._image(query) if isinstance(query, ImageQuery) else self._video(query)
            with self._mutex:
                pooled = torch.from_numpy(embed_moments(self.model, [moment])[0].pooled)
            return EmbeddedQuery(pooled=unit(pooled))
        query = TextQuery(text=query) if isinstance(query, str) else query
        if query.embedding is None and not query.text.strip():
            raise ValueError("query: expected a text, found an empty one")
        embedding = self.embed_texts([query.text]) if query.embedding is None else query.embedding
        text = embedding.embedding()
        return EmbeddedQuery(pooled=unit(text.pooled[0].float()), text=text)

    def _image(self, query: ImageQuery) -> MomentFrames:
        """Read the image of a query, in a process of its own, as a moment of one frame."""
        content = query.image if isinstance(query.image, bytes) else Path(query.image).read_bytes()
        try:
            with self._decoding:
                pixels = self._images(content)
        except WorkerLost as error:
            raise ValueError(f"image: expected an image file: decoding failed: {error}") from None
        frame = resize_and_crop(Image.fromarray(pixels[0]), self.model.method.architecture.image_size)
        return MomentFrames(start=0.0, end=0.0, times=(0.0,), frames=frame[None], previews=(b"",))

    def _video(self, query: VideoQuery) -> MomentFrames:
        """Read the video of a query as one moment."""
        check_span(query.start, query.end, str(query.path))
        source = SourceVideo(video=os.path.abspath(query.path), start=query.start, end=query.end, clip=True)
        request, limit = request_of(source, "whole", self.model), self.model.data.decode_seconds
        with self._decoding:
            if self._videos is None:
                self._videos = Sandbox(read_part, limit=limit)
            try:
                return self._videos(request).moments[0]
            except WorkerLost as error:
                raise DecodeError(query.path, f"not decoded: {error}") from error

    def thumbnail(self, moment_id: int) -> bytes:
        """Return the JPEG of a moment, at most 320 pixels wide and high.

        Raises:
            KeyError: no such moment.
        """
        loaded = self._current()
        return self._read([loaded.contents.place(moment_id)], ["thumbnail"], loaded)[0]["thumbnail"]

    def media_path(self, moment_id: int) -> Path:
        """Return the file of a moment.

        Raises:
            KeyError: no such moment.
        """
        contents = self._current().contents
        return Path(contents.videos[int(contents.video_id[contents.place(moment_id)])].video)

    def frame_scores(self, moment_id: int, query: Query) -> list[tuple[float, float]]:
        """Return, for each sampled frame of a moment, its seconds in the file and its cosine with the query.

        Raises:
            KeyError: no such moment.
        """
        loaded = self._current()
        row = self._read([loaded.contents.place(moment_id)], ["times", "frames", "tokens"], loaded)[0]
        times, features = frame_features(self._store, row)
        cosines = features @ self._embed(query, loaded).pooled.numpy()
        return sorted(
            {float(time): float(cosine) for time, cosine in zip(times, cosines, strict=True)}.items()
        )

    def stored_embedding(self, sources: Sequence[SourceVideo]) -> Embedding:
        """Return the embedding of videos that are one moment each, in their order.

        Raises:
            ValueError: a video is not in the index, or has several moments.
        """
        loaded = self._current()
        rows = {(row.video, row.start, row.end): row for row in loaded.contents.videos.values()}
        first = dict(zip(loaded.contents.video_id.tolist(), range(len(loaded.contents)), strict=True))
        places = []
        for source in sources:
            row = rows.get((source.video, source.start, source.end))
            if row is None or row.state != "indexed" or row.moments != 1:
                found = (
                    "none"
                    if row is None
                    else f"a {row.state} video"
                    if row.state != "indexed"
                    else f"{row.moments}"
                )
                span = "" if source.start is source.end is None else f" ({source.start}, {source.end})"
                raise ValueError(
                    f"{self.path}: expected one moment of {source.video}{span}, found {found}; "
                    "`discovla index RUN MANIFEST` indexes each clip as one moment"
                )
            places.append(first[row.video_id])
        return loaded.read_embedding(np.array(places, np.int64))

    def videos(self) -> list[VideoEntry]:
        """Return the videos of the index, by path and start."""
        rows = self._current().contents.videos.values()
        return [_entry(row) for row in sorted(rows, key=lambda row: (row.video, row.start or 0.0))]

    def refused(self) -> list[VideoEntry]:
        """Return the videos that could not be read, with reasons."""
        return [entry for entry in self.videos() if entry.state == "refused"]

    def status(self) -> IndexStatus:
        """Return what is in the index."""
        contents = self._current().contents
        states = [row.state for row in contents.videos.values()]
        columns = {
            name: column.type for name, column in video_columns(list(contents.videos.values())).items()
        }
        for name in ("start", "end", "duration"):
            columns.setdefault(name, "float")
        calibration = self._calibration()
        return IndexStatus(
            model=self.settings["model"],
            fingerprint=fingerprint(self.settings["identity"]),
            moment_mode=self.settings["moments"],
            videos=states.count("indexed"),
            moments=len(contents),
            refused=states.count("refused"),
            gone=states.count("gone"),
            seconds=sum(row.duration for row in contents.videos.values() if row.state == "indexed"),
            size=size_on_disk(self.path),
            columns=columns,
            calibrated=0 if calibration is None else calibration.count,
            progress=ProgressFile.read(self.path) if (self.path / LOCK).exists() else None,
        )

    def refresh(self) -> bool:
        """Read what another process has written since; return True if anything has changed."""
        before = self._versions
        self._refreshed()
        return self._versions != before

    def _calibration(self) -> Calibration | None:
        values = self.settings["calibration"]
        return None if values is None else Calibration(**values)

    def _caption_bank(self) -> Embedding:
        """Return the embedding of the captions that calibrate the index."""
        if self._bank is None:
            if not self.settings["captions"]:
                raise ValueError(
                    "correction: expected an index that is calibrated, found none; add videos first"
                )
            self._bank = self.embed_texts(self.settings["captions"]).embedding()
        return self._bank

    def close(self) -> None:
        """Release memory and end the processes that decode."""
        self._images.close()
        if self._videos is not None:
            self._videos.close()
        self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _current(self) -> Loaded:
        """Return what is in memory, read at first use."""
        return self._loaded or self._refreshed()

    def _refreshed(self) -> Loaded:
        """Return the newest version of the tables."""
        with self._mutex:
            versions = self._store.version()
            if self._loaded is None or versions != self._versions:
                self.settings = read_settings(self.path)
                device = torch.device("cpu") if self._model is None else self._model.device
                self._loaded = Loaded(self._store, self._store.contents(), device)
                self._versions = versions
            return self._loaded

    def _read(self, places: Sequence[int], columns: Sequence[str], loaded: Loaded) -> list[dict[str, Any]]:
        """Read columns of moments; once more if another process has rewritten the files in the meantime."""
        ids = loaded.contents.moment_id[list(places)]
        with self._mutex:
            try:
                if self._loaded is loaded:
                    return self._store.read(loaded.contents, np.array(places, np.int64), columns)
            except (OSError, StaleRead):
                self._versions = (-1, -1)
            fresh = self._refreshed()
            moved = np.array([fresh.contents.place(int(one)) for one in ids], np.int64)
            return self._store.read(fresh.contents, moved, columns)


def _entry(row: VideoRow) -> VideoEntry:
    assert row.state != "removed", "removed rows are not current"
    return VideoEntry(
        video_id=row.video_id,
        video=row.video,
        start=row.start,
        end=row.end,
        state=row.state,
        reason=row.reason,
        duration=row.duration,
        moments=row.moments,
        columns=row.own_columns(),
    )


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return eight digits that differ if the model, its weights, precision or data differ."""
    return f"{zlib.crc32(json.dumps(identity, sort_keys=True).encode()):08x}"


def aside(path: Path) -> Path:
    """Return the place of an index that a rebuilt one is about to replace."""
    return path.with_name(f".{path.name}.old")
