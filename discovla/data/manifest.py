"""Manifests: JSONL lists of clips, the form in which every dataset is read."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovla.files import write_file
from discovla.foreign import parse_json, printable

logger = logging.getLogger(__name__)

_REQUIRED = ("id", "video", "captions", "split")
_OPTIONAL = ("start", "end", "frame_captions", "caption_order", "reversed_captions")
_MISSING = {  # written for no value, most of them by pandas and spreadsheets
    *("nan", "NaN", "NAN", "-nan", "-NaN", "None", "none", "NONE", "null", "Null", "NULL", "NA", "<NA>"),
    *("N/A", "n/a", "#N/A", "#NA", "NaT", "undefined", "#NAME?", "#REF!", "#VALUE!", "#DIV/0!", "#NULL!"),
    "#NUM!",
}
_NAMED = 5  # faults named in one message; a wrong folder makes a fault of every clip

FrameCaptions = tuple[tuple[str, ...] | None, ...]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip and its captions.

    video: absolute path.
    start, end: span in seconds; None for the start or end of the file.
    frame_captions: for each caption one caption per sampled frame, or None.
    caption_order: position of each caption among all training samples of the dataset; None if the dataset
        lists its samples clip by clip.
    reversed_captions: captions that are true of the clip played backwards, or None.
    """

    id: str
    video: Path
    captions: tuple[str, ...]
    split: str
    start: float | None = None
    end: float | None = None
    frame_captions: FrameCaptions | None = None
    caption_order: tuple[int, ...] | None = None
    reversed_captions: tuple[str, ...] | None = None


def read_manifest(path: str | Path, *, split: str | None = None) -> list[Clip]:
    """Read the clips of a manifest, in its order.

    Args:
        path: JSONL file; video paths in it are relative to its folder.
        split: return only the clips of this split; None returns all.

    Raises:
        ValueError: a line that is not a clip, named by file and line; a repeated id; a split without clips.
    """
    path = Path(path)
    clips = []
    seen: dict[str, int] = {}
    missing: list[int] = []  # lines with a caption that stands for no value
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        clip = _clip(_object(line, where), where, path.parent.resolve())
        if clip.id in seen:
            raise ValueError(f"{where}: expected a new id, found {clip.id!r}, the id of line {seen[clip.id]}")
        seen[clip.id] = number
        clips.append(clip)
        if any(map(is_missing_value, clip.captions)):
            missing.append(number)
    if missing:
        logger.warning(
            "%s: %d clips have a caption such as 'nan' or 'None', which stands for no value: line %s%s",
            *(path, len(missing), ", ".join(map(str, missing[:_NAMED])), ", ..." * (len(missing) > _NAMED)),
        )
    if not clips:
        raise ValueError(f"{path}: expected one clip a line, found none")
    return clips if split is None else split_clips(clips, split, str(path))


def split_clips(clips: Sequence[Clip], split: str, source: str) -> list[Clip]:
    """Return the clips of a split.

    Args:
        source: of the clips, for the message.

    Raises:
        ValueError: there are none.
    """
    selected = [clip for clip in clips if clip.split == split]
    if not selected:
        counts = ", ".join(f"{name} {n}" for name, n in Counter(clip.split for clip in clips).items())
        hint = f"; `discovla prepare --{split} N` holds some out" if split in ("val", "test") else ""
        raise ValueError(f"{source}: expected clips of the split {split!r}, found {counts}{hint}")
    return selected


def write_manifest(path: str | Path, clips: Sequence[Clip]) -> None:
    """Write a manifest atomically; paths of videos below its folder are written relative to it.

    Raises:
        ValueError: two clips share an id, or a clip could not be read back.
        OSError: the file cannot be written.
    """
    path = Path(path)
    repeated = [name for name, n in Counter(clip.id for clip in clips).items() if n > 1]
    if repeated:
        raise ValueError(f"{path}: expected different ids, found repeated: {', '.join(repeated[:_NAMED])}")
    folder = path.parent.resolve()
    lines = []
    for number, clip in enumerate(clips, start=1):
        line = json.dumps(_fields(clip, folder), ensure_ascii=False)
        where = f"{path}:{number}"
        _clip(_object(line, where), where, folder)  # refuses clips that could not be read back
        lines.append(line + "\n")
    write_file(path, "".join(lines))


