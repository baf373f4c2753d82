"""Frames by NVIDIA DALI: decoded, resized and cut on the GPU, or by the same graph on a CPU.

On a CPU DALI decodes VP8, VP9 and MJPEG, on a GPU H.264, HEVC, MPEG-4 and AV1 too.  Which frames, their
order and their augmentation come from outside the graph, so that there is nothing in it to save: a run that
is taken up again feeds it the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discovla.data.augment import crop_box
from discovla.data.cache import FrameCache
from discovla.data.decode import DecodeError, sampled, tabulate
from discovla.data.pixels import fitted
from discovla.data.reading import Reading
from discovla.data.tables import FrameTable, FrameTables
from discovla.data.video import check_file
from discovla.data.watched import Lost, Worker

CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "mpeg4", "av1"}
# Mean of the differences, in levels.  DALI interpolates the colours of 4:2:0 video where FFmpeg repeats them,
# which shows at edges between colours; resizing alone differs by up to 2 levels.
TOLERANCE_MEAN = 3.0


@dataclass(frozen=True, kw_only=True)
class DaliSettings:
    """What a graph is made for.

    batch_size: the most clips at a time.  frames: the most of a clip.  image_size: pixels of a side.  crop:
    whether a part of the frame is cut out first (`resized_crop`) or the middle afterwards (`fit`).
    cuda: whether on the current GPU.  threads: of the CPU.  limit: seconds to count the frames of a file.
    """

    batch_size: int
    frames: int
    image_size: int
    crop: bool = False
    cuda: bool = False
    threads: int = 2
    limit: float = 300.0
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Input:
    """What the graph needs of one clip.

    encoded: the file.  indices: f int32.  cut, part: top left corner and size of what is cut out.  size: to
    which frames are resized.  All are pairs y x.
    """

    encoded: np.ndarray
    indices: np.ndarray
    cut: np.ndarray
    part: np.ndarray
    size: np.ndarray


def missing() -> str | None:
    """Why DALI cannot be used here, or None."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "DALI is not installed: pip install 'discovla[dali]'"
    return None


def unfit(table: FrameTable, *, cuda: bool) -> str | None:
    """Why DALI would give other frames than are wanted, or None."""
    codecs = GPU_CODECS if cuda else CPU_CODECS
    if table.codec not in codecs:
        where = "the GPU" if cuda else "a CPU"
        return f"its codec is {table.codec}, DALI decodes {', '.join(sorted(codecs))} on {where}"
    if not table.ordered:
        return "it breaks off, changes its size or has frames without ascending times"
    if table.turned:
        return "its frames are shown turned, which DALI does not do"
    if table.packets != table.count:
        return f"it has {table.packets} packets, which DALI takes for frames, and {table.count} frames decode"
    if table.stream:
        return f"its best video stream is number {table.stream} of the file, DALI takes the first"
    if "10" in table.pixels or "12" in table.pixels:
        return f"its pixels are {table.pixels}, DALI's are of 8 bits"
    return None


