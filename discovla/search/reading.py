"""Read the frames of moments from video files, in a process of its own that imports no torch."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import (
    Damaged,
    FileDecoder,
    Hdr,
    check_hdr,
    read_frames,
    resize_and_crop,
)
from discovla.data.video.index import FrameIndexBuilder, FrameIndexStore, default_index_dir
from discovla.data.video.pyav import (
    displayed_pixels,
    index_builder,
    noting_problem,
    numbered_frames,
    open_video,
)
from discovla.search.clock import Clock
from discovla.search.segments import MomentCutter, Span, signature

GRID = 4.0  # frames a second from which the moments of a file are sampled
PREVIEW = 320  # pixels of the longer side of a thumbnail
PART = 4  # moments of one answer
IMAGE_PIXELS = 100_000_000  # of an image as a query

Cut = Literal["shots", "transnet", "windows", "whole"]


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """Part of a video to read.

    cut: where moments begin; "whole" reads one, from `start` to `end`.
    start, end: span in seconds with "whole"; None for the start or end of the file.
    sampling: of the frames of each moment.
    image_size: pixels of a side of the square frames.
    part: number of the part, from 0, one after the other.
    """

    path: Path
    cut: Cut
    sampling: Sampling
    image_size: int
    start: float | None = None
    end: float | None = None
    damaged: Damaged = "refuse"
    hdr: Hdr = "refuse"
    decoder: FileDecoder = "pyav"
    index_dir: Path | None = None
    part: int = 0


@dataclass(frozen=True, kw_only=True)
class MomentFrames:
    """The sampled frames of a moment.

    start, end: seconds from the first frame of the file.
    times: f, of the frames, in the same seconds.
    frames: f y x 3 uint8, at the size of the model.
    previews: f, JPEG of each frame as displayed, small.
    """

    start: float
    end: float
    times: tuple[float, ...]
    frames: np.ndarray
    previews: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class ReadPart:
    """Some moments of a video; `duration` in seconds comes with the last of them, else it is None."""

    moments: list[MomentFrames]
    duration: float | None


@dataclass(frozen=True, kw_only=True)
class _Tick:
    """A frame of the grid."""

    time: float
    pixels: np.ndarray
    preview: bytes
    mark: np.ndarray


def read_part(request: ReadRequest) -> ReadPart:
    """Return the next moments of a file; parts are asked for in order, all in one process.

    Raises:
        DecodeError: the file cannot be read, or another process read the part before.
    """
    if request.cut == "whole":
        return _read_clip(request)
    reader = _Reader.of(request)
    return reader.next_part(request)


@dataclass
class _Reader:
    """The file of which this process is reading one part after the other."""

    path: Path
    parts: Iterator[ReadPart]
    part: int = 0
    current = None  # of the process

    @classmethod
    def of(cls, request: ReadRequest) -> _Reader:
        """Return the reader of a file, a new one for its first part."""
        if request.part == 0:
            cls.current = cls(request.path, _scan(request))
        reader = cls.current
        if reader is None or (reader.path, reader.part) != (request.path, request.part):
            raise DecodeError(request.path, "not decoded: the process that read it was lost")
        return reader

    def next_part(self, request: ReadRequest) -> ReadPart:
        self.part += 1
        part = next(self.parts)
        if part.duration is not None:
            type(self).current = None
        return part


def read_image(content: bytes) -> np.ndarray:
    """Return an image as one RGB frame, 1 y x 3 uint8.

    Raises:
        ValueError: not an image, or too large a one.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > IMAGE_PIXELS:
                raise ValueError(f"image: expected at most {IMAGE_PIXELS} pixels, found {image.size}")
            image.seek(0)
            return np.asarray(image.convert("RGB"))[None]
    except (OSError, SyntaxError, Image.DecompressionBombError, EOFError, MemoryError) as error:
        raise ValueError(f"image: expected an image file: {error}"[:300]) from None