def check_clips(clips: Sequence[Clip], *, frames: int | None = None, files: bool = True) -> None:
    """Refuse clips that cannot be used, before training.

    Videos must be files that are not empty, captions must not be empty, ids must differ, and frame captions
    must be one per frame.

    Args:
        frames: frames sampled per clip; None leaves frame captions unchecked.
        files: check the video files; shards need none.

    Raises:
        ValueError: the first faults, each with the id of its clip, what was expected and what was found.
    """
    if not clips:
        raise ValueError("expected at least one clip, found none")
    ids = Counter(clip.id for clip in clips)
    faults = [f"expected different ids, found {name!r} on {n} clips" for name, n in ids.items() if n > 1]
    for clip in clips:
        faults += [f"clip {clip.id!r}: {fault}" for fault in _faults(clip, frames, files)]
    if faults:
        more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        number = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        raise ValueError(f"{number} in {len(clips)} clips: {'; '.join(faults[:_NAMED])}{more}")


def _faults(clip: Clip, frames: int | None, files: bool) -> list[str]:
    """Return the faults of one clip."""
    faults = _file_faults(clip) if files else []
    if not clip.captions:
        faults.append("expected at least one caption, found none")
    faults += [f"caption {i} is empty" for i, caption in enumerate(clip.captions) if not caption.strip()]
    if frames is not None and clip.frame_captions is not None:
        faults += _frame_caption_faults(clip.frame_captions, frames)
    return faults


def _file_faults(clip: Clip) -> list[str]:
    """Return the fault of a video file that is missing or empty."""
    try:
        if not clip.video.is_file():
            return [f"expected a video file, found {_kind(clip.video)}: {clip.video}"]
        if clip.video.stat().st_size == 0:
            return [f"expected a video file, found an empty one: {clip.video}"]
    except OSError as error:
        return [f"expected a video file: {error}"]
    return []


def _frame_caption_faults(lists: FrameCaptions, frames: int) -> list[str]:
    """Return the faults of frame captions that are not one per frame, or empty."""
    faults = []
    for i, texts in enumerate(lists):
        if texts is None:
            continue
        if len(texts) != frames:
            faults.append(f"frame captions of caption {i}: expected {frames}, found {len(texts)}")
        elif not all(text.strip() for text in texts):
            faults.append(f"frame captions of caption {i}: one is empty")
    return faults


def _kind(path: Path) -> str:
    """Return what a path that is not a file is."""
    return "a folder" if path.is_dir() else "something else" if path.exists() else "nothing"


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file."""
    try:
        # Not splitlines(), which also splits at U+2028 and the like; captions may contain them.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, found another byte at {error.start}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected a manifest, found no file {path.absolute()}") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a manifest, {error.strerror}") from error


def is_missing_value(caption: str) -> bool:
    """Return True if a caption is what programs write where a value is missing."""
    return caption.strip() in _MISSING


def check_local(video: str, where: str) -> None:
    """Refuse the address of a video.

    Raises:
        ValueError: what was found, after `where`.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", video):
        raise ValueError(f"{where}: expected a file, found the address {video}; download it")


def check_text(text: str, where: str) -> None:
    """Refuse a text that cannot be written as UTF-8 or holds a null character.

    Raises:
        ValueError: the text is not one.
    """
    if printable(text) != text:
        raise ValueError(f"{where}: expected UTF-8, found {printable(text)[-60:]}")
    if "\0" in text:
        raise ValueError(f"{where}: expected a text, found a null character in {text[:20]!r}")


