"""Readers of annotation files: JSON, text, captions by video, and pickles without running code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from discovla.foreign import parse_json, read_plain_pickle, read_utf8

VIDEO_SUFFIXES = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".3g2"),
    *(".mts", ".m2ts", ".ts", ".ogv", ".gif"),
)


def optional_file(root: Path, *names: str, folders: tuple[str, ...] = ("",)) -> Path | None:
    """Return the first file that exists, or None; earlier names win over earlier folders."""
    paths = [root / folder / name for name in names for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def required_file(root: Path, *names: str, folders: tuple[str, ...] = ("",)) -> Path:
    """Return the first file that exists; earlier names win over earlier folders.

    Raises:
        ValueError: none exists.
    """
    path = optional_file(root, *names, folders=folders)
    if path is None:
        if not root.is_dir():
            raise ValueError(f"{root}: expected a folder of annotation files, found none")
        raise ValueError(f"{root}: expected {' or '.join(names)}, found none")
    return path


class VideoFolder:
    """Find video files by id, with any extension.

    Args:
        folder: of the video files.
        extension: assumed for a file that does not exist.
    """

    def __init__(self, folder: str | Path, extension: str = ".mp4") -> None:
        self.folder = Path(folder).resolve()
        self.extension = extension
        self._listings: dict[Path, dict[str, str]] = {}

    def find(self, *names: str) -> Path:
        """Return the first existing file among `names`, each tried with and without an extension.

        Args:
            names: relative to the folder, the most likely first.

        Returns:
            The file's path.  If no file exists, the path of the first name, with `extension` appended unless
            it already has a video extension.
        """
        for name in names:
            path = self.folder / name
            file = self._files(path.parent).get(path.name)
            if file is not None:
                return path.parent / file
        first = names[0]
        if not first.lower().endswith(VIDEO_SUFFIXES):
            first = first.removesuffix(".") + self.extension
        return self.folder / first

    def _files(self, folder: Path) -> dict[str, str]:
        """Map full file names and stems to file names; `extension` wins where stems collide."""
        if folder not in self._listings:
            files = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
            files.sort(key=lambda name: not name.endswith(self.extension))
            stems = [(n.rpartition(".")[0], n) for n in files if n.lower().endswith(VIDEO_SUFFIXES)]
            self._listings[folder] = dict(reversed(stems)) | {name: name for name in files}
        return self._listings[folder]


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    try:
        return parse_json(read_text(path, "JSON file"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error


def read_text(path: str | Path, kind: str = "text file") -> str:
    """Read a text file, without a byte order mark.

    Raises:
        ValueError: the file is missing or is not UTF-8.
    """
    try:
        return read_utf8(Path(path), f"a {kind}")
    except OSError as error:
        raise ValueError(f"{path}: expected a {kind}, {error.strerror}") from error


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Read captions by video: a .json of lists of texts, or a .pkl of lists of token lists.

    Tokens are joined with a space.

    Raises:
        ValueError: the file has another form; the message names the video.
    """
    lists = read_plain_pickle(path) if path.suffix == ".pkl" else read_json(path)
    if not isinstance(lists, dict) or not lists:
        raise ValueError(f"{path}: expected an object of captions by video, found {type(lists).__name__}")
    captions = {}
    for name, texts in lists.items():
        joined = [_caption(text) for text in texts] if isinstance(texts, list) else []
        if not isinstance(name, str) or not joined or None in joined:
            raise ValueError(
                f"{path}: {name!r}: expected a list of texts or of lists of words, found {str(texts)[:60]}"
            )
        captions[name] = tuple(joined)
    return captions


def _caption(text: Any) -> str | None:
    """Return a text, or a list of words joined by spaces; None for anything else or an empty text."""
    if isinstance(text, list) and all(isinstance(word, str) for word in text):
        text = " ".join(text)
    return text if isinstance(text, str) and text.strip() else None
