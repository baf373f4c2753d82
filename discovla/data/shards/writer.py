"""Clips decoded once, into shards: in parallel, whole or not at all, taken up again where it was stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from discovla.batch import BadClip
from discovla.data.manifest import Clip, read_manifest
from discovla.data.sandbox import Result, WorkerLost, run_sandboxed
from discovla.data.shards.layout import (
    CLIPS,
    FRAME,
    FRAMES,
    QUARANTINE,
    SUMMARY,
    VERSION,
    ShardSettings,
    clip_fields,
    dali_index,
    file_sha256,
    npy_bytes,
    tar_end,
    write_whole,
)
from discovla.data.shards.parts import PartItem, decode_part, read_part, write_part
from discovla.data.video.errors import DecodeError

logger = logging.getLogger(__name__)

LIMIT = 120.0  # seconds a clip may take
_STATE = ".state"


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The arguments of `write_shards`."""

    settings: ShardSettings
    workers: int
    limit: float
    verify: bool
    log: Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What was made.  decoded: clips decoded in this run, the others were there.  size: bytes of all tars."""

    shards: int
    clips: int
    size: int
    decoded: int
    bad: tuple[BadClip, ...]


@dataclass(frozen=True)
class _Shard:
    """A tar to be: its name, its split, and which clips of the manifest it holds."""

    name: str
    split: str
    numbers: tuple[int, ...]


@dataclass
class _Work:
    """Where a run stands."""

    clips: Sequence[Clip]
    out: Path
    job: _Job
    source: str
    decoded: int = 0

    @property
    def parts(self) -> Path:
        return self.out / _STATE / "parts"

    def part(self, number: int) -> Path:
        return self.parts / f"{number:08d}"

    def state(self, shard: _Shard) -> Path:
        return self.out / _STATE / f"{shard.name}.json"


def write_shards(
    manifest: str | Path,
    out: str | Path,
    settings: ShardSettings,
    *,
    workers: int = 1,
    limit: float = LIMIT,
    verify: bool = False,
    log: Callable[[str], object] = logger.info,
) -> ShardReport:
    """Decode the clips of a manifest into a folder of shards, laid out as `layout.py` describes.

    The same manifest and settings give the same bytes, however often the run was stopped; a clip that was
    decoded is not decoded again.  A clip that gives no frames is written down with the reason.

    Args:
        manifest: its videos need not all be there.
        out: a folder that is empty, or that an earlier run with the same settings began.
        settings: frames kept of each clip.
        workers: decoding processes; 0 decodes in this process, without a time limit.
        limit: seconds a clip may take.
        verify: if True, existing tars are checked by checksum and rewritten where they differ.
        log: called with a line for every shard written.

    Raises:
        ValueError: the folder holds something else, another process is writing it, or no clip gives frames.
        OSError: a file cannot be written.
    """
    manifest, out = Path(manifest), Path(out)
    job = _Job(settings=settings, workers=workers, limit=limit, verify=verify, log=log)
    clips = read_manifest(manifest)
    work = _Work(clips, out, job, os.path.normpath(manifest.parent.resolve()))
    with _owned(out):
        _begin(work)
        shards = _planned(clips, settings.clips_per_shard)
        todo = [shard for shard in shards if not _is_done(work, shard)]
        for shard in todo:
            (out / f"{shard.name}.tar").unlink(missing_ok=True)
        _assemble(work, todo, _decoded(work, todo))
        return _finish(work, shards)


@contextmanager
def _owned(out: Path) -> Iterator[None]:
    """The folder, made where there is none, for this process alone."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / _STATE).is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: expected an empty folder or one of shards, found other files")
    (out / _STATE).mkdir(exist_ok=True)
    with (out / _STATE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is writing shards there") from None
        yield


def _begin(work: _Work) -> None:
    """Write down what is to be made, or see that it is what an earlier run began."""
    plan = {"version": VERSION, "settings": asdict(work.job.settings), "clips_sha256": _clips_sha256(work)}
    path = work.out / _STATE / "plan.json"
    if not path.exists():
        write_whole(path, json.dumps(plan, indent=1).encode())
    began = json.loads(path.read_text())
    if began.get("version") != VERSION:
        raise ValueError(f"{work.out}: expected shards of version {VERSION}, found {began.get('version')}")
    for key, value in plan["settings"].items():
        if began["settings"].get(key) != value:
            found = began["settings"].get(key)
            raise ValueError(f"{work.out}: {key}: its shards were begun with {found!r}, found {value!r}")
    if began["clips_sha256"] != plan["clips_sha256"]:
        raise ValueError(f"{work.out}: its shards were begun from another manifest; expected an empty folder")
    work.parts.mkdir(exist_ok=True)


def _clips_sha256(work: _Work) -> str:
    """Checksum of all the manifest says of its clips."""
    rows = [[_video(clip, work), clip_fields(clip)] for clip in work.clips]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _video(clip: Clip, work: _Work) -> str:
    """The path of a clip's file, relative to the manifest's folder where it lies below."""
    path = clip.video
    return (path.relative_to(work.source) if path.is_relative_to(work.source) else path).as_posix()


def _planned(clips: Sequence[Clip], each: int) -> list[_Shard]:
    """Which clips go into which tar: those of a split in the order of the manifest, `each` to a tar."""
    splits: dict[str, list[int]] = {}
    for number, clip in enumerate(clips):
        splits.setdefault(clip.split, []).append(number)
    return [
        _Shard(f"{quote(split, safe='')}-{i:06d}", split, tuple(numbers[first : first + each]))
        for split, numbers in splits.items()
        for i, first in enumerate(range(0, len(numbers), each))
    ]


def _is_done(work: _Work, shard: _Shard) -> bool:
    """Whether a shard is there as it was written: by its size, with `verify` by its checksum."""
    state, tar = work.state(shard), work.out / f"{shard.name}.tar"
    if not (state.exists() and tar.is_file() and tar.with_suffix(".idx").is_file()):
        return False
    known = json.loads(state.read_text())["shard"]
    whole = tar.stat().st_size == known["bytes"]
    if whole and work.job.verify:
        whole = file_sha256(tar) == known["sha256"]
    if not whole:
        logger.warning("%s: not what was written, made again", tar)
    return whole


def _items(work: _Work, todo: Sequence[_Shard]) -> Iterator[PartItem]:
    """The clips to decode, shard after shard; those an earlier run decoded are left out."""
    for shard in todo:
        for number in shard.numbers:
            if read_part(work.part(number)) is None:
                yield PartItem(number, work.clips[number], work.part(number), work.job.settings)


def _decoded(work: _Work, todo: Sequence[_Shard]) -> Generator[Result[PartItem, int], None, None]:
    """Decode all that is left to decode."""
    items, job = _items(work, todo), work.job
    if job.workers:
        yield from run_sandboxed(decode_part, items, workers=job.workers, limit=job.limit)
        return
    for item in items:
        try:
            yield Result(item=item, value=decode_part(item))
        except DecodeError as error:
            yield Result(item=item, error=error)


def _assemble(
    work: _Work, todo: Sequence[_Shard], outcomes: Generator[Result[PartItem, int], None, None]
) -> None:
    """Write every shard as soon as its clips are decoded."""
    waiting = list(todo)
    with closing(outcomes):
        for outcome in outcomes:
            _keep(work, outcome)
            while waiting and all(work.part(number).exists() for number in waiting[0].numbers):
                _write_shard(work, waiting.pop(0))
    for shard in waiting:
        _write_shard(work, shard)


def _keep(work: _Work, outcome: Result[PartItem, int]) -> None:
    """Count a clip; one that gives no frames gets a part that says why.

    Raises:
        Exception: what stopped a worker and is no fault of the clip.
    """
    work.decoded += 1
    error = outcome.error
    if isinstance(error, DecodeError | WorkerLost):
        reason = error.reason if isinstance(error, DecodeError) else str(error)
        write_part(outcome.item.path, b"", {"bad": reason})
    elif error is not None:
        raise error


def _write_shard(work: _Work, shard: _Shard) -> None:
    """Put a shard together from its parts, and then remove them."""
    tar, samples, records, size = work.out / f"{shard.name}.tar", [], [], 0
    digest = hashlib.sha256()
    part = tar.with_name(f".{tar.name}.part")
    with part.open("wb") as file:
        for number in shard.numbers:
            found = read_part(work.part(number))
            if found is None:
                raise ValueError(f"{work.part(number)}: not what was written; run the command again")
            content, record = found
            if "bad" not in record:
                samples.append((number, size, record.pop("members")))
                record["rows"] = [[index, at + size, *rest] for index, at, *rest in record["rows"]]
            records.append({"number": number, **record})
            size += _written(file, content, digest)
        size += _written(file, tar_end(size), digest)
        file.flush()
        os.fsync(file.fileno())
    write_whole(tar.with_suffix(".idx"), dali_index(samples).encode())
    part.replace(tar)
    facts = {"name": tar.name, "split": shard.split, "clips": len(samples), "bytes": size}
    state = {"shard": {**facts, "sha256": digest.hexdigest()}, "clips": records}
    write_whole(work.state(shard), json.dumps(state).encode())
    for number in shard.numbers:
        work.part(number).unlink()
    work.job.log(f"{tar}: {len(samples)} clips, {size / 1e6:.1f} MB")


def _written(file: Any, content: bytes | memoryview, digest: Any) -> int:
    """Write and sum up some bytes; how many."""
    file.write(content)
    digest.update(content)
    return len(content)


def _finish(work: _Work, shards: Sequence[_Shard]) -> ShardReport:
    """Write the index of all shards from what is known of each.

    Raises:
        ValueError: no clip gives frames.
    """
    states = [json.loads(work.state(shard).read_text()) for shard in shards]
    found = {row.pop("number"): (i, row) for i, state in enumerate(states) for row in state["clips"]}
    bad = tuple(
        BadClip(id=clip.id, video=str(clip.video), reason=found[number][1]["bad"])
        for number, clip in enumerate(work.clips)
        if "bad" in found[number][1]
    )
    lines = "".join(f"{json.dumps(asdict(clip), ensure_ascii=False)}\n" for clip in bad)
    write_whole(work.out / QUARANTINE, lines.encode(errors="surrogateescape"))
    if len(bad) == len(work.clips):
        raise ValueError(f"{work.out}: none of {len(bad)} clips gives frames, the first: {bad[0].reason}")
    rows, clips = _index(work, found)
    write_whole(work.out / CLIPS, clips)
    frames = npy_bytes(rows)
    write_whole(work.out / FRAMES, frames)
    summary = {
        "version": VERSION,
        "settings": asdict(work.job.settings),
        "shards": [state["shard"] for state in states],
        "files": {CLIPS: hashlib.sha256(clips).hexdigest(), FRAMES: hashlib.sha256(frames).hexdigest()},
    }
    write_whole(work.out / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    shutil.rmtree(work.parts)
    size = sum(state["shard"]["bytes"] for state in states)
    return ShardReport(
        shards=len(shards), clips=len(work.clips) - len(bad), size=size, decoded=work.decoded, bad=bad
    )


def _index(work: _Work, found: dict[int, tuple[int, dict[str, Any]]]) -> tuple[np.ndarray, bytes]:
    """Rows of all frames, and a line for each clip that says which of them are its own."""
    rows: list[np.ndarray] = [np.empty(0, FRAME)]
    lines, first = [], 0
    for number, clip in enumerate(work.clips):
        shard, record = found[number]
        line: dict[str, Any] = {**clip_fields(clip), "video": _video(clip, work)}
        if "bad" in record:
            line["bad"] = record["bad"]
        else:
            own = np.array([tuple(row) for row in record.pop("rows")], FRAME)
            line |= {"shard": shard, "first": first, "rows": len(own), **record}
            rows.append(own)
            first += len(own)
        lines.append(json.dumps(line))
    return np.concatenate(rows), ("\n".join(lines) + "\n").encode()
