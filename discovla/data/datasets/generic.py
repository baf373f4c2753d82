"""A user's own clips: a table, JSON lines, or a folder of videos with text files beside them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from discovla.data.datasets.annotations import Annotations, video_key
from discovla.data.datasets.files import VIDEO_SUFFIXES, read_text
from discovla.data.datasets.tables import read_table
from discovla.data.manifest import (
    Clip,
    check_local,
    check_seconds,
    check_span,
    check_text,
    is_missing_value,
    json_object,
)
from discovla.foreign import printable

_COLUMNS = ("video", "caption", "start", "end", "split")
_KEYS = (*_COLUMNS, "captions")
_SPLITS = ("train", "val", "test")
_LIKE_SPLITS = {  # of other programs
    *("train", "training", "val", "test", "valid", "validation", "dev", "eval", "testing"),
}


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
            ValueError: an earlier row has the clip in another split, the span ends before it starts, or the
                video is an address.
        """
        check_local(video, f"{path}:{line}: video")
        for key, text in (("video", video), ("split", split or "")):
            check_text(text, f"{path}:{line}: {key}")
        if is_missing_value(split or ""):
            where = f"{path}:{line}: split"
            raise ValueError(f"{where}: expected a name, found {split!r}, which stands for no value")
        check_span(start, end, f"{path}:{line}")
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

    def annotations(self, notes: Sequence[str] = ()) -> Annotations:
        """Return the clips, with a further note if parts of one video are in several splits."""
        videos: dict[Hashable, list[Clip]] = {}
        for clip in self.clips.values():
            videos.setdefault(video_key(clip.video), []).append(clip)
        shared = [clips[0].video.name for clips in videos.values() if len({clip.split for clip in clips}) > 1]
        notes = [*notes, *([_note("videos have parts in several splits", shared)] if shared else [])]
        almost = _almost(dict.fromkeys(clip.split for clip in self.clips.values()))
        notes += [_note("splits are named almost like 'train', 'val' or 'test'", almost)] if almost else []
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
    notes: list[str] = []
    for line, row in read_table(path, required=_COLUMNS[:2], allowed=_COLUMNS, notes=notes):
        start, end = (_cell_seconds(row.get(key, ""), f"{path}:{line}: {key}") for key in ("start", "end"))
        _check_caption(row["caption"], f"{path}:{line}")
        clips.add(row["video"], (row["caption"],), row.get("split"), start, end, path, line)
    if not clips.clips:
        raise ValueError(f"{path}: expected at least one row below the header, found none")
    return clips.annotations(notes)


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
            start, end = (check_seconds(row.get(key), f"{where}: {key}") for key in ("start", "end"))
            clips.add(row["video"], _captions(row, where), row.get("split"), start, end, path, number)
    if not clips.clips:
        raise ValueError(f"{path}: expected one clip a line, found none")
    return clips.annotations()


