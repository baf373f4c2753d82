"""Errors of video files."""

from __future__ import annotations

from pathlib import Path


class DecodeError(Exception):
    """A video that gives no frames, or not the frames asked for."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


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


def words(error: Exception) -> str:
    """An error of the system or of FFmpeg without its number and path."""
    return getattr(error, "strerror", None) or str(error)
