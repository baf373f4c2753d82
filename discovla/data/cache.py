"""Decoded frames kept on disk, at the size the model sees."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import threading
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

_MAGIC = b"dvframe1"
_HEADER = struct.Struct("<8sI4I")  # magic, checksum, f y x c


class FrameCache:
    """One file per clip, written whole or not at all and read back only if its checksum holds.

    A file is keyed by the video's path, size and time of change and by the settings of its decoding, so that
    a changed video or setting never meets old frames.  A file that is damaged is made again.

    Args:
        folder: made where there is none.
        suffix: of the files' names.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, suffix: str = ".frames") -> None:
        self.folder, self.suffix = Path(folder), suffix
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".{os.getpid()}.probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"cache: expected a folder that can be written, {folder}: {error.strerror}"
            ) from error

    def key(self, video: Path, settings: object) -> str:
        """Name of the frames of a video under settings; their `repr` must tell them apart."""
        stat = video.stat()
        text = f"{video}\n{stat.st_size}\n{stat.st_mtime_ns}\n{settings!r}"
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]

    def get(self, key: str) -> np.ndarray | None:
        """The frames kept under a key, f y x 3, or None where there are none to be trusted."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        frames = _unpacked(content)
        if frames is None:
            logger.warning("%s: not what was written, made again", path)
        return frames

    def put(self, key: str, frames: np.ndarray) -> None:
        """Keep frames; a disk that cannot take them is told once and training goes on without."""
        path = self._path(key)
        part = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            part.write_bytes(_packed(frames))
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            _warn_once(str(self.folder), error.strerror or str(error))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{self.suffix}"


def _packed(frames: np.ndarray) -> bytes:
    """Header and bytes of frames."""
    content = np.ascontiguousarray(frames, dtype=np.uint8).tobytes()
    return _HEADER.pack(_MAGIC, zlib.crc32(content), *frames.shape) + content


def _unpacked(content: bytes) -> np.ndarray | None:
    """The frames in the content of a file, or None where it is not what was written."""
    if len(content) < _HEADER.size:
        return None
    magic, checksum, *shape = _HEADER.unpack_from(content)
    body = memoryview(content)[_HEADER.size :]
    if magic != _MAGIC or len(body) != int(np.prod(shape)) or zlib.crc32(body) != checksum:
        return None
    return np.frombuffer(body, np.uint8).reshape(shape)


@lru_cache(maxsize=16)
def _warn_once(folder: str, reason: str) -> None:
    """Say that a cache takes nothing more; once per process, folder and reason."""
    logger.warning(
        "cache %s: cannot be written (%s): clips not kept yet are decoded every time", folder, reason
    )
