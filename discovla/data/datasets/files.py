"""Readers of annotation files: JSON, text, tables, id lists, and pickles without running code."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

VIDEO_SUFFIXES = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".3g2"),
    *(".mts", ".m2ts", ".ts", ".ogv", ".gif"),
)
_VERBATIM = ("caption", "sentence")  # not stripped: frame captions are keyed by the raw text


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
        return json.loads(read_text(path, "JSON file"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error


def read_text(path: str | Path, kind: str = "text file") -> str:
    """Read a text file, without a byte order mark.

    Raises:
        ValueError: the file is missing or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found byte {error.start} is not") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a {kind}, {error.strerror}") from error


def read_ids(path: Path) -> list[str]:
    """Read video ids, each once: lines of a .txt, the column `video_id` of a .csv, or a .json list.

    Raises:
        ValueError: the file has another form or holds no id.
    """
    if path.suffix == ".csv":
        ids = [row["video_id"] for _, row in read_table(path, required=("video_id",))]
    elif path.suffix == ".json":
        ids = read_json(path)
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise ValueError(f"{path}: expected a list of video ids")
    else:
        ids = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not ids:
        raise ValueError(f"{path}: expected at least one video id, found none")
    return list(dict.fromkeys(ids))


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Read captions by video: a .json of lists of texts, or a .pkl of lists of token lists.

    Tokens are joined with a space.

    Raises:
        ValueError: the file has another form; the message names the video.
    """
    lists = read_pickle(path) if path.suffix == ".pkl" else read_json(path)
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


def read_pickle(path: Path) -> Any:
    """Read a pickle of containers, texts and numbers; any class or function in it is refused.

    Raises:
        ValueError: the file is missing or is not such a pickle.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a pickle of plain values: {error or 'it is empty'}") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a pickle, {error.strerror}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Load no classes and call no functions."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")  # of texts that Python 2 wrote

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_table(
    path: Path, *, required: tuple[str, ...], allowed: tuple[str, ...] | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a table with a header, each with the number of its last line.

    The separator is the most frequent of comma, semicolon and tab in the header.  Column names ignore case.

    Args:
        required: columns that must exist and whose cells must not be empty.
        allowed: the only columns accepted; None accepts any.

    Raises:
        ValueError: a bad header or row; the message names file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first_line = file.readline()
            separator = max(",;\t", key=first_line.count)
            cells = next(csv.reader([first_line], delimiter=separator), [])
            header = [name.strip().lower() for name in cells]
            _check_header(header, f"{path}:1", required, allowed)
            reader = csv.reader(file, delimiter=separator, strict=True)
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                line = reader.line_num + 1  # the header was read before
                if len(cells) != len(header):
                    raise ValueError(f"{path}:{line}: expected {len(header)} columns, found {len(cells)}")
                row = {
                    name: cell if name in _VERBATIM else cell.strip()
                    for name, cell in zip(header, cells, strict=True)
                }
                for name in required:
                    if not row[name].strip():
                        raise ValueError(f"{path}:{line}: {name} is empty")
                yield line, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found byte {error.start} is not") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not a table: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a table, {error.strerror}") from error


def _check_header(
    header: list[str], where: str, required: tuple[str, ...], allowed: tuple[str, ...] | None
) -> None:
    """Refuse a header that lacks a required column, has an unknown one, or repeats one."""
    missing = [name for name in required if name not in header]
    unknown = [name for name in header if allowed is not None and name not in allowed]
    columns = ", ".join(header) or "nothing"
    if missing:
        raise ValueError(f"{where}: expected the column {', '.join(missing)}, found {columns}")
    if unknown or len(set(header)) != len(header):
        raise ValueError(
            f"{where}: expected the columns {', '.join(allowed or required)} once each, found {columns}"
        )
