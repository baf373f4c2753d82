"""Tables, lists and pickles of annotations, as they are found."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from discovla.data.captions.frame_captions import read_json


def first_of(root: Path, *names: str, folders: tuple[str, ...] = ("",)) -> Path | None:
    """The first of several files that is there; earlier names win over earlier folders."""
    paths = [root / folder / name for name in names for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def needed(root: Path, *names: str, folders: tuple[str, ...] = ("",)) -> Path:
    """As `first_of`.

    Raises:
        ValueError: none of them is there.
    """
    path = first_of(root, *names, folders=folders)
    if path is None:
        if not root.is_dir():
            raise ValueError(f"{root}: expected a folder of annotation files, found none")
        raise ValueError(f"{root}: expected {' or '.join(names)}, found none")
    return path


def read_ids(path: Path) -> list[str]:
    """A list of video ids, each once: lines of a .txt, the column `video_id` of a .csv, a list of a .json.

    Raises:
        ValueError: the file is no such list, or an empty one.
    """
    if path.suffix == ".csv":
        ids = [row["video_id"] for _, row in rows(path, required=("video_id",))]
    elif path.suffix == ".json":
        ids = read_json(path)
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise ValueError(f"{path}: expected a list of video ids")
    else:
        ids = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not ids:
        raise ValueError(f"{path}: expected at least one video id, found none")
    return list(dict.fromkeys(ids))


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ValueError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found byte {error.start} is not") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a text file, {error.strerror}") from error


def read_pickle(path: Path) -> Any:
    """A pickle of plain containers, texts and numbers; one that names anything else is not run.

    Raises:
        ValueError: there is no such file, or it is no such pickle.
    """
    try:
        with path.open("rb") as file:
            return _Plain(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a pickle of plain values: {error or 'it is empty'}") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a pickle, {error.strerror}") from error


class _Plain(pickle.Unpickler):
    """Reads no classes and calls no functions."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")  # of texts that Python 2 wrote

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Captions by video: a .json of lists of texts, or a .pkl of lists of token lists (joined by a space).

    Raises:
        ValueError: the file is no such object; the video is named.
    """
    lists = read_pickle(path) if path.suffix == ".pkl" else read_json(path)
    if not isinstance(lists, dict) or not lists:
        raise ValueError(f"{path}: expected an object of captions by video, found {type(lists).__name__}")
    captions = {}
    for name, texts in lists.items():
        joined = [_joined(text) for text in texts] if isinstance(texts, list) else [None]
        if not isinstance(name, str) or not texts or None in joined:
            raise ValueError(
                f"{path}: {name!r}: expected a list of texts or of lists of words, found {str(texts)[:60]}"
            )
        captions[name] = tuple(text for text in joined if text)
    return captions


def _joined(text: Any) -> str | None:
    """A caption given as a text or as its words."""
    if isinstance(text, list) and all(isinstance(word, str) for word in text):
        text = " ".join(text)
    return text if isinstance(text, str) and text.strip() else None


def rows(
    path: Path, *, required: tuple[str, ...], allowed: tuple[str, ...] | None = None
) -> Iterable[tuple[int, dict[str, str]]]:
    """Rows of a table with a header and the line each ends at; by comma, semicolon or tab, any line ends."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header_line = file.readline()
            separator = max(",;\t", key=header_line.count)
            header = [
                name.strip().lower() for name in next(csv.reader([header_line], delimiter=separator), [])
            ]
            _check_header(header, f"{path}:1", required, allowed)
            for cells, line in _cells(csv.reader(file, delimiter=separator, strict=True)):
                yield line, _row(header, cells, f"{path}:{line}", required)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found byte {error.start} is not") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not a table: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a table, {error.strerror}") from error


def _cells(reader: Any) -> Iterable[tuple[list[str], int]]:
    """Rows that hold anything, with the file line each ends at."""
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield cells, reader.line_num + 1


def _check_header(
    header: list[str], where: str, required: tuple[str, ...], allowed: tuple[str, ...] | None
) -> None:
    """The columns that must be there, and, where only some are known, no others."""
    missing = [name for name in required if name not in header]
    unknown = [name for name in header if allowed is not None and name not in allowed]
    found = ", ".join(header) or "nothing"
    if missing:
        raise ValueError(f"{where}: expected the column {', '.join(missing)}, found {found}")
    if unknown or len(set(header)) != len(header):
        raise ValueError(
            f"{where}: expected the columns {', '.join(allowed or required)} once each, found {found}"
        )


def _row(header: list[str], cells: list[str], where: str, required: tuple[str, ...]) -> dict[str, str]:
    """One row by column, its required cells not empty."""
    if len(cells) != len(header):
        raise ValueError(f"{where}: expected {len(header)} columns, found {len(cells)}")
    said = ("caption", "sentence")  # kept as they stand: frame captions are keyed by the raw text
    row = {name: cell if name in said else cell.strip() for name, cell in zip(header, cells, strict=True)}
    for name in required:
        if not row[name].strip():
            raise ValueError(f"{where}: {name} is empty")
    return row