def preview_of(image: Image.Image) -> bytes:
    """Return a small JPEG of an RGB image."""
    small = image.copy()
    small.thumbnail((PREVIEW, PREVIEW), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return out.getvalue()


def _read_clip(request: ReadRequest) -> ReadPart:
    """Read a span of a file, or all of it, as one moment."""
    previews: dict[int, bytes] = {}  # by the identity of the frame, which `read_frames` keeps

    def transform(image: Image.Image) -> np.ndarray:
        frame = resize_and_crop(image, request.image_size)
        previews[id(frame)] = preview_of(image)
        kept.append(frame)  # an identity is that of one frame as long as it lives
        return frame

    kept: list[np.ndarray] = []
    sampling = replace(request.sampling, start=request.start, end=request.end)
    decoded = read_frames(
        request.path,
        sampling,
        transform,
        damaged=request.damaged,
        hdr=request.hdr,
        decoder=request.decoder,
        store=_store(request.index_dir or default_index_dir()),
    )
    images = [decoded.images[index] for index in decoded.indices]
    times = tuple(max(0.0, seconds - decoded.origin) for seconds in decoded.seconds)
    duration = decoded.count / decoded.rate if decoded.rate else max(times)
    start = request.start or 0.0
    end = duration if request.end is None else min(request.end, duration)
    moment = MomentFrames(
        start=start,
        end=max(start, end),
        times=times,
        frames=np.stack(images),
        previews=tuple(previews[id(image)] for image in images),
    )
    return ReadPart(moments=[moment], duration=max(0.0, end - start))


def _scan(request: ReadRequest) -> Iterator[ReadPart]:
    """Decode a file once, to its end, and yield its moments."""
    path, changes = request.path, None
    if request.cut == "transnet":
        from discovla.search.transnet import shot_changes  # imports torch

        changes = shot_changes(path)
    cutter = MomentCutter(shots=request.cut == "shots", changes=changes)
    rate = max(GRID, request.sampling.sample_rate)
    sampling = replace(request.sampling, start=None, end=None)
    ticks: deque[_Tick] = deque()
    ready: list[MomentFrames] = []

    def take(spans: list[Span]) -> None:
        ready.extend(_moment(path, span, ticks, sampling, rate) for span in spans)
        while ticks and ticks[0].time < cutter.start:
            ticks.popleft()

    with open_video(path) as video:
        index, clock, ended = index_builder(video), Clock(), 0.0
        with noting_problem(path, index):
            last: VideoFrame | None = None
            count = 0
            for number, frame in numbered_frames(video, index):
                if number == 0:
                    check_hdr(path, index.hdr, request.hdr)
                time = clock.time(frame, index)
                shown: _Tick | None = None
                while last is not None and count / rate < time - 1e-6:
                    shown = _tick(last, index, request.image_size, count / rate, shown)
                    ticks.append(shown)
                    count += 1
                    take(cutter.add(shown.time, shown.mark))
                    while len(ready) >= PART:
                        yield ReadPart(moments=ready[:PART], duration=None)
                        del ready[:PART]
                last = frame
            ended = clock.now + clock.step(index)
            while last is not None and (count == 0 or count / rate < ended - 1e-6):
                ticks.append(_tick(last, index, request.image_size, count / rate, None))
                count += 1
                take(cutter.add(ticks[-1].time, ticks[-1].mark))
    built = index.build()
    _store(request.index_dir or default_index_dir()).put(path, built)
    fault = built.fault()
    if fault and (built.count == 0 or request.damaged == "refuse"):
        raise DecodeError(path, fault)
    take(cutter.finish(ended))
    yield ReadPart(moments=ready, duration=ended)


def _tick(frame: VideoFrame, index: FrameIndexBuilder, size: int, time: float, shown: _Tick | None) -> _Tick:
    """Return a frame of the grid; `shown` is the same frame at an earlier time."""
    if shown is not None:
        return replace(shown, time=time)
    image = Image.fromarray(displayed_pixels(frame, index.size, None))
    return _Tick(
        time=time, pixels=resize_and_crop(image, size), preview=preview_of(image), mark=signature(image)
    )


def _moment(path: Path, span: Span, ticks: deque[_Tick], sampling: Sampling, rate: float) -> MomentFrames:
    """Return a moment with the frames that the method samples of those in its span."""
    inside = [tick for tick in ticks if span[0] <= tick.time < span[1]] or [ticks[-1]]
    try:
        chosen = [inside[i] for i in sampling.indices(len(inside), rate)]
    except ValueError as error:
        raise DecodeError(path, str(error)) from error
    return MomentFrames(
        start=span[0],
        end=span[1],
        times=tuple(tick.time for tick in chosen),
        frames=np.stack([tick.pixels for tick in chosen]),
        previews=tuple(tick.preview for tick in chosen),
    )


@lru_cache(maxsize=4)
def _store(folder: Path) -> FrameIndexStore:
    return FrameIndexStore(folder)
