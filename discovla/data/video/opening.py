"""Opening video files, and saying what is wrong with those that do not open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream


class DecodeError(Exception):
    """A video that gives no frames, or not the frames asked for."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
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


def check_file(path: Path) -> None:
    """Refuse what is not a regular file with something in it.

    Raises:
        DecodeError: the path is no such file.
    """
    try:
        if not path.exists():
            raise DecodeError(path, "there is no such file")
        if not path.is_file():
            raise DecodeError(path, "expected a file, found a folder or a device")
        if path.stat().st_size == 0:
            raise DecodeError(path, "the file is empty (0 bytes)")
    except OSError as error:
        raise DecodeError(path, f"cannot be read: {words(error)}") from error


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


def words(error: Exception) -> str:
    """An error of the system or of FFmpeg without its number and path."""
    return getattr(error, "strerror", None) or str(error)
