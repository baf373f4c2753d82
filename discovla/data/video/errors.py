"""Errors of video files."""

from __future__ import annotations

from pathlib import Path


class DecodeError(Exception):
    """A video file that gives no frames, or not the sampled ones."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class WrongFrames(Exception):
    """A decoder cannot give the frames of the index of a file."""


def check_file(path: Path) -> None:
    """Check that a path is a regular file that is not empty.

    Raises:
        DecodeError: it is not.
    """
    try:
        if not path.exists():
            raise DecodeError(path, "there is no such file")
        if not path.is_file():
            raise DecodeError(path, "expected a file, found a folder or a device")
        if path.stat().st_size == 0:
            raise DecodeError(path, "the file is empty (0 bytes)")
    except OSError as error:
        raise DecodeError(path, f"cannot be read: {error_text(error)}") from error


def error_text(error: Exception) -> str:
    """Return the text of an error of the system or of FFmpeg without its number and path."""
    return getattr(error, "strerror", None) or str(error)
