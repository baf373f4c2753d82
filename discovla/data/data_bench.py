"""How many frames a second each way to the frames gives on a user's own files, beside what models take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from discovla.data.config import DataConfig
from discovla.data.dali.pipeline import CLIPS, Plan
from discovla.data.dali.reader import DaliClipReader, DaliDecoder
from discovla.data.dali.reader import missing as dali_missing
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from discovla.data.shards.reader import Shards, open_shards
from discovla.data.video import torchcodec
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import FileDecoder, FrameRequest, SandboxedReader

# Frames a second on one H200: the samples a second that the performance plan aims at (batch 128, bf16) times
# the 12 frames of each. Targets, none of them measured.
DEMAND = {"ViT-B/32": 2460 * 12, "ViT-B/16": 665 * 12, "ViT-L/14": 154 * 12}


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """frames, image_size: what is read of a clip.  workers: processes.  limit: seconds a clip may take."""

    frames: int = 12
    image_size: int = 224
    workers: int = 2
    limit: float = 300.0


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One way to the frames: how many it gave in how many seconds, or why it was not tried.

    bad: clips that gave none.  reason: of the first of them.
    """

    name: str
    frames: int = 0
    seconds: float = 0.0
    bad: int = 0
    reason: str = ""

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames / self.seconds if self.seconds else 0.0


Read = Callable[[FrameRequest], np.ndarray]


def bench(
    clips: Sequence[Clip], settings: BenchSettings, *, shards: Sequence[str] = ()
) -> Iterator[BenchRow]:
    """Read the same frames of the same clips in every way that is there, one way after the other.

    Args:
        clips: each is read twice by PyAV and once in every other way.
        shards: folders of shards made from the clips, to be read as well.

    Raises:
        ValueError: there are no clips, or no such shards.
    """
    if not clips:
        raise ValueError("clips: expected at least 1, found none")
    with tempfile.TemporaryDirectory() as folder:
        readings = [
            FrameRequest(
                path=clip.video,
                sampling=Sampling(frames=settings.frames, start=clip.start, end=clip.end),
                image_size=settings.image_size,
                index_dir=Path(folder),
            )
            for clip in clips
        ]
        with _readers(settings) as read:
            yield _timed("pyav, first time", readings, read, settings.workers)
            yield _timed("pyav, known files", readings, read, settings.workers)
            yield _by_torchcodec(readings, read, settings)
        yield _by_dali(clips, settings, Path(folder))
    for root in shards:
        yield _by_shards(root, clips, readings)
        source = open_shards(root)
        if source.settings.format == "jpeg":
            yield _by_dali(clips, settings, None, source)


def _by_torchcodec(readings: Sequence[FrameRequest], read: Read, settings: BenchSettings) -> BenchRow:
    name: FileDecoder = "torchcodec"
    lacking = torchcodec.missing()
    if lacking is not None:
        return BenchRow(name="torchcodec, known files", reason=lacking)
    asked = [replace(reading, decoder=name) for reading in readings]
    for reading in asked[: settings.workers]:  # its library is loaded by the first clip
        _try(read, reading)
    return _timed("torchcodec, known files", asked, read, settings.workers)


def _by_dali(
    clips: Sequence[Clip], settings: BenchSettings, cache: Path | None, shards: Shards | None = None
) -> BenchRow:
    """All clips through DALI's graph, some at a time: files, each counted before, or JPEG in shards."""
    where = "the GPU" if torch.cuda.is_available() else "the CPU"
    name = f"dali on {where}, {'known files' if shards is None else 'jpeg shards'}"
    lacking = dali_missing()
    if lacking is not None:
        return BenchRow(name=name, reason=lacking)
    config = DataConfig(
        manifest=Path("clips"),
        frames=settings.frames,
        index_dir=cache,
        decode_seconds=settings.limit,
        workers=settings.workers,
    )
    reader = DaliClipReader(config, settings.image_size, shards)
    graph = DaliDecoder(reader.pipeline)
    size = min(CLIPS, len(clips))
    batches = [clips[first : first + size] for first in range(0, len(clips), size)]
    _made(batches[0], reader, graph)  # the graph is built by the first batch
    begin = time.perf_counter()
    found = [each for batch in batches for each in _made(batch, reader, graph)]
    seconds = time.perf_counter() - begin
    graph.close()
    reader.close()
    return _row(name, found, seconds)


