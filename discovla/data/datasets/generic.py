"""A user's own clips: a table, JSON lines, or a folder of videos with texts beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from discovla.data.datasets.annotated import VIDEO_SUFFIXES, Annotated
from discovla.data.datasets.reading import read_text, rows
from discovla.data.manifest import Clip, json_object

_COLUMNS = ("video", "caption", "start", "end", "split")
_KEYS = (*_COLUMNS, "captions")
_SPLITS = ("train", "val", "test")
_Known = dict[tuple[str, float | None, float | None], tuple[str, Clip]]  # with where it was first


def csv_clips(path: str | Path) -> Annotated:
    """Clips of a table with the columns `video,caption[,start,end,split]`.

    Rows of one video, start and end are captions of one clip.  Without a split everything is `train`.
    Videos are relative to the table.

    Raises:
        ValueError: a column or cell is not as expected, or a clip stands in two splits; named by file and
        line.
    """
    path = Path(path)
    folder = path.parent.resolve()
    known: _Known = {}
    for line, row in rows(path, required=_COLUMNS[:2], allowed=_COLUMNS):
        where = f"{path}:{line}"
        start, end = (_seconds(row.get(key, ""), f"{where}: {key}") for key in ("start", "end"))
        clip = _clip(row["video"], (row["caption"],), row.get("split") or "train", (start, end), folder)
        _add(known, clip, row["video"], where)
    if not known:
        raise ValueError(f"{path}: expected at least one row below the header, found none")
    return _annotated(known)


def jsonl_clips(path: str | Path) -> Annotated:
    """Clips of JSON lines with the keys `video`, `caption` or `captions`, and maybe start, end and split.

    Lines of one video, start and end are captions of one clip.  Without a split everything is `train`.
    Videos are relative to the file.

    Raises:
        ValueError: a line is not as expected, or a clip stands in two splits; named by file and line.
    """
    path = Path(path)
    folder = path.parent.resolve()
    known: _Known = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            row = _object(line, where)
            start, end = (_number(row.get(key), f"{where}: {key}") for key in ("start", "end"))
            clip = _clip(row["video"], _texts(row, where), row.get("split") or "train", (start, end), folder)
            _add(known, clip, row["video"], where)
    if not known:
        raise ValueError(f"{path}: expected one clip a line, found none")
    return _annotated(known)


def folder_clips(root: str | Path) -> Annotated:
    """Clips of a folder: each video has beside it a text of the same name, each line of it a caption.

    `x.mp4` has `x.txt`, or `x.mp4.txt` where several videos are called x.  Clips below a folder `train`,
    `val` or `test` of the root are of that split, all others of `train`.

    Raises:
        ValueError: there is no such folder, a text beside a video is empty, or no video has a text.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of videos, found none")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    clips, bare, used = [], [], set()
    for video in videos:
        sidecar = next((p for p in _sidecars(video) if p.is_file()), None)
        name = video.relative_to(root).as_posix()
        if sidecar is None:
            bare.append(name)
            continue
        used.add(sidecar)
        captions = tuple(line.strip() for line in read_text(sidecar).split("\n") if line.strip())
        if not captions:
            raise ValueError(f"{sidecar}: expected a caption a line, found none")
        split = name.split("/")[0] if "/" in name and name.split("/")[0] in _SPLITS else "train"
        clips.append(Clip(id=name, video=video, captions=captions, split=split))
    if not clips:
        raise ValueError(f"{root}: expected a text beside a video, found {len(videos)} videos without one")
    lone = [p.relative_to(root).as_posix() for p in files if p.suffix == ".txt" and p not in used]
    notes = [_note("videos have no text beside them and are left out", bare)] if bare else []
    notes += [_note("texts have no video beside them", lone)] if lone else []
    return Annotated(clips=clips, notes=notes)


def _sidecars(video: Path) -> tuple[Path, Path]:
    """Where the text of a video may be."""
    return video.with_name(video.name + ".txt"), video.with_suffix(".txt")


def _note(words: str, names: list[str]) -> str:
    """What befell some files, with the first of them."""
    return f"{len(names)} {words}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _annotated(known: _Known) -> Annotated:
    """Clips, and videos of which several splits have a part."""
    clips = [clip for _, clip in known.values()]
    splits: dict[Path, set[str]] = {}
    for clip in clips:
        splits.setdefault(clip.video, set()).add(clip.split)
    shared = [path.name for path, names in splits.items() if len(names) > 1]
    return Annotated(
        clips=clips, notes=[_note("videos have parts in several splits", shared)] if shared else []
    )


def _add(known: _Known, clip: Clip, video: str, where: str) -> None:
    """Join a row to the clip it belongs to."""
    key = (video, clip.start, clip.end)
    first, old = known.get(key, (where, replace(clip, captions=())))
    if old.split != clip.split:
        line = first.rpartition(":")[2]
        raise ValueError(f"{where}: {clip.id} is in split {clip.split!r}, at line {line} in {old.split!r}")
    known[key] = (first, replace(old, captions=old.captions + clip.captions))


def _clip(
    video: str,
    captions: tuple[str, ...],
    split: str,
    span: tuple[float | None, float | None],
    folder: Path,
) -> Clip:
    """One row as a clip, whose id says its span."""
    start, end = span
    said = "" if span == (None, None) else f"@{start or 0:g}-{'' if end is None else format(end, 'g')}"
    return Clip(id=video + said, video=folder / video, captions=captions, split=split, start=start, end=end)


def _seconds(text: str, where: str) -> float | None:
    """A time in a cell, None for an empty one."""
    try:
        return _number(float(text) if text else None, where)
    except ValueError:
        raise ValueError(f"{where}: expected seconds not below 0, found {text!r}") from None


def _number(value: Any, where: str) -> float | None:
    """A time, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{where}: expected seconds not below 0, found {value!r}")
    return float(value)


def _object(line: str, where: str) -> dict[str, Any]:
    """One line with a video, what is said of it, and nothing unknown."""
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


def _texts(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The captions of a line, under one of the two keys."""
    if ("caption" in row) == ("captions" in row):
        raise ValueError(f"{where}: expected either caption or captions, found {', '.join(row)}")
    texts = [row["caption"]] if "caption" in row else row["captions"]
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{where}: captions: expected a list of texts, found {texts!r}"[:300])
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: caption: expected a text that is not empty, found {text!r}"[:300])
    return tuple(texts)
