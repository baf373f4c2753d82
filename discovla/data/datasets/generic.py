"""A user's own clips: a table, JSON lines, or a folder of videos with text files beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from discovla.data.datasets.annotations import Annotations
from discovla.data.datasets.files import VIDEO_SUFFIXES, read_table, read_text
from discovla.data.manifest import Clip, json_object

_COLUMNS = ("video", "caption", "start", "end", "split")
_KEYS = (*_COLUMNS, "captions")
_SPLITS = ("train", "val", "test")


class _Clips:
    """Join rows of the same video, start and end into one clip.

    Args:
        folder: videos are relative to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.clips: dict[tuple[str, float | None, float | None], Clip] = {}
        self._first_lines: dict[str, int] = {}  # by clip id

    def add(
        self,
        video: str,
        captions: tuple[str, ...],
        split: str | None,
        start: float | None,
        end: float | None,
        path: Path,
        line: int,
    ) -> None:
        """Add the captions of one row.

        Raises:
            ValueError: an earlier row has the clip in another split.
        """
        span = "" if start is end is None else f"@{start or 0:g}-{'' if end is None else format(end, 'g')}"
        clip = Clip(
            id=video + span,
            video=self.folder / video,
            captions=captions,
            split=split or "train",
            start=start,
            end=end,
        )
        earlier = self.clips.get((video, start, end))
        if earlier is None:
            self._first_lines[clip.id] = line
        elif earlier.split != clip.split:
            raise ValueError(
                f"{path}:{line}: {clip.id} is in split {clip.split!r}, at line {self._first_lines[clip.id]}"
                f" in {earlier.split!r}"
            )
        else:
            clip = replace(earlier, captions=earlier.captions + captions)
        self.clips[video, start, end] = clip

    def annotations(self) -> Annotations:
        """Return the clips, with a note if parts of one video are in several splits."""
        splits: dict[Path, set[str]] = {}
        for clip in self.clips.values():
            splits.setdefault(clip.video, set()).add(clip.split)
        shared = [path.name for path, names in splits.items() if len(names) > 1]
        notes = [_note("videos have parts in several splits", shared)] if shared else []
        return Annotations(clips=list(self.clips.values()), notes=notes)


def csv_clips(path: str | Path) -> Annotations:
    """Read a table with the columns `video,caption[,start,end,split]`.

    Rows of one video, start and end are captions of one clip.  The default split is `train`.  Videos are
    relative to the table.

    Raises:
        ValueError: a bad column or cell, or a clip in two splits; the message names file and line.
    """
    path = Path(path)
    clips = _Clips(path.parent)
    for line, row in read_table(path, required=_COLUMNS[:2], allowed=_COLUMNS):
        start, end = (_cell_seconds(row.get(key, ""), f"{path}:{line}: {key}") for key in ("start", "end"))
        clips.add(row["video"], (row["caption"],), row.get("split"), start, end, path, line)
    if not clips.clips:
        raise ValueError(f"{path}: expected at least one row below the header, found none")
    return clips.annotations()


def jsonl_clips(path: str | Path) -> Annotations:
    """Read JSON lines with the keys `video`, `caption` or `captions`, and optionally start, end and split.

    Lines of one video, start and end are captions of one clip.  The default split is `train`.  Videos are
    relative to the file.

    Raises:
        ValueError: a bad line, or a clip in two splits; the message names file and line.
    """
    path = Path(path)
    clips = _Clips(path.parent)
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            row = _row(line, where)
            start, end = (_seconds(row.get(key), f"{where}: {key}") for key in ("start", "end"))
            clips.add(row["video"], _captions(row, where), row.get("split"), start, end, path, number)
    if not clips.clips:
        raise ValueError(f"{path}: expected one clip a line, found none")
    return clips.annotations()


def folder_clips(root: str | Path) -> Annotations:
    """Read a folder of videos, each with a text file of the same name, one caption a line.

    The captions of `x.mp4` are in `x.mp4.txt` or `x.txt`.  Clips in a subfolder `train`, `val` or `test` have
    that split, all others `train`.

    Raises:
        ValueError: the folder is missing, a text file is empty, or no video has a text file.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of videos, found none")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    clips, without_text, used = [], [], set()
    for video in (path for path in files if path.suffix.lower() in VIDEO_SUFFIXES):
        name = video.relative_to(root).as_posix()
        texts = (video.with_name(video.name + ".txt"), video.with_suffix(".txt"))
        text = next((path for path in texts if path.is_file()), None)
        if text is None:
            without_text.append(name)
            continue
        used.add(text)
        captions = tuple(line.strip() for line in read_text(text).split("\n") if line.strip())
        if not captions:
            raise ValueError(f"{text}: expected a caption a line, found none")
        folder = name.split("/")[0]
        split = folder if "/" in name and folder in _SPLITS else "train"
        clips.append(Clip(id=name, video=video, captions=captions, split=split))
    if not clips:
        raise ValueError(
            f"{root}: expected a text beside a video, found {len(without_text)} videos without one"
        )
    unused = [p.relative_to(root).as_posix() for p in files if p.suffix == ".txt" and p not in used]
    notes = []
    if without_text:
        notes.append(_note("videos have no text beside them and are left out", without_text))
    if unused:
        notes.append(_note("texts have no video beside them", unused))
    return Annotations(clips=clips, notes=notes)


def _note(text: str, names: list[str]) -> str:
    """Return a line for the report: how many files it concerns, and the first of them."""
    return f"{len(names)} {text}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _seconds(value: Any, where: str) -> float | None:
    """Check a time; None is no time."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{where}: expected seconds not below 0, found {value!r}")
    return float(value)


def _cell_seconds(text: str, where: str) -> float | None:
    """Parse a time in a cell of a table; an empty cell is no time."""
    try:
        return _seconds(float(text) if text else None, where)
    except ValueError:
        raise ValueError(f"{where}: expected seconds not below 0, found {text!r}") from None


def _row(line: str, where: str) -> dict[str, Any]:
    """Parse one JSON line; refuse unknown keys, and a missing or empty video or split."""
    row = json_object(line, where)
    unknown = [key for key in row if key not in _KEYS]
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; expected only {', '.join(_KEYS)}")
    for key in ("video", "split"):
        if key in row and (not isinstance(row[key], str) or not row[key].strip()):
            raise ValueError(f"{where}: {key}: expected a text that is not empty, found {row[key]!r}")
    if "video" not in row:
        raise ValueError(f"{where}: missing video; found {', '.join(row) or 'no key'}")
    return row


def _captions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the captions of a line, from `caption` or `captions`."""
    if ("caption" in row) == ("captions" in row):
        raise ValueError(f"{where}: expected either caption or captions, found {', '.join(row)}")
    texts = [row["caption"]] if "caption" in row else row["captions"]
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{where}: captions: expected a list of texts, found {texts!r}"[:300])
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: caption: expected a text that is not empty, found {text!r}"[:300])
    return tuple(texts)
