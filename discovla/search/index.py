"""The index of videos: create, open, add, search, remove, compact."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from discovla.foreign import to_json
from discovla.lock import WriterLock
from discovla.model import Model, load
from discovla.nn.features import unit
from discovla.search import calibrate
from discovla.search.calibrate import Calibration, standardised
from discovla.search.changes import Change, plan
from discovla.search.indexing import Indexer, ProgressFile, VideoReader, request_of
from discovla.search.query import EmbeddedQuery, score
from discovla.search.reader import IndexReader, aside
from discovla.search.reading import Cut
from discovla.search.records import AddReport, IndexProgress, MomentMode
from discovla.search.sources import Source, SourceVideo, expand
from discovla.search.store import Contents, Store, VideoRow, import_lancedb, write_settings

logger = logging.getLogger(__name__)

RECALIBRATE = 1.1  # factor by which the number of moments may change before probabilities are measured again


class Index(IndexReader):
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
        transnet: bool = False,
        vectors: str = "float32",
        device: str = "auto",
        merge: int | None = None,
    ) -> Self:
        """Make an empty index.

        Args:
            path: folder; it must not exist, or be empty.
            model: run, checkpoint, export or plain CLIP, as in `discovla.load`, or an opened one.
            moments: how files are cut: "shots" at changes of shot, "windows" of equal length, "whole" not at
                all.
            transnet: find changes of shot by TransNetV2 (extra `transnet`), which decodes files once more.
            vectors: "float32", with which the index has the scores of the model to the last digit, or
                "float16", of half the size.
            device: as in `discovla.load`.
            merge: as in `discovla.load`, for a model that is named.

        Raises:
            ValueError: the folder is not empty, the model cannot be loaded, or LanceDB is not installed.
        """
        import_lancedb()
        path = Path(path).absolute()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path}: expected an empty folder or none, to make an index in")
        if vectors not in ("float32", "float16"):
            raise ValueError(f"vectors: expected 'float32' or 'float16', found {vectors!r}")
        if isinstance(model, Model) and merge is not None:
            raise ValueError(
                "merge: expected a model that is named, found an opened one; load(merge=) merges"
            )
        opened = model if isinstance(model, Model) else load(model, device=device, merge=merge)
        settings = {
            "version": 1,
            "model": opened.source,
            "identity": json.loads(json.dumps(opened.identity())),
            "dimension": opened.method.architecture.embed_dim,
            "dtype": vectors,
            "moments": moments,
            "transnet": transnet,
            "merge": opened.merge,
            "calibration": None,
            "captions": [],
        }
        path.mkdir(parents=True, exist_ok=True)
        Store(path, settings["dimension"], vectors).open(create=True)
        write_settings(path, settings)
        return cls.open(path, model=opened, device=device)

    def add(
        self,
        videos: Sequence[Source],
        *,
        progress: Callable[[IndexProgress], None] | None = None,
        ray: str | None = None,
    ) -> AddReport:
        """Index videos; those that are there and have not changed are left as they are.

        Args:
            videos: each a file, a folder, a table (.csv) or manifest (.jsonl), a (path, start, end) in
                seconds, or a mapping with `video`, optionally `start` and `end`, and columns of the user.
            progress: called after each video.
            ray: read and embed on a Ray cluster: its address, or "auto" for that of the environment or, if
                there is none, one on this machine.

        Raises:
            LockHeld: another process is writing.
            ValueError: no video.
            OSError: the disk is full; what was written before stays.
        """
        sources, refused = expand([videos] if isinstance(videos, str | Path) else videos)
        return self._add(sources, refused, progress, ray)

    def _add(
        self,
        sources: Sequence[SourceVideo],
        refused: list[tuple[str, str]],
        progress: Callable[[IndexProgress], None] | None,
        ray: str | None = None,
    ) -> AddReport:
        """Index videos, see `add`; `refused` are those that cannot be named."""
        _ = self.model  # is checked before anything is written
        with self._writing() as lock:
            contents = self._refreshed().contents
            changes = plan(sources, contents)
            self._store.append([], changes.rows)
            indexer = Indexer(self._store, self.model, contents.next_moment, lock.check)
            done = self._index(indexer, changes.todo, contents, progress, ray)
            finished = self._refreshed().contents
            if finished.stale or indexer.written:
                self._store.compact(finished)
                self._refreshed()
            self._calibrate_if_changed()
        refused = (
            refused + changes.refused + [(row.video, row.reason) for row in done if row.state == "refused"]
        )
        good = {row.key: row for row in done if row.state == "indexed"}
        seconds = sum(row.duration for row in good.values())
        changed = sum(change.earlier is not None and change.source.key in good for change in changes.todo)
        return AddReport(
            added=len(good) - changed,
            unchanged=changes.unchanged,
            changed=changed,
            gone=changes.gone,
            refused=refused,
            seconds=seconds,
            encoding=indexer.encoding,
        )

    def _index(
        self,
        indexer: Indexer,
        todo: Sequence[Change],
        contents: Contents,
        progress: Callable[[IndexProgress], None] | None,
        ray: str | None,
    ) -> list[VideoRow]:
        """Read, embed and write videos; return their rows."""
        cut = _cut(self.settings)
        requests = [request_of(change.source, cut, self.model) for change in todo]
        ids = [contents.next_video + i for i in range(len(todo))]
        for change, video_id in zip(todo, ids, strict=True):
            indexer.begin(_row(change.source, video_id))
        state, rows = ProgressFile(self.path, [change.size for change in todo], progress), []
        data = self.model.data
        if data.decoder == "dali" and todo:
            logger.warning("data.decoder = 'dali' decodes batches of clips; the videos are decoded by PyAV")
        try:
            if ray is not None:
                from discovla.search.ray import embed_on_cluster

                cluster = embed_on_cluster(
                    ray, self._given_path(), self._device, requests, merge=self.settings.get("merge")
                )
                for place, moments, end in cluster:
                    rows.append(indexer.add_embedded(ids[place], moments, end))
                    state.step(todo[place].size, indexer.written)
            else:
                reader = VideoReader(requests, workers=max(1, data.workers), limit=data.decode_seconds)
                try:
                    for place, item in reader:
                        row = indexer.add(ids[place], item)
                        if row is not None:
                            rows.append(row)
                            state.step(todo[place].size, indexer.written)
                finally:
                    reader.close()
            indexer.finish()
        finally:
            state.close()
        return rows

    def _given_path(self) -> str:
        """Return the path or name of the model, which other machines load."""
        if not self.settings["model"]:
            raise ValueError(
                "index: ray: expected a model by its path or name, which actors load, found an opened one"
            )
        return self.settings["model"]

    def remove(self, videos: Sequence[str | Path]) -> int:
        """Remove the videos with these paths, or below these folders; return their number."""
        paths = [os.path.abspath(video) for video in videos]

        def named(row: VideoRow) -> bool:
            return any(row.video == path or row.video.startswith(path.rstrip("/") + "/") for path in paths)

        return self._remove(named)

    def prune(self) -> int:
        """Remove the videos whose files are gone; return their number."""
        return self._remove(lambda row: not os.path.exists(row.video))

    def _remove(self, named: Callable[[VideoRow], bool]) -> int:
        with self._writing():
            rows = [row for row in self._refreshed().contents.videos.values() if named(row)]
            self._store.append([], [replace(row, state="removed") for row in rows])
            self._store.compact(self._refreshed().contents)
            self._refreshed()
        return len(rows)

    def compact(self) -> None:
        """Remove replaced moments and old versions from the disk."""
        with self._writing():
            self._store.compact(self._refreshed().contents)
            self._refreshed()

    def rebuild(
        self,
        *,
        model: str | Path | Model | None = None,
        moments: MomentMode | None = None,
        merge: int | None = None,
        progress: Callable[[IndexProgress], None] | None = None,
    ) -> AddReport:
        """Index all videos again in a folder beside this one, then take its place; close this object.

        Args:
            model: another model; default: the same.
            moments: another way to cut files; default: the same.
            merge: another number of merged tokens, as in `create`; default: the same.
        """
        beside, before = self.path.with_name(f".{self.path.name}.rebuild"), aside(self.path)
        settings, chosen = self.settings, self._given if model is None else model
        if merge is None and not isinstance(chosen, Model):
            merge = settings.get("merge")
        with self._writing() as lock:
            rows = [row for row in self._refreshed().contents.videos.values() if row.state != "gone"]
            shutil.rmtree(beside, ignore_errors=True)
            fresh = Index.create(
                beside,
                chosen,
                moments=moments or settings["moments"],
                transnet=settings["transnet"] and moments in (None, "shots"),
                vectors=settings["dtype"],
                device=self._device,
                merge=merge,
            )
            try:
                report = fresh._add([_source(row) for row in rows], [], progress)
            finally:
                fresh.close()
            shutil.rmtree(before, ignore_errors=True)
            self.path.rename(before)
            beside.rename(self.path)
            lock.move(self.path, renamed=before)
            shutil.rmtree(before, ignore_errors=True)
        self.close()
        return report

    def calibrate(self, captions: Sequence[str] | None = None, *, recall: float | None = None) -> None:
        """Measure the scores of captions that describe none of the videos, for probabilities.

        Args:
            captions: default: random ones of the training split of the model's run, or general sentences.
            recall: share of queries whose first hit is right, if the index has their answer; default: R@1 of
                the run's test, or 0.5.
        """
        if recall is not None and not 0 < recall <= 1:
            raise ValueError(f"recall: expected a share above 0, at most 1, found {recall}")
        with self._writing():
            self._refreshed()
            self._calibrate(captions, recall)

    def _calibrate_if_changed(self) -> None:
        calibration, moments = self._calibration(), len(self._current().contents)
        before = 0 if calibration is None else calibration.moments
        if not before or not before / RECALIBRATE <= moments <= before * RECALIBRATE:
            self._calibrate(None)

    def _calibrate(self, captions: Sequence[str] | None, recall: float | None = None) -> None:
        loaded, earlier = self._current(), self._calibration()
        if recall is None:
            recall = calibrate.recall_of(self.model) if earlier is None else earlier.recall
        if captions is None:
            captions = self.settings["captions"]
        if not captions:
            captions = calibrate.random_captions(self.model)
        self.settings["captions"], self.settings["calibration"] = list(captions), None
        self._bank = None
        if calibrate.enough(captions, len(loaded.contents)):
            best = []
            bank = self._caption_bank()
            for row in range(len(bank)):
                text = bank[row : row + 1]
                query = EmbeddedQuery(pooled=unit(text.pooled[0].float()), text=text)
                scores = score(self.model.method, loaded, query, 1)
                best.append(standardised(scores.values[:1], scores.background)[0])
            fitted = Calibration.fit(np.array(best), len(loaded.contents), recall)
            self.settings["calibration"] = asdict(fitted)
        write_settings(self.path, self.settings)

    @contextmanager
    def _writing(self) -> Iterator[WriterLock]:
        """Hold the lock of the folder.

        Raises:
            LockHeld: another process is writing.
            ValueError: the index was opened to be read only.
        """
        if self.read_only:
            raise ValueError(f"{self.path}: expected an index opened for writing, found read_only=True")
        with WriterLock(self.path, "discovla index") as lock:
            yield lock


def _cut(settings: Mapping[str, Any]) -> Cut:
    """Return how files are cut."""
    return "transnet" if settings["transnet"] and settings["moments"] == "shots" else settings["moments"]


def _row(source: SourceVideo, video_id: int) -> VideoRow:
    """Return the row of a video that has not been read."""
    return VideoRow(
        video_id=video_id,
        video=source.video,
        start=source.start,
        end=source.end,
        clip=source.clip,
        size=0,
        mtime_ns=0,
        checksum="",
        state="refused",
        reason="",
        duration=0.0,
        moments=0,
        columns=to_json(dict(source.columns)),
    )


def _source(row: VideoRow) -> SourceVideo:
    return SourceVideo(
        video=row.video, start=row.start, end=row.end, clip=row.clip, columns=row.own_columns()
    )
