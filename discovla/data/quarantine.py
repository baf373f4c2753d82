"""Clips found bad in training: written down with the reason, counted, never trained on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from discovla.batch import BadClip
from discovla.data.manifest import Clip

logger = logging.getLogger(__name__)


class Quarantine:
    """The bad clips of a run, in `quarantine.jsonl`, each once.

    Args:
        path: of the file; what an interrupted run wrote there counts on.
        clips: how many clips the training split has.
        share: largest share of them that may be bad.
    """

    def __init__(self, path: Path, *, clips: int, share: float) -> None:
        self.path, self.clips, self.share = path, clips, share
        self.known = _read(path)

    def add(self, found: Iterable[BadClip], *, write: bool) -> None:
        """Count clips found bad in a step; `write` on one process only.

        Raises:
            ValueError: more than the allowed share of the clips is bad.
        """
        found = list(found)
        if not found:
            return
        new = {clip.id: clip for clip in found if clip.id not in self.known}
        self.known |= new
        if write and new:
            with self.path.open("a", encoding="utf-8") as file:
                for clip in new.values():
                    file.write(json.dumps(asdict(clip), ensure_ascii=False) + "\n")
        for clip in new.values():
            logger.warning("skipping clip %r (%s): %s", clip.id, clip.video, clip.reason)
        if len(self.known) > self.share * self.clips:
            last = found[-1]
            raise ValueError(
                f"data.bad_clip_share: expected at most {self.share:.2%} of {self.clips} clips to be bad,"
                f" found {len(self.known)}, the last {last.id!r} ({last.video}): {last.reason};"
                f" all are in {self.path}"
            )


def without_quarantined(clips: Sequence[Clip], path: str | Path) -> list[Clip]:
    """Clips but those of a quarantine list, as the doctor writes it; how many are left out is logged.

    Args:
        clips: of the training split.
        path: JSONL of id, video and reason.

    Raises:
        ValueError: there is no such list, or a line is none of it; or all clips are in it.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a quarantine list: {error}") from error
    listed = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                bad = BadClip(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{path}:{number}: expected id, video and reason of a clip") from error
            listed[bad.id] = bad
    kept = [clip for clip in clips if clip.id not in listed]
    if not kept:
        raise ValueError(f"{path}: all of the {len(clips)} clips are in quarantine")
    out = [clip for clip in clips if clip.id in listed]
    if out:
        first = listed[out[0].id]
        logger.warning(
            "%d of %d clips are in quarantine (%s) and left out, the first %r: %s",
            len(out),
            len(clips),
            path,
            first.id,
            first.reason,
        )
    return kept


def _read(path: Path) -> dict[str, BadClip]:
    """Bad clips by id; a last line cut short by a crash is dropped and will be found again."""
    known: dict[str, BadClip] = {}
    if not path.exists():
        return known
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:
        clip = BadClip(**json.loads(line))
        known[clip.id] = clip
    if lines[-1]:
        part = path.with_name(f".{path.name}.{os.getpid()}.part")  # other ranks are reading
        part.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
        part.replace(path)
    return known