def _made(clips: Sequence[Clip], reader: DaliClipReader, graph: DaliDecoder) -> list[int | DecodeError]:
    """How many frames of each clip DALI made, or why none."""
    planned: list[Plan] = []
    found: list[int | DecodeError] = []
    for clip in clips:
        try:
            plan = reader.read(clip)
        except DecodeError as error:
            found.append(error)
        else:
            planned.append(plan)
            found.append(len(plan))
    rows = [row for row, each in enumerate(found) if isinstance(each, int)]
    for row, plan, reason in zip(rows, planned, graph.decode(planned)[1], strict=True):
        if reason is not None:
            found[row] = DecodeError(plan.path, reason)
    return found


def _by_shards(root: str, clips: Sequence[Clip], readings: Sequence[FrameRequest]) -> BenchRow:
    """The clips from shards, at the size they are kept, in this process alone."""
    source = open_shards(root)

    def read(item: tuple[Clip, FrameRequest]) -> int | DecodeError:
        clip, reading = item
        try:
            return len(source.frames(clip, reading.sampling, None))
        except DecodeError as error:
            return error

    begin = time.perf_counter()
    found = [read(item) for item in zip(clips, readings, strict=True)]
    return _row(f"{source.settings.format} shards, 1 process", found, time.perf_counter() - begin)


def _timed(name: str, readings: Sequence[FrameRequest], read: Read, workers: int) -> BenchRow:
    """All readings, as many at a time as there are processes."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda reading: _try(read, reading), readings))
    return _row(name, found, time.perf_counter() - begin)


def _try(read: Read, reading: FrameRequest) -> int | DecodeError:
    """How many frames a clip gave, or why it gave none."""
    try:
        return len(read(reading))
    except DecodeError as error:
        return error


def _row(name: str, found: Sequence[int | DecodeError], seconds: float) -> BenchRow:
    bad = [each for each in found if isinstance(each, DecodeError)]
    frames = sum(each for each in found if isinstance(each, int))
    reason = bad[0].reason if bad else ""
    return BenchRow(name=name, frames=frames, seconds=seconds, bad=len(bad), reason=reason)


@contextmanager
def _readers(settings: BenchSettings) -> Iterator[Read]:
    """A function that reads by one of several processes, all of them started."""
    free: SimpleQueue[SandboxedReader] = SimpleQueue()
    readers = [SandboxedReader(settings.limit) for _ in range(settings.workers)]
    nothing = FrameRequest(path=Path("."), sampling=Sampling(frames=1), image_size=8)
    for reader in readers:
        _try(reader, nothing)
        free.put(reader)

    def read(reading: FrameRequest) -> np.ndarray:
        reader = free.get()
        try:
            return reader(reading)
        finally:
            free.put(reader)

    try:
        yield read
    finally:
        for reader in readers:
            reader.close()


def table(rows: Sequence[BenchRow]) -> str:
    """The rows as text, with the share of each model's demand that each way meets."""
    head = f"{'':28}{'frames/s':>10}" + "".join(f"{name:>12}" for name in DEMAND)
    demand = f"{'demand, a target on 1 H200':28}{'':10}" + "".join(f"{n:12,}" for n in DEMAND.values())
    lines = [head, demand]
    for row in rows:
        if not row.frames:
            lines.append(f"{row.name:28}{'-':>10}  {row.reason}")
            continue
        shares = "".join(f"{100 * row.rate / need:10.1f} %" for need in DEMAND.values())
        bad = f"  {row.bad} clips gave none: {row.reason}" if row.bad else ""
        lines.append(f"{row.name:28}{row.rate:10,.0f}{shares}{bad}")
    return "\n".join(lines)
