"""Examine every video of a manifest before training, and list the clips that give no frames, with reasons."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from av.error import FFmpegError
from av.video.format import VideoFormat

from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from discovla.data.sandbox import WorkerLost, run_sandboxed
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import Damaged, FileDecoder, Hdr, read_frames
from discovla.data.video.index import VERSION, FrameIndex, FrameIndexStore, default_index_dir
from discovla.data.video.pyav import Transform, chosen_stream, open_video
from discovla.files import write_file
from discovla.foreign import to_json

_VARIABLE = 1.5  # the rate is variable if the longest gap between frames exceeds the shortest by this factor
_END_SECONDS = 0.5  # by which annotations may end late, being rounded
_COMMON = 6  # values of each kind in the summary
_NAMED = 40  # broken clips in the summary


@dataclass(frozen=True, kw_only=True)
class ExamineOptions:
    """Options of the examination of files.

    sampling: of a training run; the span is that of each clip.
    damaged: "refuse" or "use" files that break off.
    hdr: "refuse" or "tonemap" HDR video.
    decoder: decoder whose frames are compared with those of PyAV.
    seconds: limit for a file with all its clips.
    workers: number of processes.
    index_dir: folder that receives the frame index of each file, so that training need not decode the file
        for it; None is the user's default.
    """

    sampling: Sampling
    damaged: Damaged = "refuse"
    hdr: Hdr = "refuse"
    decoder: FileDecoder = "pyav"
    seconds: float = 300.0
    workers: int = 2
    index_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Result of an examination.

    files: result of `examine` for each video, with its path.
    broken: id, path and reason of each clip that gives no frames.
    clips: number of clips.
    quarantine: path of the list of broken clips.
    overlong: id, end and length of the video in seconds of each clip that ends after its video.
    """

    files: tuple[dict[str, Any], ...]
    broken: tuple[tuple[str, str, str], ...]
    clips: int
    quarantine: Path
    overlong: tuple[tuple[str, float, float], ...] = ()

    def lines(self) -> list[str]:
        """Return a summary: counts of files by kind, unusual facts, each broken clip and its reason."""
        kinds = Counter(file["kind"] for file in self.files)
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("ok", "damaged", "refused"))
        lines = [f"{len(self.files)} files, {self.clips} clips: {counts}"]
        decoded = [file for file in self.files if file.get("count")]
        if decoded:
            sizes = (f"{file['width']}x{file['height']}" for file in decoded)
            lines.append(f"  codec      {_counted(file['codec'] for file in decoded)}")
            lines.append(f"  size       {_counted(sizes)}")
            lines.append(f"  frames/s   {_range([file['rate'] for file in decoded if file['rate']])}")
            lines.append(f"  seconds    {_range([file['duration'] for file in decoded if file['duration']])}")
            lines.append(f"  frames     {_range([file['count'] for file in decoded])}")
            unusual = _counted(name for file in decoded for name in file["unusual"])
            lines.append(f"  unusual    {unusual or 'nothing'}")
            chosen = [f"{file['video']}: {file['stream']}" for file in decoded if file.get("stream")]
            lines += [f"  stream     {line}" for line in chosen[:_COMMON]]
            lines += [f"  stream     and {len(chosen) - _COMMON} more"] if len(chosen) > _COMMON else []
        if self.overlong:
            some = ", ".join(
                f"{name} ({end:g} s of {length:.1f} s)" for name, end, length in self.overlong[:_COMMON]
            )
            more = ", ..." if len(self.overlong) > _COMMON else ""
            lines.append(
                f"{len(self.overlong)} clips end after their video, and are read to its end: {some}{more}"
            )
        lines.append(f"{len(self.broken)} of {self.clips} clips give no frames{':' if self.broken else ''}")
        lines += [f"  {name}  ({video}): {reason}" for name, video, reason in self.broken[:_NAMED]]
        if len(self.broken) > _NAMED:
            lines.append(f"  and {len(self.broken) - _NAMED} more")
        lines.append(f"quarantine: {self.quarantine}; training leaves its clips out with data.quarantine")
        return lines


