"""Annotation files of datasets, as they are found, turned into clips."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from discovla.data.captions import frame_captions_of, read_frame_captions, read_json
from discovla.data.manifest import Clip, write_manifest

logger = logging.getLogger(__name__)

Protocol = Literal["1k-A-9k", "1k-A-7k", "full"]

_TRAIN_FILE: dict[Protocol, str] = {
    "1k-A-9k": "MSRVTT_train.9k.csv",
    "1k-A-7k": "MSRVTT_train.7k.csv",
}
_FULL_FILES = {
    "train": "MSRVTT_train.full.csv",
    "val": "MSRVTT_val.full.csv",
    "test": "MSRVTT_test.full.csv",
}
_FULL_SPLITS = {"train": "train", "validate": "val", "test": "test"}  # as MSRVTT_data.json names them
_USER_COLUMNS = ("video", "caption", "start", "end", "split")


def msrvtt(
    root: str | Path, *, protocol: Protocol, videos: str | Path, frame_captions: str | Path | None = None
) -> list[Clip]:
    """MSR-VTT by one of its protocols.

    1k-A: 1,000 test pairs in the order of MSRVTT_JSFUSION_test.csv, training on 9k or 7k clips with all
    their captions in the order of MSRVTT_data.json.  full: 6,513 / 497 / 2,990 clips, every caption a query.

    Args:
        root: folder of the annotation files.
        videos: folder of `<video id>.mp4`.
        frame_captions: JSON of still captions per sampled frame of the training clips.

    Returns: clips of all splits; training clips in the order in which their first caption stands in the file.

    Raises:
        ValueError: a file is missing or not as expected, or a video is in the training and in the test split.
    """
    root, videos = Path(root), Path(videos).resolve()
    lists = read_frame_captions(frame_captions) if frame_captions is not None else None
    data = root / "MSRVTT_data.json"
    annotations = read_json(data)
    if protocol == "full":
        splits = _full_splits(root, annotations, data)
        return _captioned(_sentences(annotations, data), splits, videos, lists)
    if protocol not in _TRAIN_FILE:
        raise ValueError(f"protocol: expected 1k-A-9k, 1k-A-7k or full, got {protocol!r}")
    splits = dict.fromkeys(_ids(root / _TRAIN_FILE[protocol]), "train")
    return _captioned(_sentences(annotations, data), splits, videos, lists) + _jsfusion(root, splits, videos)


def csv_clips(path: str | Path) -> list[Clip]:
    """Clips of a user's table with the columns `video,caption[,start,end,split]`.

    Rows of one video, start and end are captions of one clip.  Without a split everything is `train`.
    Videos are relative to the table.

    Raises:
        ValueError: a column or cell is not as expected, or a clip stands in two splits; named by file and
        line.
    """
    path = Path(path)
    folder = path.parent.resolve()
    clips: dict[tuple[str, float | None, float | None], tuple[int, Clip]] = {}
    for line, row in _rows(path, required=_USER_COLUMNS[:2], allowed=_USER_COLUMNS):
        where = f"{path}:{line}"
        clip = _user_clip(row, where, folder)
        key = (row["video"], clip.start, clip.end)
        first, known = clips.get(key, (line, replace(clip, captions=())))
        if known.split != clip.split:
            raise ValueError(
                f"{where}: {clip.id} is in split {clip.split!r}, at line {first} in {known.split!r}"
            )
        clips[key] = (first, replace(known, captions=known.captions + clip.captions))
    if not clips:
        raise ValueError(f"{path}: expected at least one row below the header, found none")
    return [clip for _, clip in clips.values()]


def hold_out(clips: Sequence[Clip], number: int) -> list[Clip]:
    """Move `number` training clips, evenly spaced, to the split `val`, each with its first caption.

    For datasets whose protocol has no validation clips of its own: what is selected on them never sees the
    test.

    Raises:
        ValueError: there are not more training clips than that, or there is a `val` already.
    """
    train = [i for i, clip in enumerate(clips) if clip.split == "train"]
    if not 0 <= number < len(train):
        raise ValueError(f"val: expected fewer than the {len(train)} training clips, got {number}")
    if number and any(clip.split == "val" for clip in clips):
        raise ValueError("val: the dataset has a split 'val' of its own; expected 0 clips to hold out")
    held = {train[i * len(train) // number] for i in range(number)}
    return [
        replace(first_captions([clip])[0], split="val") if i in held else clip for i, clip in enumerate(clips)
    ]


def first_captions(clips: Iterable[Clip]) -> list[Clip]:
    """The same clips with their first caption alone and no frame captions."""
    return [
        replace(
            clip,
            captions=clip.captions[:1],
            frame_captions=None,
            caption_order=None if clip.caption_order is None else clip.caption_order[:1],
        )
        for clip in clips
    ]


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What a manifest holds of one split.

    without_frame_captions: captions left without, counted once per video and text, or None where no frame
    captions were given.  missing_videos: clips whose file is not there.
    """

    clips: int
    captions: int
    without_frame_captions: int | None
    missing_videos: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `prepare` wrote."""

    manifest: Path
    splits: dict[str, SplitReport]

    def lines(self) -> list[str]:
        """The report as text, a line per split."""
        lines = [f"wrote {self.manifest}"]
        for name, split in self.splits.items():
            line = f"{name}: {split.clips} clips, {split.captions} captions"
            if split.without_frame_captions:
                line += f", {split.without_frame_captions} without frame captions"
            if split.missing_videos:
                shown = ", ".join(split.missing_videos[:3]) + (
                    ", ..." if len(split.missing_videos) > 3 else ""
                )
                line += f", {len(split.missing_videos)} videos missing ({shown})"
            lines.append(line)
        return lines


def prepare(clips: Sequence[Clip], out: str | Path) -> Report:
    """Write the manifest of a dataset and say what it holds.

    Args:
        clips: from `msrvtt` or `csv_clips`.
        out: the manifest to write.
    """
    write_manifest(out, clips)
    return Report(manifest=Path(out), splits=report(clips))


def report(clips: Sequence[Clip]) -> dict[str, SplitReport]:
    """Clips, captions, captions without frame captions and missing files, by split."""
    splits = {}
    for name in dict.fromkeys(clip.split for clip in clips):
        chosen = [clip for clip in clips if clip.split == name]
        bare = None
        if any(clip.frame_captions is not None for clip in chosen):
            bare = sum(len(_bare(clip)) for clip in chosen)
        splits[name] = SplitReport(
            clips=len(chosen),
            captions=sum(len(clip.captions) for clip in chosen),
            without_frame_captions=bare,
            missing_videos=tuple(str(clip.video) for clip in chosen if not clip.video.is_file()),
        )
    return splits


def _bare(clip: Clip) -> set[str]:
    """The captions of a clip that have no frame captions."""
    lists = clip.frame_captions or (None,) * len(clip.captions)
    return {caption for caption, texts in zip(clip.captions, lists, strict=True) if texts is None}


def _captioned(
    sentences: Iterable[tuple[str, str]],
    splits: Mapping[str, str],
    videos: Path,
    lists: Mapping[str, tuple[str, ...]] | None,
) -> list[Clip]:
    """Clips of the videos in `splits` with every sentence said of them, in the order of the sentences."""
    captions: dict[str, list[str]] = {}
    order: dict[str, list[int]] = {}
    places = count()
    for video_id, caption in sentences:
        if video_id in splits:
            captions.setdefault(video_id, []).append(caption)
            order.setdefault(video_id, []).append(next(places))
    silent = [video_id for video_id in splits if video_id not in captions]
    if len(silent) == len(splits):
        raise ValueError(f"MSRVTT_data.json: no sentence for any of the {len(splits)} videos of the splits")
    if silent:
        shown = ", ".join(silent[:5])
        logger.warning(
            "%d of %d videos have no sentence and are left out: %s", len(silent), len(splits), shown
        )
    return [
        Clip(
            id=video_id,
            video=videos / f"{video_id}.mp4",
            captions=tuple(texts),
            split=splits[video_id],
            frame_captions=(
                frame_captions_of(lists, video_id, tuple(texts))
                if lists is not None and splits[video_id] == "train"
                else None
            ),
            caption_order=tuple(order[video_id]),
        )
        for video_id, texts in captions.items()
    ]


def _jsfusion(root: Path, train: Mapping[str, str], videos: Path) -> list[Clip]:
    """The 1k-A test pairs, one caption a video, none of them trained on."""
    path = root / "MSRVTT_JSFUSION_test.csv"
    clips = []
    for line, row in _rows(path, required=("video_id", "sentence")):
        video_id = row["video_id"]
        if video_id in train:
            raise ValueError(f"{path}:{line}: the test video {video_id} is a training video too")
        clips.append(
            Clip(id=video_id, video=videos / f"{video_id}.mp4", captions=(row["sentence"],), split="test")
        )
    return clips


def _sentences(annotations: Any, path: Path) -> list[tuple[str, str]]:
    """Video id and caption of every sentence, in file order."""
    try:
        return [(sentence["video_id"], sentence["caption"]) for sentence in annotations["sentences"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected `sentences`, a list of objects with video_id and caption"
        ) from error


def _full_splits(root: Path, annotations: Any, path: Path) -> dict[str, str]:
    """Split of each video of the full protocol, from its three tables or else from the annotations."""
    tables = {split: root / name for split, name in _FULL_FILES.items()}
    if any(table.exists() for table in tables.values()):
        return {video_id: split for split, table in tables.items() for video_id in _ids(table)}
    logger.info("no MSRVTT_*.full.csv in %s: splits are those written in %s", root, path.name)
    try:
        return {video["video_id"]: _FULL_SPLITS[video["split"]] for video in annotations["videos"]}
    except (KeyError, TypeError) as error:
        known = ", ".join(_FULL_SPLITS)
        raise ValueError(f"{path}: expected `videos` with video_id and split, one of {known}") from error


def _ids(path: Path) -> list[str]:
    """The column `video_id`, each id once."""
    return list(dict.fromkeys(row["video_id"] for _, row in _rows(path, required=("video_id",))))


def _user_clip(row: Mapping[str, str], where: str, folder: Path) -> Clip:
    """One row of a user's table as a clip of one caption."""
    start, end = (_seconds(row.get(key, ""), f"{where}: {key}") for key in ("start", "end"))
    span = (
        "" if start is None and end is None else f"@{start or 0:g}-{'' if end is None else format(end, 'g')}"
    )
    return Clip(
        id=row["video"] + span,
        video=folder / row["video"],
        captions=(row["caption"],),
        split=row.get("split") or "train",
        start=start,
        end=end,
    )


def _seconds(text: str, where: str) -> float | None:
    """A time in a cell, None for an empty one."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{where}: expected seconds not below 0, found {text!r}")
    return value


def _rows(
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
