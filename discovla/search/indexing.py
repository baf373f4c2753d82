"""Read videos in several processes, embed their moments in batches, write them to the store."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from discovla.batch import Embedding
from discovla.data.loader import pad_frames
from discovla.data.sampling import clip_sampling
from discovla.data.sandbox import Sandbox, WorkerLost
from discovla.data.video.errors import DecodeError, error_text
from discovla.files import write_file
from discovla.model import Model
from discovla.retrieval.embed import embed_videos
from discovla.search.reading import Cut, MomentFrames, ReadPart, ReadRequest, read_part
from discovla.search.records import IndexProgress
from discovla.search.sources import SourceVideo
from discovla.search.store import MomentRow, Store, VideoRow

COMMIT_MOMENTS = 256  # that are written together at most
COMMIT_SECONDS = 10.0  # after which complete videos are written
AHEAD = 16  # videos that are read before their turn


@dataclass(frozen=True, kw_only=True)
class FileStamp:
    """Size, modification time and checksum of a file; the checksum is "" until it is computed."""

    size: int
    mtime_ns: int
    checksum: str = ""

    @classmethod
    def of(cls, path: str) -> FileStamp | None:
        """Return the stamp of a file without its checksum, None if there is no such file."""
        try:
            status = os.stat(path)
        except OSError:
            return None
        return cls(size=status.st_size, mtime_ns=status.st_mtime_ns)

    def with_checksum(self, path: str) -> FileStamp:
        """Return the stamp with the BLAKE2 checksum of the content; without it if that cannot be read."""
        with suppress(OSError), open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            return replace(self, checksum=digest.hexdigest())
        return self


@dataclass(frozen=True, kw_only=True)
class ReadVideo:
    """The end of a video that was read: its duration in seconds, or why it gives no frames."""

    stamp: FileStamp
    duration: float = 0.0
    reason: str = ""


def request_of(video: SourceVideo, cut: Cut, model: Model) -> ReadRequest:
    """Return the first request for a video, with the frames that the model samples."""
    data = model.data
    return ReadRequest(
        path=Path(video.video),
        cut="whole" if video.clip else cut,
        start=video.start,
        end=video.end,
        sampling=clip_sampling(data),
        image_size=model.method.architecture.image_size,
        damaged=data.damaged,
        hdr=data.hdr,
        decoder="torchcodec" if data.decoder == "torchcodec" else "pyav",
        index_dir=data.index_dir,
    )


def read_all(
    request: ReadRequest, read: Callable[[ReadRequest], ReadPart]
) -> Iterator[MomentFrames | ReadVideo]:
    """Yield the moments of a video and then its end, which has the reason if it cannot be read."""
    path = str(request.path)
    stamp = FileStamp.of(path)
    if stamp is None:
        yield ReadVideo(stamp=FileStamp(size=0, mtime_ns=0), reason="there is no such file")
        return
    stamp = stamp.with_checksum(path)
    try:
        while True:
            part = read(request)
            yield from part.moments
            if part.duration is not None:
                yield ReadVideo(stamp=stamp, duration=part.duration)
                return
            request = replace(request, part=request.part + 1)
    except DecodeError as error:
        yield ReadVideo(stamp=stamp, reason=error.reason)
    except WorkerLost as error:
        yield ReadVideo(stamp=stamp, reason=f"not decoded: {error}")
    except OSError as error:
        yield ReadVideo(stamp=stamp, reason=f"cannot be read: {error_text(error)}")


class VideoReader:
    """Reads videos ahead, in threads that each have a process that decodes; yields them in their order.

    Args:
        workers: number of threads.
        limit: seconds that one part of a video may take.
    """

    def __init__(self, requests: Sequence[ReadRequest], *, workers: int, limit: float) -> None:
        self._requests, self._limit = requests, limit
        self._queues = {place: queue.Queue[object](maxsize=2) for place in range(len(requests))}
        self._next, self._turn, self._ended = 0, 0, False
        self._state = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, name=f"read {number}", daemon=True)
            for number in range(max(1, min(workers, len(requests))))
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[int, MomentFrames | ReadVideo]]:
        for place in range(len(self._requests)):
            while True:
                item = self._queues[place].get()
                if isinstance(item, Exception):
                    raise item
                assert isinstance(item, MomentFrames | ReadVideo)
                yield place, item
                if isinstance(item, ReadVideo):
                    break
            with self._state:
                self._turn = place + 1
                del self._queues[place]
                self._state.notify_all()

    def close(self) -> None:
        """End the threads; one that is decoding ends its process when it is done."""
        with self._state:
            self._ended = True
            self._state.notify_all()

    def _read(self) -> None:
        with Sandbox(read_part, limit=self._limit) as sandbox:
            while (place := self._take()) is not None:
                out = self._queues[place]
                try:
                    for item in read_all(self._requests[place], sandbox):
                        self._put(out, item)
                except Exception as error:  # raised again by the thread that iterates
                    self._put(out, error)

    def _take(self) -> int | None:
        """Return the next video once it is near its turn; None at the end."""
        with self._state:
            while not self._ended and self._next < len(self._requests) and self._next > self._turn + AHEAD:
                self._state.wait()
            if self._ended or self._next == len(self._requests):
                return None
            self._next += 1
            return self._next - 1

    def _put(self, out: queue.Queue[object], item: object) -> None:
        while not self._ended:
            with suppress(queue.Full):
                out.put(item, timeout=0.5)
                return


@dataclass
class _Open:
    """A video whose moments are being embedded."""

    row: VideoRow
    moments: list[MomentRow | None] = field(default_factory=list)
    end: ReadVideo | None = None

    @property
    def complete(self) -> bool:
        return self.end is not None and all(moment is not None for moment in self.moments)


@dataclass
class Indexer:
    """Embeds moments over videos in batches and writes complete videos.

    Args:
        store: open.
        model: whose `batch_size` moments are embedded together.
        next_moment: id of the first moment.
        before_write: called before each write; raises if this process may no longer write.
    """

    store: Store
    model: Model
    next_moment: int
    before_write: Callable[[], None] = lambda: None
    encoding: float = 0.0  # seconds
    written: int = 0  # moments
    _open: dict[int, _Open] = field(default_factory=dict)
    _waiting: list[tuple[int, int, MomentFrames]] = field(default_factory=list)  # video, place, frames
    _last_write: float = field(default_factory=time.monotonic)

    def begin(self, row: VideoRow) -> None:
        """Expect the moments of a video, of which `row` has all but the result."""
        self._open[row.video_id] = _Open(row)

    def add(self, video_id: int, item: MomentFrames | ReadVideo) -> VideoRow | None:
        """Add a moment, or the end of a video, whose final row is returned."""
        video = self._open[video_id]
        if isinstance(item, MomentFrames):
            video.moments.append(None)
            self._waiting.append((video_id, len(video.moments) - 1, item))
            if len(self._waiting) == self.model.batch_size:
                self._embed()
                self._write_some()
            return None
        video.end = item
        if item.reason:
            self._waiting = [one for one in self._waiting if one[0] != video_id]
            video.moments = []
        video.row = replace(
            video.row,
            size=item.stamp.size,
            mtime_ns=item.stamp.mtime_ns,
            checksum=item.stamp.checksum,
            state="refused" if item.reason else "indexed",
            reason=item.reason,
            duration=item.duration,
            moments=len(video.moments),
        )
        return video.row

    def finish(self) -> None:
        """Embed and write what is left."""
        self._embed()
        self._write()

    def add_embedded(self, video_id: int, moments: Sequence[MomentRow], end: ReadVideo) -> VideoRow:
        """Add a video whose moments are embedded already; their ids are given here."""
        video = self._open[video_id]
        video.moments = [replace(moment, video_id=video_id) for moment in moments]
        row = self.add(video_id, end)
        assert row is not None, "its end was added"
        self._write_some()
        return row

    def _embed(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        began = time.perf_counter()
        rows = embed_moments(self.model, [moment for _, _, moment in waiting])
        self.encoding += time.perf_counter() - began
        for (video_id, place, _), row in zip(waiting, rows, strict=True):
            self._open[video_id].moments[place] = replace(row, video_id=video_id)

    def _write_some(self) -> None:
        """Write complete videos if there are many moments in them, or if the last write is long ago."""
        ready = sum(len(video.moments) for video in self._open.values() if video.complete)
        if ready >= COMMIT_MOMENTS or time.monotonic() - self._last_write >= COMMIT_SECONDS:
            self._write()

    def _write(self) -> None:
        complete = {video_id: video for video_id, video in self._open.items() if video.complete}
        if complete:
            moments = [
                moment for video in complete.values() for moment in video.moments if moment is not None
            ]
            numbered = [replace(row, moment_id=self.next_moment + i) for i, row in enumerate(moments)]
            self.before_write()
            self.store.append(numbered, [video.row for video in complete.values()])
            self.next_moment += len(numbered)
            self.written += len(numbered)
            for video_id in complete:
                del self._open[video_id]
        self._last_write = time.monotonic()


def embed_moments(model: Model, moments: Sequence[MomentFrames]) -> list[MomentRow]:
    """Embed moments as one batch; ids are left -1."""
    frames = pad_frames([moment.frames for moment in moments], model.data.frames, 1)
    lengths = torch.tensor([len(moment.frames) for moment in moments])
    mask = torch.arange(model.data.frames) < lengths[:, None]  # b f
    embedding = embed_videos(model.method, [(frames, mask)], model.device, frames=True)
    return [_moment_row(moment, embedding[i : i + 1]) for i, moment in enumerate(moments)]


def _moment_row(moment: MomentFrames, embedding: Embedding) -> MomentRow:
    """Return the row of a moment from its embedding, of one row."""
    count = len(moment.times)
    features = embedding.frames
    assert features is not None, "embedded with features of frames"
    features = features[0, :count]
    best = int(F.cosine_similarity(features.float(), embedding.pooled.float()).argmax())
    tokens, mask = embedding.tokens, embedding.mask
    repeated = tokens is not None and torch.equal(tokens[0, :count], features)
    return MomentRow(
        moment_id=-1,
        video_id=-1,
        start=moment.start,
        end=moment.end,
        times=np.array(moment.times, np.float32),
        best=best,
        thumbnail=moment.previews[best],
        pooled=embedding.pooled[0].float().numpy(),
        tokens=None if tokens is None else tokens[0].float().numpy(),
        mask=None if mask is None else mask[0].numpy(),
        frames=None if repeated else features.half().numpy(),
    )


class ProgressFile:
    """State of an `add` that runs, in a file that other processes read.

    Args:
        sizes: bytes of each video, by which the remaining time is estimated.
        report: called with every new state.
    """

    NAME = "progress.json"

    def __init__(
        self, path: Path, sizes: Sequence[int], report: Callable[[IndexProgress], None] | None
    ) -> None:
        self.file, self._sizes, self._report = path / self.NAME, sizes, report
        self._began, self._bytes, self._done, self._written = time.monotonic(), 0, 0, 0.0

    def step(self, size: int, moments: int) -> None:
        """Count a video of so many bytes as done."""
        self._done += 1
        self._bytes += size
        now = time.monotonic()
        seconds, total = now - self._began, sum(self._sizes)
        remaining = seconds * (total - self._bytes) / self._bytes if self._bytes else None
        state = IndexProgress(
            done=self._done,
            total=len(self._sizes),
            moments=moments,
            seconds=seconds,
            remaining=None if remaining is None else max(0.0, remaining),
        )
        if self._report is not None:
            self._report(state)
        if now - self._written >= 1:
            self._written = now
            with suppress(OSError):  # a full disk is reported by the write of the moments
                write_file(self.file, json.dumps(vars(state)))

    def close(self) -> None:
        """Remove the file."""
        self.file.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> IndexProgress | None:
        """Return the state that another process has written, None if there is none."""
        try:
            return IndexProgress(**json.loads((path / cls.NAME).read_text()))
        except (OSError, ValueError, TypeError):
            return None