@dataclass(frozen=True, kw_only=True)
class ExamineRequest:
    """A file, the samplings of the clips that are parts of it, and the options of `ExamineOptions`."""

    path: Path
    samplings: tuple[Sampling, ...]
    damaged: Damaged = "refuse"
    hdr: Hdr = "refuse"
    decoder: FileDecoder = "pyav"
    index_dir: Path | None = None


def diagnose(
    clips: Sequence[Clip],
    out: str | Path,
    options: ExamineOptions,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """Examine the video of every clip, each in a process that is replaced if it hangs or crashes.

    The result of each file is appended to `files.jsonl` at once.  A later call with the same options goes on
    from there: files that have not changed are not opened again.

    Args:
        clips: of a manifest.
        out: folder for `files.jsonl` and `quarantine.jsonl`, made if it does not exist.
        report: called with the number of files examined and their total.

    Raises:
        ValueError: no clips, or `files.jsonl` is not one of the doctor's.
        OSError: the folder cannot be written.
    """
    if not clips:
        raise ValueError("expected at least one clip, found none")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    requests = _requests(clips, options)
    keys = {path: _key(request, options) for path, request in requests.items()}
    record = out / "files.jsonl"
    rows = {row["key"]: row for row in _earlier_rows(record)}
    left = [request for path, request in requests.items() if keys[path] not in rows]
    done = len(requests) - len(left)
    report(done, len(requests))
    workers = min(options.workers, len(left) or 1)
    with record.open("a", encoding="utf-8") as file:
        for result in run_sandboxed(examine, left, workers=workers, limit=options.seconds):
            path = result.item.path
            facts = result.value or _failed(result.error, len(result.item.samplings))
            row = {"video": str(path), "key": keys[path], **facts}
            rows[keys[path]] = row
            file.write(_line(row))
            file.flush()
            done += 1
            report(done, len(requests))
    ordered = [rows[keys[path]] for path in requests]
    write_file(record, "".join(map(_line, ordered)))
    return _diagnosis(clips, ordered, out / "quarantine.jsonl")


def add_broken(diagnosis: Diagnosis, clips: Sequence[Clip], reasons: Mapping[str, str]) -> Diagnosis:
    """Return a diagnosis with more broken clips, by id, and write its list of them."""
    known = {name: reason for name, _, reason in diagnosis.broken} | dict(reasons)
    broken = tuple((clip.id, str(clip.video), known[clip.id]) for clip in clips if clip.id in known)
    return _quarantined(replace(diagnosis, broken=broken))


def examine(request: ExamineRequest) -> dict[str, Any]:
    """Decode all of a file, then the frames that each of its clips samples.

    Returns: JSON values.
        kind, reason: "ok" decodes to its end, "damaged" breaks off, "refused" gives no frame; why.
        clips: for each sampling why it gives no frames, or None.
        container, codec, pixels: FFmpeg's names.
        width, height: as displayed; coded_width, coded_height: as stored; rotation: in degrees.
        aspect: of a pixel.
        streams: number of video streams; stream: which of several is read, in words.
        declared_rate, declared_duration, declared_count: of the header; rate, duration, count: of the frames.
        gaps: least and greatest seconds between two frames.
        keys: number of keyframes at which decoding can start.
        bits: of a colour.  alpha, interlaced: of the pixels.  hdr: "PQ", "HLG" or None.
        unusual: unusual facts in words.
    """
    store = FrameIndexStore()  # of this call: an earlier index would replace the decoding
    reasons = [_failure(request, sampling, store) for sampling in request.samplings]
    try:
        index = store.get(request.path)
    except OSError:
        index = None  # there is no such file
    if index is None:
        reason = next(filter(None, reasons), "it does not open")
        return {"kind": "refused", "reason": reason, "clips": reasons}
    FrameIndexStore(request.index_dir or default_index_dir()).put(request.path, index)
    kind = "refused" if index.count == 0 else "ok" if index.problem is None else "damaged"
    facts = {"kind": kind, "reason": index.fault(), "clips": reasons}
    facts |= _header_facts(request.path) | _frame_facts(index)
    facts["alpha"] |= facts.pop("alpha_beside")
    return facts | {"unusual": _unusual(facts) if index.count else []}


def _failure(request: ExamineRequest, sampling: Sampling, store: FrameIndexStore) -> str | None:
    """Return why a clip gives no frames, None if it does."""

    def read(decoder: FileDecoder, transform: Transform) -> dict[int, np.ndarray]:
        return read_frames(
            request.path,
            sampling,
            transform,
            damaged=request.damaged,
            hdr=request.hdr,
            decoder=decoder,
            store=store,
        ).images

    try:
        if request.decoder == "pyav":
            read("pyav", lambda image: np.zeros((1, 1, 3), np.uint8))
            return None
        images, others = read("pyav", None), read(request.decoder, None)
    except DecodeError as error:
        return error.reason
    wrong = [number for number, image in images.items() if not np.array_equal(image, others[number])]
    return f"decoder = {request.decoder!r} gives another frame {wrong[0]} than PyAV" if wrong else None


def _header_facts(path: Path) -> dict[str, Any]:
    """Return the header's part of `examine`, and the rotation of the first frame."""
    with open_video(path) as video:
        context, stream = video.stream.codec_context, video.stream
        aspect = context.sample_aspect_ratio
        facts: dict[str, Any] = {
            "container": video.container.format.name,
            "codec": context.codec.canonical_name,
            "coded_width": context.width,
            "coded_height": context.height,
            "aspect": None if not aspect else str(aspect),
            "streams": len(video.container.streams.video),
            "stream": chosen_stream(path),
            "declared_rate": _rounded(stream.average_rate),
            "rotation": 0,
            # WebM stores the alpha of VP8 and VP9 beside the pictures, which decode without it
            "alpha_beside": stream.metadata.get("alpha_mode") == "1",
        }
        with suppress(FFmpegError, StopIteration):  # the index says that there is no frame
            facts["rotation"] = next(frame.rotation for frame in video.container.decode(stream))
    return facts


def _frame_facts(index: FrameIndex) -> dict[str, Any]:
    """Return the frames' part of `examine`."""
    seconds = sorted(index.seconds(i) for i, time in enumerate(index.times) if time is not None)
    gaps = [after - before for before, after in pairwise(seconds)]
    span = seconds[-1] - seconds[0] if gaps else 0.0
    parts = VideoFormat(index.pixel_format).components if index.count else ()
    return {
        "width": index.size[0],
        "height": index.size[1],
        "pixels": index.pixel_format,
        "bits": max((part.bits for part in parts), default=0),
        "alpha": any(part.is_alpha for part in parts),
        "interlaced": index.interlaced,
        "hdr": index.hdr,
        "rate": _rounded(len(gaps) / span) if span else None,
        "duration": _rounded(span * (1 + 1 / len(gaps))) if span else None,
        "gaps": [round(min(gaps), 6), round(max(gaps), 6)] if gaps else None,
        "declared_duration": _rounded(index.header_seconds),
        "declared_count": index.header_count,
        "count": index.count,
        "keys": len(index.keyframes),
        "steady": index.uniform,
        "ordered": index.ascending,
        "faults": index.faults,
    }


def _unusual(facts: Mapping[str, Any]) -> list[str]:
    """Return what is unusual about a file that gives frames."""
    low, high = facts["gaps"] or (0.0, 0.0)
    rate, declared = facts["rate"], facts["declared_rate"]
    unusual = {
        "variable rate": high > _VARIABLE * low > 0,
        "declares another rate": bool(rate and declared and abs(rate / declared - 1) > 0.02),
        "declares another number of frames": facts["declared_count"] not in (0, facts["count"]),
        "turned": bool(facts["rotation"]),
        "pixels not square": facts["aspect"] not in (None, "1"),
        "several video streams": facts["streams"] > 1,
        "size or format changes": not facts["steady"],
        "times do not ascend": not facts["ordered"],
        "decoder reports errors": facts["faults"] > 0,
        "one frame": facts["count"] == 1,
        f"HDR ({facts['hdr']})": facts["hdr"] is not None,
        f"{facts['bits']} bits a colour": facts["bits"] > 8,
        "alpha, which is dropped": facts["alpha"],
        "interlaced": facts["interlaced"],
    }
    return [name for name, true in unusual.items() if true]


def _requests(clips: Sequence[Clip], options: ExamineOptions) -> dict[Path, ExamineRequest]:
    """Return the request for each video, with the parts of it that clips are, in the order of the clips."""
    parts: dict[Path, list[Sampling]] = {}
    for clip in clips:
        parts.setdefault(clip.video, []).append(replace(options.sampling, start=clip.start, end=clip.end))
    return {
        path: ExamineRequest(
            path=path,
            samplings=tuple(samplings),
            damaged=options.damaged,
            hdr=options.hdr,
            decoder=options.decoder,
            index_dir=options.index_dir,
        )
        for path, samplings in parts.items()
    }


def _diagnosis(clips: Sequence[Clip], rows: Sequence[dict[str, Any]], quarantine: Path) -> Diagnosis:
    """Collect the broken clips and list them in the form of a run's own quarantine."""
    reasons = {row["video"]: iter(row["clips"]) for row in rows}
    verdicts = [(clip.id, str(clip.video), next(reasons[str(clip.video)])) for clip in clips]
    broken = tuple(verdict for verdict in verdicts if verdict[2] is not None)
    lengths = {
        row["video"]: row["count"] / row["rate"] for row in rows if row.get("count") and row.get("rate")
    }
    ends = [(clip.id, clip.end, lengths.get(str(clip.video))) for clip in clips if clip.end is not None]
    overlong = [(name, end, length) for name, end, length in ends if length and end > length + _END_SECONDS]
    diagnosis = Diagnosis(
        files=tuple(rows), broken=broken, clips=len(clips), quarantine=quarantine, overlong=tuple(overlong)
    )
    return _quarantined(diagnosis)


def _quarantined(diagnosis: Diagnosis) -> Diagnosis:
    """Write the list of broken clips of a diagnosis, and return it."""
    rows = [{"id": name, "video": video, "reason": reason} for name, video, reason in diagnosis.broken]
    write_file(diagnosis.quarantine, "".join(map(_line, rows)))
    return diagnosis


def _failed(error: Exception | None, clips: int) -> dict[str, Any]:
    """Return the facts of a file that crashed its process, took too long or raised an unexpected error."""
    reason = f"decoding it {error}" if isinstance(error, WorkerLost) else f"{type(error).__name__}: {error}"
    return {"kind": "refused", "reason": reason, "clips": [reason] * clips}


def _key(request: ExamineRequest, options: ExamineOptions) -> str:
    """Return the key of a file in its present state under these options."""
    try:
        stat = request.path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
    except OSError:
        state = None
    index_dir = str(request.index_dir or default_index_dir())
    values = (str(request.path), state, request.samplings, request.damaged, request.hdr, request.decoder)
    text = repr((*values, options.seconds, index_dir, VERSION))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


def _earlier_rows(record: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier call, without a last line that a crash cut short."""
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
            raise ValueError(
                f"{record}:{number}: expected a row of the doctor; remove the file to begin anew"
            )
        rows.append(row)
    return rows


def _line(row: dict[str, Any]) -> str:
    return to_json(row) + "\n"


def _counted(values: Iterable[str]) -> str:
    """Return the values with their counts, the most common first."""
    counts = Counter(values).most_common()
    others = sum(count for _, count in counts[_COMMON:])
    text = ", ".join(f"{value} {count}" for value, count in counts[:_COMMON])
    return text + (f", others {others}" if others else "")


def _range(values: Sequence[float]) -> str:
    """Return the least, greatest and median value."""
    if not values:
        return "unknown"
    return f"{min(values):g} to {max(values):g}, median {median(values):g}"


def _rounded(value: Any) -> float | None:
    """Return a number rounded to six decimal places, None if there is none."""
    return None if not value else round(float(value), 6)