def check_seconds(value: Any, where: str) -> float | None:
    """Return a time in seconds; None is no time.

    Raises:
        ValueError: it is no number, not finite or below 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{where}: expected seconds not below 0, found {_short(value)}")
    return float(value)


def check_span(start: float | None, end: float | None, where: str) -> None:
    """Refuse a span that does not end after it starts.

    Raises:
        ValueError: it does not.
    """
    if end is not None and end <= (start or 0):
        raise ValueError(
            f"{where}: expected a start before the end, found start {start or 0:g} and end {end:g}"
        )


def json_object(line: str, where: str) -> dict[str, Any]:
    """Parse one line as a JSON object.

    Args:
        where: file and line, for the error.

    Raises:
        ValueError: the line is not a JSON object.
    """
    try:
        row = parse_json(line, unique=True)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; each line has an object of its own"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _object(line: str, where: str) -> dict[str, Any]:
    """Parse one line as a JSON object with the keys of a clip and no others."""
    row = json_object(line, where)
    missing = [key for key in _REQUIRED if key not in row]
    unknown = [key for key in row if key not in _REQUIRED + _OPTIONAL]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}; found {', '.join(row) or 'no key'}")
    if unknown:
        expected = ", ".join(_REQUIRED + _OPTIONAL)
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; expected only {expected}")
    return row


def _clip(row: dict[str, Any], where: str, folder: Path) -> Clip:
    """Return the clip of one manifest line."""
    for key in ("id", "video", "split"):
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f"{where}: {key}: expected a text that is not empty, found {row[key]!r}")
        check_text(row[key], f"{where}: {key}")
    check_local(row["video"], f"{where}: video")
    captions = _texts(row["captions"], f"{where}: captions")
    backwards = row.get("reversed_captions")
    start = check_seconds(row.get("start"), f"{where}: start")
    end = check_seconds(row.get("end"), f"{where}: end")
    check_span(start, end, where)
    return Clip(
        id=row["id"],
        video=Path(os.path.normpath(folder / row["video"])),
        captions=captions,
        split=row["split"],
        start=start,
        end=end,
        frame_captions=_frame_captions(row.get("frame_captions"), len(captions), f"{where}: frame_captions"),
        caption_order=_order(row.get("caption_order"), len(captions), f"{where}: caption_order"),
        reversed_captions=None if backwards is None else _texts(backwards, f"{where}: reversed_captions"),
    )


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """Return a list of texts that are not empty."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list of texts, found {_short(value)}")
    for i, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}[{i}]: expected a text that is not empty, found {_short(text)}")
        check_text(text, f"{where}[{i}]")
    return tuple(value)


def _frame_captions(value: Any, captions: int, where: str) -> FrameCaptions | None:
    """Return the frame captions of each caption, or None."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != captions:
        actual = f"{len(value)} lists" if isinstance(value, list) else _short(value)
        raise ValueError(f"{where}: expected a list or null for each of {captions} captions, found {actual}")
    return tuple(None if texts is None else _texts(texts, f"{where}[{i}]") for i, texts in enumerate(value))


def _order(value: Any, captions: int, where: str) -> tuple[int, ...] | None:
    """Return the position of each caption among all samples, or None."""
    if value is None:
        return None
    integers = isinstance(value, list) and all(type(i) is int for i in value)
    if not integers or len(value) != captions:
        raise ValueError(f"{where}: expected {captions} whole numbers, found {_short(value)}")
    return tuple(value)


def _short(value: Any) -> str:
    """Return the repr of a value, cut to fit a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(clip: Clip, folder: Path) -> dict[str, Any]:
    """Return the JSON object of a clip, without optional keys that are None."""
    video = clip.video if clip.video.is_absolute() else Path.cwd() / clip.video
    video = Path(os.path.normpath(video))
    written = video.relative_to(folder) if video.is_relative_to(folder) else video
    row: dict[str, Any] = {
        "id": clip.id,
        "video": written.as_posix(),
        "captions": list(clip.captions),
        "split": clip.split,
    }
    row |= {key: value for key in _OPTIONAL if (value := getattr(clip, key)) is not None}
    return row
