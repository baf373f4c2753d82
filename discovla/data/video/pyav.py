"""Video files by PyAV: opening, decoding to the end, seeking by the index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.video.errors import DecodeError, check_file, words
from discovla.data.video.index import FrameIndex, FrameIndexBuilder, displayed


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its best video stream, to be decoded on one thread.

    Raises:
        DecodeError: it is no file, does not open or holds no video.
    """
    check_file(path)
    try:
        # A title in a broken encoding is no reason to refuse a video.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except (FFmpegError, OSError) as error:
        raise DecodeError(path, _unopened(path, error)) from error
    with container:
        stream = _best(path, container)
        # Frame threading gives other frames, and other numbers of them, on broken files.
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        yield container, stream


def _unopened(path: Path, error: Exception) -> str:
    """Why a file does not open."""
    if isinstance(error, PermissionError):
        return f"cannot be read: {words(error)}"
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return f"truncated: an MP4 file without its index ({words(error)})"
    return f"not a video file ({words(error)})"


def _best(path: Path, container: InputContainer) -> VideoStream:
    """The best video stream, a picture on a sound file's cover not being one."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & stream.disposition.attached_pic:
        if container.streams.video and not isinstance(stream, VideoStream):
            raise DecodeError(path, "no video stream that can be decoded")
        kind = "audio only" if container.streams.audio else "neither video nor audio in it"
        raise DecodeError(path, f"no video stream: {kind}")
    if stream.codec_context is None:
        raise DecodeError(path, "no decoder for its video stream")
    return stream


def is_cut_off(path: Path) -> bool:
    """Whether an MP4 file ends before the last of its boxes does."""
    end, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while end < size:
            file.seek(end)
            head = file.read(16)
            if len(head) < 8 or (end == 0 and head[4:8] != b"ftyp"):
                return end > 0
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            if length < 8:
                return False  # 0: the box runs to the end of the file, whatever that is
            end += length
    return end > size


def scan(
    path: Path,
    sampling: Sampling | None,
    each: Callable[[Image.Image], np.ndarray],
    count: int | None,
    *,
    prints: bool = False,
) -> tuple[dict[int, np.ndarray], FrameIndex]:
    """Decode the whole file, keeping the frames sampled where `count` frames decode; None is a guess.

    Args:
        prints: whether the table is to tell each frame from others.

    Returns: frames by index, those of another count where the guess was wrong, and the table of all.

    Raises:
        DecodeError: the file does not open.
    """
    images: dict[int, np.ndarray] = {}
    with open_video(path) as (container, stream):
        draft = FrameIndexBuilder.of(stream, prints=prints)
        wanted = _wanted(sampling, _guess(path, stream) if count is None else count, draft.rate)
        try:
            for packet in container.demux(stream):
                draft.saw_packet(packet)
                for frame in packet.decode():
                    if draft.saw_frame(frame) in wanted:
                        image = displayed(frame, draft.size)
                        draft.saw_image(image)
                        images[draft.count - 1] = each(image)
        except FFmpegError as error:
            draft.problem = words(error) + (" (the file is cut off)" if is_cut_off(path) else "")
    return images, draft.table()


def _wanted(sampling: Sampling | None, count: int | None, rate: float | None) -> set[int]:
    """Frames to keep if `count` decode; none where that cannot be right, which the true count then shows."""
    if sampling is None or rate is None or not count:
        return set()
    try:
        return set(sampling.indices(count, rate))
    except ValueError:
        return set()


def _guess(path: Path, stream: VideoStream) -> int:
    """How many frames may decode: what the header promises, or else the packets of the file."""
    if stream.frames:
        return stream.frames
    with open_video(path) as (container, again):
        try:
            return sum(1 for packet in container.demux(again) if packet.size)
        except FFmpegError:
            return 0


class Astray(Exception):
    """A file which, entered at its key frames, does not give the frames of its table."""


def read_entering(
    path: Path, table: FrameIndex, indices: Sequence[int], each: Callable[[Image.Image], np.ndarray]
) -> dict[int, np.ndarray]:
    """Frames from the last key frame before each on, leaving out those which no other frame needs.

    How far apart the key frames are decides how much is decoded: with one in the file all up to the last
    frame wanted but the pictures no other refers to, with many the way from a key frame to each frame.

    Args:
        path, table: a file and the table of it, whose times are `ordered`.
        indices: of frames, each < table.count.
        each: as of `read_frames`.

    Raises:
        Astray: a frame does not come, or not as it was when the table was made.
        DecodeError: the file no longer opens.
    """
    images: dict[int, np.ndarray] = {}
    wanted = sorted(set(indices))
    with open_video(path) as (container, stream):
        for key, group in groupby(wanted, table.key_of):
            for index, frame in _found(container, stream, table, key, list(group)):
                image = displayed(frame, table.size)
                if table.differs(index, image):
                    raise Astray(f"frame {index} is not the one it was")
                images[index] = each(image)
    return images


def _found(
    container: InputContainer, stream: VideoStream, table: FrameIndex, key: int, indices: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """The frames of these indices, all after the same key frame, in any order."""
    index_of = {table.times[index]: index for index in indices}
    # Some formats seek the time at which a key frame is shown, others that at which it is decoded.
    shown, decoded = (None, None) if key < 0 else (table.times[table.keys[key][0]], table.keys[key][1])
    for time in (shown, decoded):
        try:
            if time is not None:
                container.seek(time, stream=stream, backward=True)
            for frame in _entered(container, stream, set(index_of)):
                yield index_of.pop(frame.pts), frame
        except FFmpegError as error:
            raise Astray(words(error)) from error
        if not index_of:
            return
    raise Astray(f"frame {min(index_of.values())} does not come")


def _entered(container: InputContainer, stream: VideoStream, times: set[int | None]) -> Iterator[VideoFrame]:
    """The frames of these times, from where the file stands to where the last of them is decoded."""
    unsent = set(times)
    for packet in container.demux(stream):
        if packet.size:
            unsent.discard(packet.pts)
            # Pictures that no other refers to are left out, those wanted excepted.
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
        frames = stream.decode(packet)
        if packet.size and not unsent:
            frames += stream.decode(None)  # what the decoder holds back; seeking wakes it again
        yield from (frame for frame in frames if frame.pts in times)
        if not unsent:
            return
