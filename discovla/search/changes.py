"""Compare videos to index with those that are in the index."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from discovla.foreign import to_json
from discovla.search.indexing import FileStamp
from discovla.search.sources import SourceVideo
from discovla.search.store import Contents, VideoRow


@dataclass(frozen=True, kw_only=True)
class Change:
    """A video to read: new, or with an `earlier` row of a file that has changed.  size: bytes of the file."""

    source: SourceVideo
    size: int
    earlier: VideoRow | None


@dataclass(kw_only=True)
class Plan:
    """Work of an `add`.

    todo: videos to read.  rows: new rows of videos that need no reading.
    unchanged, gone: numbers.  refused: those refused before, whose files have not changed, with the reasons.
    """

    todo: list[Change] = field(default_factory=list)
    rows: list[VideoRow] = field(default_factory=list)
    unchanged: int = 0
    gone: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)


def plan(sources: Sequence[SourceVideo], contents: Contents) -> Plan:
    """Return what is to be done for the sources, and which files of the index are gone.

    A file has changed if its size has, or its modification time and its checksum.
    """
    current, result = {row.key: row for row in contents.videos.values()}, Plan()
    for source in sources:
        row, stamp = current.pop(source.key, None), FileStamp.of(source.video)
        if row is not None and stamp is None:
            _note_gone(row, result)
        elif row is not None and stamp is not None and (same := _unchanged(row, stamp)) is not None:
            columns = to_json(dict(source.columns))
            same = replace(same, columns=columns if source.columns else same.columns)
            if same != row:
                result.rows.append(same)
            if same.state == "refused":
                result.refused.append((row.video, row.reason))
            else:
                result.unchanged += 1
        else:
            earlier = row if row is not None and row.state != "refused" else None
            size = 0 if stamp is None else stamp.size
            result.todo.append(Change(source=source, size=size, earlier=earlier))
    for row in current.values():
        if row.state != "refused" and not os.path.exists(row.video):
            _note_gone(row, result)
    return result


def _note_gone(row: VideoRow, result: Plan) -> None:
    """Mark a video whose file is not there; a refused one stays refused."""
    if row.state == "refused":
        result.refused.append((row.video, row.reason))
        return
    result.gone += 1
    if row.state != "gone":
        result.rows.append(replace(row, state="gone"))


def _unchanged(row: VideoRow, stamp: FileStamp) -> VideoRow | None:
    """Return the row of a file that has not changed, None if it has."""
    state = "indexed" if row.state == "gone" else row.state
    if stamp.size != row.size:
        return None
    if stamp.mtime_ns == row.mtime_ns:
        return replace(row, state=state)
    if row.checksum and stamp.with_checksum(row.video).checksum == row.checksum:
        return replace(row, state=state, mtime_ns=stamp.mtime_ns)
    return None