class DaliFrames:
    """Sampled frames of several clips at a time, on the device.

    Raises:
        ValueError: DALI is not there.
    """

    def __init__(self, settings: DaliSettings) -> None:
        lacking = missing()
        if lacking is not None:
            raise ValueError(f"decoder: {lacking}")
        self.settings = settings
        self.device = torch.device("cuda" if settings.cuda else "cpu")
        self._tables = FrameTables(None if settings.cache is None else FrameCache(settings.cache, ".table"))
        self._pipeline = video_pipeline(settings)
        self._counters: SimpleQueue[Worker[Path, FrameTable]] = SimpleQueue()
        for _ in range(settings.threads):
            self._counters.put(Worker(tabulate, limit=settings.limit))
        self._pool = ThreadPoolExecutor(settings.threads)

    def read(self, readings: Sequence[Reading]) -> tuple[Tensor, list[int | DecodeError]]:
        """The frames of clips, and of each how many it has, or why it has none.

        Returns: b f y x 3 uint8 on the device, black where a clip has fewer or none.
        """
        settings = self.settings
        size = settings.image_size
        out = torch.zeros(
            len(readings), settings.frames, size, size, 3, dtype=torch.uint8, device=self.device
        )
        inputs = list(self._pool.map(self._prepared, readings))
        found: list[int | DecodeError] = [
            each if isinstance(each, DecodeError) else len(each.indices) for each in inputs
        ]
        good = [row for row, each in enumerate(inputs) if isinstance(each, _Input)]
        for row, frames in self._run(good, [each for each in inputs if isinstance(each, _Input)]):
            if isinstance(frames, str):
                found[row] = DecodeError(readings[row].path, f"DALI: {frames}")
            else:
                out[row, : len(frames)] = frames
        return out, found

    def close(self) -> None:
        """End the processes that count frames."""
        self._pool.shutdown()
        while not self._counters.empty():
            self._counters.get().close()

    def _run(self, rows: list[int], inputs: list[_Input]) -> list[tuple[int, Tensor | str]]:
        """Run the graph; where a clip ends it, each of them is run alone in a new one."""
        if not rows:
            return []
        try:
            return list(zip(rows, self._outputs(inputs), strict=True))
        except RuntimeError as error:
            self._pipeline = video_pipeline(self.settings)
            if len(rows) == 1:
                return [(rows[0], _reason(error))]
        return [self._run([row], [each])[0] for row, each in zip(rows, inputs, strict=True)]

    def _outputs(self, inputs: list[_Input]) -> list[Tensor]:
        """One run of the graph, f y x 3 of each clip."""
        feed_ndarray = importlib.import_module("nvidia.dali.plugin.pytorch").feed_ndarray
        for name in ("encoded", "indices", "cut", "part", "size"):
            self._pipeline.feed_input(name, [getattr(each, name) for each in inputs])
        (batch,) = self._pipeline.run()
        stream = torch.cuda.current_stream() if self.settings.cuda else None
        found = []
        for row in range(len(inputs)):
            frames = torch.empty(batch[row].shape(), dtype=torch.uint8, device=self.device)
            found.append(feed_ndarray(batch[row], frames, cuda_stream=stream))
        return found

    def _prepared(self, reading: Reading) -> _Input | DecodeError:
        """What the graph needs of a clip, or why it cannot be had."""
        try:
            check_file(reading.path)
            table = self._table(reading.path)
            indices = sampled(reading.path, table, reading.sampling, reading.damaged)
            reason = unfit(table, cuda=self.settings.cuda)
            if reason is not None:
                raise DecodeError(reading.path, f"cannot be read by decoder = 'dali': {reason}")
            return self._input(reading, table, indices)
        except DecodeError as error:
            return error

    def _input(self, reading: Reading, table: FrameTable, indices: list[int]) -> _Input:
        """Where a clip is cut, and how it is resized."""
        side = self.settings.image_size
        if self.settings.crop:
            left, top, right, bottom = crop_box(random.Random(reading.seed), *table.size)
            cut, part, size = (top, left), (bottom - top, right - left), (side, side)
        else:
            (width, height), (left, top) = fitted(*table.size, side)
            cut, part, size = (top, left), (side, side), (height, width)
        return _Input(
            encoded=np.fromfile(reading.path, np.uint8),
            indices=np.array(indices, np.int32),
            cut=np.array(cut, np.int32),
            part=np.array(part, np.int32),
            size=np.array(size, np.float32),
        )

    def _table(self, path: Path) -> FrameTable:
        """The table of a file, counted in another process where it is not known."""
        table = self._tables.get(path)
        if table is None:
            counter = self._counters.get()
            try:
                table = counter(path)
            except Lost as error:
                raise DecodeError(path, f"not decoded: {error}") from error
            finally:
                self._counters.put(counter)
            self._tables.put(path, table)
        return table


def video_pipeline(settings: DaliSettings) -> Any:
    """A graph from files to frames; its inputs are the fields of `_Input`.

    Raises:
        RuntimeError: DALI cannot build it here.
    """
    dali = importlib.import_module("nvidia.dali")
    fn, types = dali.fn, dali.types
    device = torch.cuda.current_device() if settings.cuda else None
    pipeline = dali.Pipeline(
        batch_size=settings.batch_size,
        num_threads=settings.threads,
        device_id=device,
        prefetch_queue_depth=1,  # one batch is fed for one that is taken
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        indices = fn.external_source(name="indices", dtype=types.INT32, ndim=1)
        cut, part = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("cut", "part"))
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        frames = fn.decoders.video(encoded, frames=indices, device="mixed" if settings.cuda else "cpu")
        kind = types.INTERP_LINEAR if settings.crop else types.INTERP_CUBIC
        if settings.crop:
            frames = fn.slice(frames, start=cut, shape=part, axes=(1, 2))
        frames = fn.resize(frames, size=size, interp_type=kind, antialias=True)
        if not settings.crop:
            frames = fn.slice(frames, start=cut, shape=part, axes=(1, 2))
        pipeline.set_outputs(frames)
    pipeline.build()
    return pipeline


def _reason(error: RuntimeError) -> str:
    """What DALI found wrong, of all that it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("[", "Error")) or "assert" in line.lower()]
    return (told or lines)[-1][:300]