def folder_clips(root: str | Path) -> Annotations:
    """Read a folder of videos, each with a text file of the same name, one caption a line.

    The captions of `x.mp4` are in `x.mp4.txt` or `x.txt`.  Clips in a subfolder `train`, `val` or `test` have
    that split, all others `train`.  Linked folders are followed, each once.  Hidden files and folders, and
    names that are not UTF-8, are left out and noted.

    Raises:
        ValueError: the folder is missing or cannot be read, a text is empty, or no video has a text.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of videos, found none")
    tree = FileTree(root)
    files = sorted(root / name for name in tree.files())
    texts = {_key(path.relative_to(root).as_posix()): path for path in files if _is_text(path)}
    clips, without_text, used, others, shared = [], [], set(), [], []
    for video in files:
        name = video.relative_to(root).as_posix()
        if video.suffix.lower() not in VIDEO_SUFFIXES:
            others += [] if _is_text(video) else [name]
            continue
        text = texts.get(_key(f"{name}.txt")) or texts.get(_key(f"{name.removesuffix(video.suffix)}.txt"))
        if text is None:
            without_text.append(name)
            continue
        shared += [name] if text in used else []
        used.add(text)
        numbered = enumerate(read_text(text).split("\n"), start=1)
        captions = {number: line.strip() for number, line in numbered if line.strip()}
        if not captions:
            raise ValueError(f"{text}: expected a caption a line, found none")
        for number, caption in captions.items():
            _check_caption(caption, f"{text}:{number}")
        split = _split_of(name)
        clips.append(Clip(id=name, video=video, captions=tuple(captions.values()), split=split))
    reasons = {
        "texts have no video beside them": [
            path.relative_to(root).as_posix() for path in texts.values() if path not in used
        ],
        "videos share the text of another video": shared,
        "files are neither videos nor texts": others,
        **tree.left_out,
        "folders are named like a split, but their clips are in 'train'": _almost_splits(clips),
    }
    notes = [_note(text, names) for text, names in reasons.items() if names]
    if not clips:
        also = "".join(f"; {note}" for note in notes)
        raise ValueError(
            f"{root}: expected a text beside a video, found {len(without_text)} videos without one{also}"
        )
    if without_text:
        notes.insert(0, _note("videos have no text beside them and are left out", without_text))
    return Annotations(clips=clips, notes=notes)


def _key(name: str) -> str:
    """Return a name by which a text is found, whatever its case and the way that accents are stored."""
    return unicodedata.normalize("NFC", name).lower()


def _is_text(path: Path) -> bool:
    return path.suffix.lower() == ".txt"


class FileTree:
    """The files of a folder, with those that are left out and why.

    Folders come before links to folders, so that what lies in one is read by the folder's own name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: dict[str, list[str]] = {
            reason: []
            for reason in (
                "hidden files and folders are left out",
                "names are not UTF-8 and are left out; rename them",
                "links lead nowhere and are left out",
                "links lead to a folder that was read already, and are left out",
                "pipes, sockets or devices are left out",
            )
        }

    def files(self) -> Iterator[str]:
        """Yield the names of files, relative to the root.

        Raises:
            ValueError: a folder cannot be read.
        """
        hidden, not_text, broken, again, special = self.left_out.values()
        seen = set()  # device and number of each folder
        folders, links = [self.root], []
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            status = folder.stat()
            name = folder.relative_to(self.root).as_posix()
            if (status.st_dev, status.st_ino) in seen:
                again.append(name)
                continue
            seen.add((status.st_dev, status.st_ino))
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                raise ValueError(f"{folder}: expected a folder that can be read: {error.strerror}") from error
            below: list[Path] = []
            for entry in entries:
                path = Path(entry.path)
                name = path.relative_to(self.root).as_posix()
                if entry.name.startswith("."):
                    hidden.append(printable(name))
                elif name != printable(name):
                    not_text.append(printable(name))
                elif path.is_dir():
                    (links if entry.is_symlink() else below).append(path)
                elif path.is_file():
                    yield name
                else:
                    (special if path.exists() else broken).append(name)
            folders += reversed(below)


def _split_of(name: str) -> str:
    """Return the split of a clip by the folder in which it lies."""
    folder = name.split("/")[0]
    return folder if "/" in name and folder in _SPLITS else "train"


def _almost_splits(clips: Sequence[Clip]) -> list[str]:
    """Return the folders of clips whose names are almost those of a split other than train."""
    folders = dict.fromkeys(
        clip.id.split("/")[0] for clip in clips if "/" in clip.id and clip.split == "train"
    )
    return [name for name in _almost(folders) if name.lower() not in ("train", "training")]


def _almost(names: Iterable[str]) -> list[str]:
    """Return the names that other programs give to splits, or that differ from ours in case only."""
    return [name for name in names if name not in _SPLITS and name.lower() in _LIKE_SPLITS]


def _check_caption(text: str, where: str) -> None:
    """Refuse a caption that is no caption."""
    check_text(text, f"{where}: caption")
    if not any(letter.isprintable() and not letter.isspace() for letter in text):
        raise ValueError(
            f"{where}: caption: expected a text, found invisible characters only: {text!r}"[:200]
        )
    if is_missing_value(text):
        raise ValueError(
            f"{where}: caption: expected a text, found {text.strip()!r}, which stands for no value"
        )


def _note(text: str, names: list[str]) -> str:
    """Return a line for the report: how many files it concerns, and the first of them."""
    return f"{len(names)} {text}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _cell_seconds(text: str, where: str) -> float | None:
    """Parse a time in a cell of a table; an empty cell is no time."""
    try:
        if text and not re.fullmatch(r"[-+.\deE]+", text, re.ASCII):  # float() takes "1_0" and other digits
            raise ValueError
        return check_seconds(float(text) if text else None, where)
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
        _check_caption(text, where)
    return tuple(texts)
