"""Videos to index, from files, folders, tables and manifests."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from discovla.data.datasets.files import VIDEO_SUFFIXES, read_text
from discovla.data.datasets.generic import FileTree
from discovla.data.datasets.tables import read_table
from discovla.data.manifest import check_seconds, check_span, json_object, read_manifest
from discovla.foreign import printable
from discovla.search.records import Value

logger = logging.getLogger(__name__)

Source = str | Path | tuple[str | Path, float, float] | Mapping[str, Any]
TABLE_SUFFIXES = (".csv", ".tsv")
OWN_KEYS = ("video", "start", "end")  # the others of a mapping are the user's columns
_MANIFEST = {"id", "video", "captions", "split"}


@dataclass(frozen=True, kw_only=True)
class SourceVideo:
    """A video to index.

    video: absolute path.  start, end: span in seconds, or None.
    clip: it is one moment; else it is cut into several.
    """

    video: str
    start: float | None = None
    end: float | None = None
    clip: bool = False
    columns: Mapping[str, Value] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, float | None, float | None, bool]:
        """Key by which it is the same source when it is added again."""
        return self.video, self.start, self.end, self.clip


def expand(sources: Sequence[Source]) -> tuple[list[SourceVideo], list[tuple[str, str]]]:
    """Return the videos that sources name, each once, and names that cannot be used, with the reasons.

    A clip of a manifest, or one with a start or end, is one moment.

    Raises:
        ValueError: a bad table or manifest, or no video at all.
    """
    videos: dict[Any, SourceVideo] = {}
    refused: list[tuple[str, str]] = []
    for source in sources:
        for video in _expand(source, refused):
            name = video.video
            if printable(name) != name:
                refused.append((printable(name), "its name is not UTF-8: rename it"))
            else:
                videos[video.key] = video
    if not videos and not refused:
        raise ValueError(f"videos: expected at least one, found none in {', '.join(map(str, sources))}"[:300])
    return list(videos.values()), refused


def typed(text: str) -> Value:
    """Return a cell of a table as a number if it is one, None if it is empty."""
    text = text.strip()
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        return value if math.isfinite(value) and "_" not in text else text
    return text or None


def _expand(source: Source, refused: list[tuple[str, str]]) -> Iterator[SourceVideo]:
    match source:
        case str() | Path():
            path = Path(source)
            if path.is_dir():
                yield from _folder(path, refused)
            elif path.suffix.lower() in TABLE_SUFFIXES:
                yield from _table(path)
            elif path.suffix.lower() == ".jsonl":
                yield from _lines(path)
            else:
                yield SourceVideo(video=_absolute(path))
        case (str() | Path() as path, start, end):
            yield _row({"video": str(path), "start": start, "end": end}, Path(), f"videos: {path}")
        case Mapping():
            yield _row(source, Path(), "videos")
        case _:
            raise ValueError(
                f"videos: expected a path, (path, start, end) or a mapping, found {type(source).__name__}"
            )


def _folder(path: Path, refused: list[tuple[str, str]]) -> Iterator[SourceVideo]:
    """Yield the videos of a folder and the folders in it, by name."""
    tree = FileTree(path.resolve())
    for name in sorted(tree.files()):
        if Path(name).suffix.lower() in VIDEO_SUFFIXES:
            yield SourceVideo(video=_absolute(path / name))
    for reason, names in tree.left_out.items():
        if "UTF-8" in reason or "nowhere" in reason:
            refused += [(f"{path}/{name}", reason.replace(" and are left out", "")) for name in names]
        elif names:
            logger.warning("%s: %d %s: %s", path, len(names), reason, ", ".join(names[:3]))


def _table(path: Path) -> Iterator[SourceVideo]:
    """Yield the rows of a table with the columns video[,start,end] and any others."""
    for line, cells in read_table(path, required=("video",)):
        row = {key: cell if key == "video" else typed(cell) for key, cell in cells.items()}
        yield _row(row, path.parent, f"{path}:{line}")


def _lines(path: Path) -> Iterator[SourceVideo]:
    """Yield the clips of a manifest, or of other JSON lines with the key `video`."""
    lines = [(i, line) for i, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    if lines and set(json_object(lines[0][1], f"{path}:{lines[0][0]}")) >= _MANIFEST:
        for clip in read_manifest(path):
            columns = {"id": clip.id, "split": clip.split}
            yield SourceVideo(
                video=str(clip.video), start=clip.start, end=clip.end, clip=True, columns=columns
            )
        return
    for number, line in lines:
        where = f"{path}:{number}"
        yield _row(json_object(line, where), path.parent, where)


def _row(row: Mapping[str, Any], folder: Path, where: str) -> SourceVideo:
    """Return the video of a mapping, whose other keys are columns.

    Raises:
        ValueError: no path, a bad span, or a column that is neither a text nor a number.
    """
    path = row.get("video")
    if not isinstance(path, str | Path) or not str(path).strip():
        raise ValueError(f"{where}: video: expected a path, found {path!r}")
    start, end = (check_seconds(row.get(key), f"{where}: {key}") for key in ("start", "end"))
    check_span(start, end, where)
    columns = {}
    for key, value in row.items():
        if key in OWN_KEYS:
            continue
        if not isinstance(value, str | int | float | None):
            value = json.dumps(value, ensure_ascii=False)  # a list, for `like`
        columns[str(key)] = value
    clip = start is not None or end is not None
    return SourceVideo(video=_absolute(folder / path), start=start, end=end, clip=clip, columns=columns)


def _absolute(path: Path) -> str:
    return os.path.abspath(path)
