"""Opening every clip of a manifest before training does, and writing down which are broken and why."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from discovla.data.manifest import Clip, write_whole
from discovla.data.sampling import Sampling
from discovla.data.sandbox import run_sandboxed
from discovla.data.video.examine import Request, examine
from discovla.data.video.frames import Damaged

_COMMON = 6  # values named of each kind in the summary
_NAMED = 40  # broken clips named in the summary


@dataclass(frozen=True, kw_only=True)
class Checks:
    """How clips are examined.

    sampling: what a run takes of a clip; its span is the clip's own.  damaged: whether a file that breaks off
    is refused or used.  seconds: that a file may take, all its clips together.  workers: processes.  cache:
    `data.cache` of a run, whose first visit of each file is made by the examination; None leaves it to it.
    """

    sampling: Sampling
    damaged: Damaged = "refuse"
    seconds: float = 300.0
    workers: int = 2
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the doctor found.

    files: of each video what `examine` gives, with its path.  broken: id, path and reason of each clip that
    gives no frames.  clips: how many there are.  quarantine: where the broken are listed.
    """

    files: tuple[dict[str, Any], ...]
    broken: tuple[tuple[str, str, str], ...]
    clips: int
    quarantine: Path

    def lines(self) -> list[str]:
        """A summary to read: how many, of what kind, what is odd, and each broken clip with its reason."""
        kinds = Counter(file["kind"] for file in self.files)
        told = ", ".join(f"{kinds[kind]} {kind}" for kind in ("ok", "damaged", "refused"))
        lines = [f"{len(self.files)} files, {self.clips} clips: {told}"]
        seen = [file for file in self.files if file.get("count")]
        if seen:
            sizes = (f"{file['width']}x{file['height']}" for file in seen)
            lines.append(f"  codec      {_counted(file['codec'] for file in seen)}")
            lines.append(f"  size       {_counted(sizes)}")
            lines.append(f"  frames/s   {_spread([file['rate'] for file in seen if file['rate']])}")
            lines.append(f"  seconds    {_spread([file['duration'] for file in seen if file['duration']])}")
            lines.append(f"  frames     {_spread([file['count'] for file in seen])}")
            odd = _counted(name for file in seen for name in file["unusual"])
            lines.append(f"  unusual    {odd or 'nothing'}")
        lines.append(f"{len(self.broken)} of {self.clips} clips give no frames{':' if self.broken else ''}")
        lines += [f"  {name}  ({video}): {reason}" for name, video, reason in self.broken[:_NAMED]]
        if len(self.broken) > _NAMED:
            lines.append(f"  and {len(self.broken) - _NAMED} more")
        lines.append(f"quarantine: {self.quarantine}; training leaves its clips out with data.quarantine")
        return lines


def diagnose(
    clips: Sequence[Clip],
    out: str | Path,
    checks: Checks,
    *,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Examine the video of every clip, each in a process that is replaced where it hangs or crashes.

    What is found of a file is written to `files.jsonl` at once.  Whoever is interrupted goes on from there: a
    file that has not changed is not opened again under the same checks.

    Args:
        clips: of a manifest.
        out: folder for `files.jsonl` and `quarantine.jsonl`, made where there is none.
        checks: how.
        told: called with how many files are examined and how many there are.

    Raises:
        ValueError: no clips.
        OSError: the folder cannot be written.
    """
    if not clips:
        raise ValueError("expected at least one clip, found none")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    requests = _requests(clips, checks)
    keys = {path: _key(request, checks) for path, request in requests.items()}
    record = out / "files.jsonl"
    rows = {row["key"]: row for row in _known(record)}
    left = [request for path, request in requests.items() if keys[path] not in rows]
    done = len(requests) - len(left)
    told(done, len(requests))
    workers = min(checks.workers, len(left) or 1)
    with record.open("a", encoding="utf-8") as file:
        for outcome in run_sandboxed(examine, left, workers=workers, limit=checks.seconds):
            path = outcome.item.path
            found = outcome.value or _lost(outcome.error, len(outcome.item.samplings))
            row = {"video": str(path), "key": keys[path], **found}
            rows[keys[path]] = row
            file.write(_line(row))
            file.flush()
            done += 1
            told(done, len(requests))
    ordered = [rows[keys[path]] for path in requests]
    write_whole(record, "".join(map(_line, ordered)))
    return _diagnosis(clips, ordered, out / "quarantine.jsonl")


def _requests(clips: Sequence[Clip], checks: Checks) -> dict[Path, Request]:
    """What is asked of each video, with the parts of it that clips are, in the order of the clips."""
    parts: dict[Path, list[Sampling]] = {}
    for clip in clips:
        parts.setdefault(clip.video, []).append(replace(checks.sampling, start=clip.start, end=clip.end))
    return {
        path: Request(path=path, samplings=tuple(samplings), damaged=checks.damaged, cache=checks.cache)
        for path, samplings in parts.items()
    }


def _diagnosis(clips: Sequence[Clip], rows: Sequence[dict[str, Any]], quarantine: Path) -> Diagnosis:
    """Verdicts by clip, the broken ones written down in the form in which training keeps its own."""
    reasons = {row["video"]: iter(row["clips"]) for row in rows}
    told = [(clip.id, str(clip.video), next(reasons[str(clip.video)])) for clip in clips]
    broken = tuple(row for row in told if row[2] is not None)
    lines = [_line({"id": name, "video": video, "reason": reason}) for name, video, reason in broken]
    write_whole(quarantine, "".join(lines))
    return Diagnosis(files=tuple(rows), broken=broken, clips=len(clips), quarantine=quarantine)


def _lost(error: Exception | None, clips: int) -> dict[str, Any]:
    """What is known of a file that its process did not survive, or that raised what nobody expected."""
    reason = (
        f"decoding it {error}" if type(error).__name__ == "WorkerLost" else f"{type(error).__name__}: {error}"
    )
    return {"kind": "refused", "reason": reason, "clips": [reason] * clips}


def _key(request: Request, checks: Checks) -> str:
    """Of a file as it is and the checks as they are."""
    try:
        stat = request.path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
    except OSError:
        state = None
    cache = () if checks.cache is None else (str(checks.cache),)
    text = repr((str(request.path), state, request.samplings, request.damaged, checks.seconds, *cache))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def _known(record: Path) -> list[dict[str, Any]]:
    """What was found before; a last line cut short by a crash is dropped, and its file examined again."""
    if not record.exists():
        return []
    lines = record.read_text(encoding="utf-8").split("\n")
    if lines[-1]:
        os.truncate(record, len("".join(f"{line}\n" for line in lines[:-1]).encode()))
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not row.keys() >= {"key", "video", "kind", "clips"}:
            raise ValueError(f"{record}:{number}: not what the doctor wrote; remove the file to begin anew")
        rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _counted(values: Iterable[str]) -> str:
    """Values with their numbers, the most common first."""
    found = Counter(values).most_common()
    more = sum(number for _, number in found[_COMMON:])
    shown = ", ".join(f"{value} {number}" for value, number in found[:_COMMON])
    return shown + (f", others {more}" if more else "")


def _spread(values: Sequence[float]) -> str:
    """Least, middle and greatest."""
    if not values:
        return "unknown"
    return f"{min(values):g} to {max(values):g}, median {median(values):g}"
