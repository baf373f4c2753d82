"""Tables with a header, whose rows are counted in and out: a row that a stray quote swallows is an error."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from discovla.data.datasets.files import VIDEO_SUFFIXES, read_json, read_text

_VERBATIM = ("caption", "sentence")  # not stripped: frame captions are keyed by the raw text
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}

Row = tuple[int, dict[str, str]]


@dataclass
class _Lines:
    """Lines of a text, with the number of the last one read and those of the row under way."""

    text: io.StringIO
    number: int = 0
    row: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.text)
        self.number += 1
        self.row.append(line)
        return line

    @property
    def first(self) -> int:
        """Number of the first line of the row."""
        return self.number - len(self.row) + 1


def read_table(
    path: Path,
    *,
    required: tuple[str, ...],
    allowed: tuple[str, ...] | None = None,
    notes: list[str] | None = None,
) -> list[Row]:
    """Read the rows of a table with a header, each with the number of its first line.

    The separator is the most frequent of comma, semicolon and tab in the header.  Column names ignore case.

    Args:
        required: columns that must exist and whose cells must not be empty; the first names the video.
        allowed: the only columns accepted; None accepts any.
        notes: receives a line about cells that run over several lines, and one about rows of empty cells.

    Raises:
        ValueError: a bad header or row, or a quoted cell that runs over lines that are rows themselves; the
            message names file and line.
    """
    lines = _Lines(io.StringIO(read_text(path, "table"), newline=""))
    first_line = next(lines, "")
    separator = max(_SEPARATORS, key=first_line.count)
    cells = next(csv.reader([first_line], delimiter=separator), [])
    header = [name.strip().lower() for name in cells]
    _check_header(header, f"{path}:1", required, allowed)
    rows: list[Row] = []
    long_cells: list[tuple[int, list[str]]] = []  # first line, and lines after it, of a row on several lines
    empty: list[int] = []
    for line, cells in _records(path, lines, separator):
        if not any(cell.strip() for cell in cells):
            if cells:
                empty.append(line)
            continue
        if [cell.strip().lower() for cell in cells] == header:
            raise ValueError(f"{path}:{line}: expected a row, found the header again")
        rows.append((line, _row(f"{path}:{line}", header, cells, required)))
        if len(lines.row) > 1:
            long_cells.append((line, lines.row[1:]))
    _check_swallowed(path, header.index(required[0]), separator, rows, required[0], long_cells)
    if notes is not None and long_cells:
        notes.append(_note("rows have a cell on several lines", [line for line, _ in long_cells]))
    if notes is not None and empty:
        notes.append(_note("rows of empty cells are left out", empty))
    return rows


def _records(path: Path, lines: _Lines, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row with the number of its first line."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        lines.row = []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                fault = "a quoted cell begins here and never ends"
            elif "expected after" in str(error):
                end = f" and ends at line {lines.number}" if len(lines.row) > 1 else ""
                fault = (
                    f"a quoted cell begins here{end}, without {_SEPARATORS[separator]} after its last quote"
                )
            else:
                fault = str(error).replace("field larger than field limit", "a cell is longer than the limit")
            raise ValueError(
                f"{path}:{lines.first}: not a table: {fault}; a quote inside a quoted cell is written twice"
            ) from error
        yield lines.first, cells


def _row(where: str, header: list[str], cells: list[str], required: tuple[str, ...]) -> dict[str, str]:
    """Return a row by column."""
    if len(cells) != len(header):
        raise ValueError(f"{where}: expected {len(header)} columns, found {len(cells)}")
    if any(re.match(r'\s+"', cell) for cell in cells):
        raise ValueError(f"{where}: a space before the first quote of a cell, which is then no longer quoted")
    row = {
        name: cell if name in _VERBATIM else cell.strip() for name, cell in zip(header, cells, strict=True)
    }
    for name in required:
        if not row[name].strip():
            raise ValueError(f"{where}: {name} is empty")
    return row


def _check_swallowed(
    path: Path,
    column: int,
    separator: str,
    rows: list[Row],
    key: str,
    long_cells: list[tuple[int, list[str]]],
) -> None:
    """Refuse a quoted cell that runs over a line with a video in the column of videos."""
    names = {_pattern(row[key]) for _, row in rows}
    for first, lines in long_cells:
        for line, text in enumerate(lines, start=first + 1):
            cells = next(csv.reader([text], delimiter=separator), [])
            name = cells[column].strip() if 1 < len(cells) > column else ""
            is_video = name.lower().endswith(VIDEO_SUFFIXES) or (
                any(map(str.isdigit, name)) and _pattern(name) in names
            )
            if name and is_video:
                raise ValueError(
                    f"{path}:{first}: a quoted cell begins here and runs over line {line}, a row of its own "
                    f"({name[:40]}); is a quote missing?"
                )


def _pattern(name: str) -> str:
    """Return a name with each number replaced by 0: names of one dataset often differ in numbers only."""
    return re.sub(r"\d+", "0", name)


def _note(text: str, lines: list[int]) -> str:
    some = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
    return f"{len(lines)} {text}: line {some}"


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
