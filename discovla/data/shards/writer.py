"""Decode the clips of a manifest once into shards, in parallel, resuming where an earlier run stopped.

Each clip is decoded into a part file of its own; once all clips of a tar are decoded, their parts are joined
into the tar and removed. What an earlier run finished is kept in `.state` of the output folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from discovla.batch import BadClip
from discovla.data.manifest import Clip, read_manifest
from discovla.data.sandbox import WorkerLost, run_sandboxed
from discovla.data.shards.layout import (
    CLIPS,
    FRAME,
    FRAMES,
    QUARANTINE,
    SUMMARY,
    VERSION,
    ShardSettings,
    clip_to_json,
    dali_index,
    npy_bytes,
    tar_end,
    tar_sample,
)
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import read_frames, resize_and_crop
from discovla.files import remove_unfinished, replacing, write_file
from discovla.foreign import to_json
from discovla.lock import NAME as LOCK
from discovla.lock import WriterLock

logger = logging.getLogger(__name__)

CLIP_SECONDS = 120.0  # limit of one clip
_PART_TRAILER = struct.Struct("<II8s")  # bytes of the record, checksum, magic
_PART_MAGIC = b"dvpart01"


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """Result of a run. decoded: clips decoded by this run, not by an earlier one. size: bytes of all tars."""

    shards: int
    clips: int
    size: int
    decoded: int
    bad: tuple[BadClip, ...]


def write_shards(
    manifest: str | Path,
    out: str | Path,
    settings: ShardSettings,
    *,
    workers: int = 1,
    limit: float = CLIP_SECONDS,
    verify: bool = False,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> ShardReport:
    """Decode the clips of a manifest into a shard folder, whose files `layout.py` describes.

    The same manifest and settings give the same bytes, no matter how often the run was stopped. Clips that
    an earlier run decoded are not decoded again. A clip without frames is recorded with the reason.

    Args:
        manifest: JSONL of clips; missing videos are recorded as bad clips.
        out: an empty or new folder, or one that an earlier run with the same settings began.
        workers: decoding processes; 0 decodes in this process, without a time limit.
        limit: seconds a clip may take.
        verify: if True, tars of earlier runs are checked by checksum and rewritten where they differ.
        report: called with the number of clips decoded and of those to decode.

    Raises:
        ValueError: the folder holds other files or other shards, another process writes to it, or no clip
            has frames.
        OSError: a file cannot be written.
    """
    manifest, out = Path(manifest), Path(out)
    clips = read_manifest(manifest)
    videos = _relative_videos(clips, manifest.parent)
    with WriterLock(out, "discovla shard") as lock:
        state = _state_folder(out)
        _check_plan(state / "plan.json", clips, videos, settings)
        tars = _plan_tars(clips, settings.clips_per_shard, out, state)
        unfinished = {tar.path: tar for tar in tars if not _is_finished(tar, verify)}
        for path in unfinished:
            path.unlink(missing_ok=True)
        parts = _missing_parts(unfinished.values(), clips, settings)
        missing = Counter(part.tar for part in parts)
        for path, tar in unfinished.items():
            if not missing[path]:  # an earlier run decoded all its clips
                lock.check()
                logger.info(_write_tar(tar))
        with closing(_decode(parts, workers, limit)) as decoded_parts:
            for done, part in enumerate(decoded_parts, 1):
                missing[part.tar] -= 1
                if not missing[part.tar]:
                    lock.check()
                    logger.info(_write_tar(unfinished[part.tar]))
                report(done, len(parts))
        lock.check()
        bad, size = _write_index(out, clips, videos, tars, settings)
        shutil.rmtree(state / "parts")
    return ShardReport(shards=len(tars), clips=len(clips) - len(bad), size=size, decoded=len(parts), bad=bad)


def _state_folder(out: Path) -> Path:
    """Return the state folder of a folder of shards, which is made if the folder is empty.

    What a killed run left unfinished is removed.

    Raises:
        ValueError: the folder holds other files.
    """
    state = out / ".state"
    if not state.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"{out}: expected an empty folder or one of shards, found other files")
    (state / "parts").mkdir(parents=True, exist_ok=True)
    for folder in (out, state):
        remove_unfinished(folder, only_writer=True)
    return state


def _relative_videos(clips: Sequence[Clip], folder: Path) -> list[str]:
    """Return the path of each video, relative to the folder of the manifest if it lies below."""
    folder = Path(os.path.normpath(folder.resolve()))
    paths = [clip.video for clip in clips]
    return [(path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix() for path in paths]


def _check_plan(path: Path, clips: Sequence[Clip], videos: Sequence[str], settings: ShardSettings) -> None:
    """Store settings and a checksum of the clips, or compare them with those an earlier run stored.

    Raises:
        ValueError: the earlier run had other settings or another manifest.
    """
    rows = [[video, clip_to_json(clip)] for clip, video in zip(clips, videos, strict=True)]
    checksum = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    plan = {"version": VERSION, "settings": asdict(settings), "clips_sha256": checksum}
    if not path.exists():
        _write_changed(path, json.dumps(plan, indent=1).encode())
    out, earlier = path.parents[1], json.loads(path.read_text())
    if earlier.get("version") != VERSION:
        raise ValueError(f"{out}: expected shards of version {VERSION}, found {earlier.get('version')}")
    for key, value in plan["settings"].items():
        expected = earlier["settings"].get(
            key, getattr(ShardSettings(), key)
        )  # an option newer than the plan
        if expected != value:
            raise ValueError(f"{out}: {key}: expected {expected!r}, as in its other shards, found {value!r}")
    if earlier["clips_sha256"] != checksum:
        raise ValueError(f"{out}: its shards are of another manifest; expected an empty folder")


@dataclass(frozen=True)
class _Tar:
    """A tar to write. numbers: its clips, by their index in the manifest. state: folder of the run."""

    path: Path
    split: str
    numbers: tuple[int, ...]
    state: Path

    @property
    def record(self) -> Path:
        """Path of the JSON that is written once the tar is complete."""
        return self.state / f"{self.path.stem}.json"

    def parts(self) -> list[Path]:
        """Return the part file of each clip."""
        return [self.state / "parts" / f"{number:08d}" for number in self.numbers]


def _plan_tars(clips: Sequence[Clip], clips_per_shard: int, out: Path, state: Path) -> list[_Tar]:
    """Divide the clips of each split over tars, in the order of the manifest."""
    splits: dict[str, list[int]] = {}
    for number, clip in enumerate(clips):
        splits.setdefault(clip.split, []).append(number)
    return [
        _Tar(
            path=out / f"{quote(split, safe='')}-{i:06d}.tar",
            split=split,
            numbers=tuple(numbers[first : first + clips_per_shard]),
            state=state,
        )
        for split, numbers in splits.items()
        for i, first in enumerate(range(0, len(numbers), clips_per_shard))
    ]


def _is_finished(tar: _Tar, verify: bool) -> bool:
    """Return True if a tar and its index exist and have the recorded size and, to `verify`, checksum."""
    if not (tar.record.exists() and tar.path.is_file() and tar.path.with_suffix(".idx").is_file()):
        return False
    expected = json.loads(tar.record.read_text())["shard"]
    intact = tar.path.stat().st_size == expected["bytes"]
    if intact and verify:
        with tar.path.open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"]
    if not intact:
        logger.warning("%s: differs from what was written; it is written again", tar.path)
    return intact


@dataclass(frozen=True)
class _Part:
    """A clip to decode into a part file, which becomes part of a tar."""

    path: Path
    tar: Path
    number: int
    clip: Clip
    settings: ShardSettings


def _missing_parts(tars: Iterable[_Tar], clips: Sequence[Clip], settings: ShardSettings) -> list[_Part]:
    """Return the clips without an intact part file; damaged part files are removed."""
    missing = []
    for tar in tars:
        for number, path in zip(tar.numbers, tar.parts(), strict=True):
            if _read_part(path) is None:
                path.unlink(missing_ok=True)
                missing.append(_Part(path, tar.path, number, clips[number], settings))
    return missing


def _decode(parts: Sequence[_Part], workers: int, limit: float) -> Generator[_Part, None, None]:
    """Decode clips into their part files, in any order, and yield each one.

    Raises:
        Exception: an error that is not the fault of a clip, such as a full disk.
    """
    if workers == 0:
        for part in parts:
            _decode_clip(part)
            yield part
        return
    with closing(run_sandboxed(_decode_clip, parts, workers=workers, limit=limit)) as results:
        for result in results:
            if isinstance(result.error, WorkerLost):
                _write_part(result.item.path, b"", {"bad": str(result.error)})
            elif result.error is not None:
                raise result.error
            yield result.item


def _decode_clip(part: _Part) -> None:
    """Decode a clip and write its part file; the part of a bad clip holds the reason only."""
    clip, settings = part.clip, part.settings

    def transform(image: Image.Image) -> np.ndarray:
        return np.asarray(image) if settings.size is None else resize_and_crop(image, settings.size)

    try:
        decoded = read_frames(
            clip.video, settings.sampling_for(clip), transform, damaged=settings.damaged, hdr=settings.hdr
        )
    except DecodeError as error:
        _write_part(part.path, b"", {"bad": error.reason})
        return
    images = [decoded.images[index] for index in decoded.indices]
    facts = {"count": decoded.count, "rate": decoded.rate}
    if decoded.problem is not None:
        facts["problem"] = decoded.problem
    sample = tar_sample(part.number, clip, images, {"indices": decoded.indices, **facts}, settings)
    rows = sample.rows.tolist()
    record = {"members": sample.members, "rows": rows, "shape": images[0].shape[:2], **facts}
    _write_part(part.path, sample.content, record)


def _write_part(path: Path, content: bytes, record: dict[str, Any]) -> None:
    """Write content and record with a checksum, so that `_read_part` recognises a damaged file."""
    text = json.dumps(record).encode()
    trailer = _PART_TRAILER.pack(len(text), zlib.crc32(text, zlib.crc32(content)), _PART_MAGIC)
    with replacing(path) as file:
        file.writelines((content, text, trailer))


def _read_part(path: Path) -> tuple[memoryview, dict[str, Any]] | None:
    """Return content and record of a part file, or None if it is missing or damaged."""
    try:
        file = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    if len(file) < _PART_TRAILER.size:
        return None
    body = file[: -_PART_TRAILER.size]
    length, checksum, magic = _PART_TRAILER.unpack(file[-_PART_TRAILER.size :])
    if magic != _PART_MAGIC or length > len(body) or zlib.crc32(body) != checksum:
        return None
    content_size = len(body) - length
    return body[:content_size], json.loads(bytes(body[content_size:]))


def _write_tar(tar: _Tar) -> str:
    """Join the parts of a tar, write its DALI index and its record, and remove the parts.

    Returns: a line for the log.

    Raises:
        ValueError: a part changed since it was written.
    """
    samples, records, size, checksum = [], [], 0, hashlib.sha256()
    with replacing(tar.path, durable=True) as file:

        def append(content: bytes | memoryview) -> None:
            nonlocal size
            file.write(content)
            checksum.update(content)
            size += len(content)

        for number, path in zip(tar.numbers, tar.parts(), strict=True):
            part = _read_part(path)
            if part is None:
                raise ValueError(f"{path}: differs from what was written; run the command again")
            content, record = part
            if "bad" not in record:
                samples.append((number, size, record.pop("members")))
                record["rows"] = [[index, offset + size, *rest] for index, offset, *rest in record["rows"]]
            records.append({"number": number, **record})
            append(content)
        append(tar_end(size))
        _write_changed(tar.path.with_suffix(".idx"), dali_index(samples).encode())
    summary = {"name": tar.path.name, "split": tar.split, "clips": len(samples), "bytes": size}
    summary["sha256"] = checksum.hexdigest()
    _write_changed(tar.record, json.dumps({"shard": summary, "clips": records}).encode())
    for path in tar.parts():
        path.unlink()
    return f"{tar.path}: {len(samples)} clips, {size / 1e6:.1f} MB"


def _write_index(
    out: Path, clips: Sequence[Clip], videos: Sequence[str], tars: Sequence[_Tar], settings: ShardSettings
) -> tuple[tuple[BadClip, ...], int]:
    """Write the index of all tars from their records; shards.json last, which completes the folder.

    Returns: clips without frames, and the bytes of all tars.

    Raises:
        ValueError: no clip has frames.
    """
    tar_records = [json.loads(tar.record.read_text()) for tar in tars]
    clip_records = {
        record.pop("number"): (shard, record)
        for shard, tar_record in enumerate(tar_records)
        for record in tar_record["clips"]
    }
    bad: list[BadClip] = []
    rows, lines = [np.empty(0, FRAME)], []
    first = 0  # row of the next clip
    for number, (clip, video) in enumerate(zip(clips, videos, strict=True)):
        shard, record = clip_records[number]
        line = {**clip_to_json(clip), "video": video}
        if "bad" in record:
            bad.append(BadClip(id=clip.id, video=str(clip.video), reason=record["bad"]))
            line["bad"] = record["bad"]
        else:
            own = record.pop("rows")
            rows.append(np.array([tuple(row) for row in own], FRAME))
            line |= {"shard": shard, "first": first, "rows": len(own), **record}
            first += len(own)
        lines.append(json.dumps(line) + "\n")
    quarantine = "".join(f"{to_json(asdict(clip))}\n" for clip in bad)
    _write_changed(out / QUARANTINE, quarantine.encode(errors="surrogateescape"))
    if len(bad) == len(clips):
        raise ValueError(f"{out}: none of {len(bad)} clips has frames, the first: {bad[0].reason}")
    files = {CLIPS: "".join(lines).encode(), FRAMES: npy_bytes(np.concatenate(rows))}
    for name, content in files.items():
        _write_changed(out / name, content)
    summary = {
        "version": VERSION,
        "settings": asdict(settings),
        "shards": [tar_record["shard"] for tar_record in tar_records],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    _write_changed(out / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return tuple(bad), sum(shard["bytes"] for shard in summary["shards"])


def _write_changed(path: Path, content: bytes) -> None:
    """Write a file, flushed to the disk, unless it has this content: it then keeps its time."""
    if not (path.exists() and path.stat().st_size == len(content) and path.read_bytes() == content):
        write_file(path, content, durable=True)
