"""Bad clips: counted in training, written to a list, left out of later training."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from discovla.batch import BadClip
from discovla.data.manifest import Clip
from discovla.files import write_file
from discovla.foreign import parse_json, to_json

QUARANTINE_HINT = (
    "`discovla doctor MANIFEST` lists all such clips; data.quarantine=LIST leaves them out of training, "
    "`discovla evaluate --quarantine LIST` out of an evaluation"
)
logger = logging.getLogger(__name__)


class Quarantine:
    """The bad clips of a run, each once, in a JSONL file.

    Args:
        path: the file; bad clips of an interrupted run are read from it.
        clips: number of training clips.
        share: largest share of them that may be bad.
    """

    def __init__(self, path: Path, *, clips: int, share: float) -> None:
        self.path, self.clips, self.share = path, clips, share
        self.known = _read(path)

    def add(self, bad: Iterable[BadClip], *, write: bool) -> None:
        """Count the bad clips of a step.

        Args:
            write: append new ones to the file; True on one process only.

        Raises:
            ValueError: more than the allowed share of the clips is bad.
        """
        bad = list(bad)
        if not bad:
            return
        new = {clip.id: clip for clip in bad if clip.id not in self.known}
        self.known |= new
        if write and new:
            with self.path.open("a", encoding="utf-8") as file:
                for clip in new.values():
                    file.write(to_json(asdict(clip)) + "\n")
        for clip in new.values():
            logger.warning("skipping clip %r (%s): %s", clip.id, clip.video, clip.reason)
        if len(self.known) > self.share * self.clips:
            last = bad[-1]
            raise ValueError(
                f"data.bad_clip_share: expected at most {self.share:.2%} of {self.clips} clips to be bad,"
                f" found {len(self.known)}, the last {last.id!r} ({last.video}): {last.reason};"
                f" {QUARANTINE_HINT}; all are in {self.path}"
            )


def without_quarantined(clips: Sequence[Clip], path: str | Path) -> list[Clip]:
    """Return the clips that are not in a quarantine list, and log how many are.

    Args:
        path: JSONL file with id, video and reason of each clip, as `discovla doctor` writes it.

    Raises:
        ValueError: the list cannot be read, or all clips are in it.
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
                bad = BadClip(**parse_json(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{path}:{number}: expected id, video and reason of a clip") from error
            listed[bad.id] = bad
    good = [clip for clip in clips if clip.id not in listed]
    if not good:
        raise ValueError(f"{path}: expected a clip that is not in quarantine, found all {len(clips)} in it")
    if len(good) < len(clips):
        first = next(listed[clip.id] for clip in clips if clip.id in listed)
        logger.warning(
            "%d of %d clips are in quarantine (%s) and left out, the first %r: %s",
            len(clips) - len(good),
            len(clips),
            path,
            first.id,
            first.reason,
        )
    return good


def _read(path: Path) -> dict[str, BadClip]:
    """Return bad clips by id; drop a last line that a crash cut short, as its clip will be read again."""
    known: dict[str, BadClip] = {}
    if not path.exists():
        return known
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:
        clip = BadClip(**json.loads(line))
        known[clip.id] = clip
    if lines[-1]:
        write_file(path, "".join(f"{line}\n" for line in lines[:-1]))  # other ranks read it at this time
    return known
