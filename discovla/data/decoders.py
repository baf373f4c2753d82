"""Measure the decoders that are installed on a user's clips, and compare DALI with PyAV."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from discovla.data.config import DataConfig
from discovla.data.dali import reader as dali
from discovla.data.dali.pipeline import CLIPS, Plan
from discovla.data.dali.reader import DaliClipReader, DaliDecoder
from discovla.data.dataset import ClipReader, FileClipReader, ShardClipReader
from discovla.data.manifest import Clip
from discovla.data.shards.reader import open_shards
from discovla.data.video import torchcodec
from discovla.data.video.errors import DecodeError

Frames = np.ndarray | DecodeError  # of one clip, f y x 3 uint8


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """Frames of the clips by one decoder, and the seconds they took.

    name: decoder and source of the frames.
    setting: line of a config that chooses it, "" for a first visit, which no config chooses.
    bad: number of clips that gave no frames.
    reason: why the first of them gave none, or why nothing was measured.
    """

    name: str
    setting: str = ""
    frames: int = 0
    seconds: float = 0.0
    bad: int = 0
    reason: str = ""

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames / self.seconds if self.seconds else 0.0


def bench(
    clips: Sequence[Clip], config: DataConfig, image_size: int, *, shards: Sequence[str] = ()
) -> Iterator[BenchRow]:
    """Read the frames of clips by each decoder that is installed, one decoder after the other.

    Files are decoded by `config.workers` processes, shards are read by one.

    Args:
        clips: read twice by PyAV, the first time to index their files.
        config: sampling, time limit and number of processes.
        image_size: pixels of a side of the frames.
        shards: folders or URLs of shards of the clips.

    Raises:
        ValueError: no clips, or no such shards.
    """
    if not clips:
        raise ValueError("clips: expected at least 1, found none")
    with tempfile.TemporaryDirectory() as folder:
        config = config.model_copy(
            update={"shards": None, "index_dir": Path(folder), "augment": "none", "decoder": "pyav"}
        )
        setting = 'data.decoder = "{}"'
        with ExitStack() as stack:
            readers = _file_readers(config, image_size, stack)
            yield _measured("pyav, first visit", "", clips, readers)
            yield _measured("pyav", setting.format("pyav"), clips, readers)
        if reason := torchcodec.missing():
            yield BenchRow(name="torchcodec", reason=reason)
        else:
            with ExitStack() as stack:
                config_torchcodec = config.model_copy(update={"decoder": "torchcodec"})
                readers = _file_readers(config_torchcodec, image_size, stack)
                _read(clips[: len(readers)], readers)  # loads torchcodec's libraries
                yield _measured("torchcodec", setting.format("torchcodec"), clips, readers)
        yield _measured_dali("dali", setting.format("dali"), clips, config, image_size)
        for root in shards:
            source = open_shards(root)
            form, chosen = source.settings.format, f'data.shards = "{root}"'
            reader = ShardClipReader(config, image_size, source)
            yield _measured(f"{form} shards", chosen, clips, [reader])
            if form == "jpeg":
                chosen += "\n" + setting.format("dali")
                yield _measured_dali("jpeg shards, dali", chosen, clips, config, image_size, root)


def bench_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as text, and the lines of a config that choose the fastest one.

    A decoder that refuses clips which PyAV reads is not chosen.
    """
    lines = [f"{'':24}{'frames/s':>10}"]
    for row in rows:
        note = (
            f"  {row.bad} clips give none: {row.reason}" if row.bad else f"  {row.reason}" * bool(row.reason)
        )
        lines.append(f"{row.name:24}{f'{row.rate:,.0f}' if row.frames else '-':>10}{note}")
    fewest = min(row.bad for row in rows if row.setting)
    fastest = max((row for row in rows if row.setting and row.bad == fewest), key=lambda row: row.rate)
    return "\n".join([*lines, f"the fastest here is {fastest.name}; its config:", fastest.setting])


def differing_from_pyav(clips: Sequence[Clip], config: DataConfig, image_size: int) -> dict[str, str]:
    """Return the ids of clips of which DALI gives other frames than PyAV, or none, and the reasons.

    Raises:
        ValueError: DALI is not installed.
    """
    config = config.model_copy(update={"shards": None, "augment": "none", "decoder": "pyav"})
    reasons: dict[str, str] = {}
    with (
        ExitStack() as stack,
        closing(DaliClipReader(config, image_size)) as planner,
        closing(DaliDecoder(planner.pipeline)) as decoder,
    ):
        readers = _file_readers(config, image_size, stack)
        for first in range(0, len(clips), CLIPS):
            batch = clips[first : first + CLIPS]
            for clip, frames, wanted in zip(
                batch, _decode_dali(batch, planner, decoder), _read(batch, readers), strict=True
            ):
                if isinstance(frames, DecodeError):
                    reasons[clip.id] = frames.reason
                elif not isinstance(wanted, DecodeError):
                    error = float(np.abs(frames.astype(np.int16) - wanted).mean((1, 2, 3)).max())
                    if error > dali.TOLERANCE_MEAN:
                        text = f"decoder = 'dali' gives other frames than PyAV, {error:.1f} of 255 levels off"
                        reasons[clip.id] = text
    return reasons


def _file_readers(config: DataConfig, image_size: int, stack: ExitStack) -> list[ClipReader]:
    """Return a reader with a started process for each worker; the stack ends the processes."""
    nothing = Clip(id="", video=Path("."), captions=("",), split="")
    readers: list[ClipReader] = []
    for _ in range(max(1, config.workers)):
        reader = FileClipReader(config, image_size)
        stack.callback(reader.close)
        _read([nothing], [reader])
        readers.append(reader)
    return readers


def _read(clips: Sequence[Clip], readers: Sequence[ClipReader]) -> list[Frames]:
    """Return the frames of clips, read by several readers at once."""
    free: SimpleQueue[ClipReader] = SimpleQueue()
    for reader in readers:
        free.put(reader)

    def read(clip: Clip) -> Frames:
        reader = free.get()
        try:
            frames = reader.read(clip)
            assert isinstance(frames, np.ndarray), "only DALI's reader returns plans"
            return frames
        except DecodeError as error:
            return error
        finally:
            free.put(reader)

    with ThreadPoolExecutor(len(readers)) as pool:
        return list(pool.map(read, clips))


def _decode_dali(clips: Sequence[Clip], planner: DaliClipReader, decoder: DaliDecoder) -> list[Frames]:
    """Return the frames of a batch of clips by DALI."""
    plans: list[Plan | None] = []
    errors: list[DecodeError | None] = []
    for clip in clips:
        try:
            plans.append(planner.read(clip))
            errors.append(None)
        except DecodeError as error:
            plans.append(None)
            errors.append(error)
    batch, reasons = decoder.decode(plans)
    frames: list[Frames] = []
    for row, plan, reason, error in zip(batch.cpu().numpy(), plans, reasons, errors, strict=True):
        if plan is None or reason is not None:
            frames.append(error or DecodeError(Path() if plan is None else plan.path, reason or ""))
        else:
            frames.append(row[: len(plan)])
    return frames


def _measured(name: str, setting: str, clips: Sequence[Clip], readers: Sequence[ClipReader]) -> BenchRow:
    """Read all clips and return the row."""
    begin = time.perf_counter()
    frames = _read(clips, readers)
    return _row(name, setting, frames, time.perf_counter() - begin)


def _measured_dali(
    name: str,
    setting: str,
    clips: Sequence[Clip],
    config: DataConfig,
    image_size: int,
    shards: str | None = None,
) -> BenchRow:
    """Decode all clips by DALI, a batch at a time, and return the row."""
    name += " on the GPU" if torch.cuda.is_available() else " on the CPU"
    if reason := dali.missing():
        return BenchRow(name=name, reason=reason)
    source = None if shards is None else open_shards(shards)
    batches = [clips[first : first + CLIPS] for first in range(0, len(clips), CLIPS)]
    with (
        closing(DaliClipReader(config, image_size, source)) as planner,
        closing(DaliDecoder(planner.pipeline)) as decoder,
    ):
        _decode_dali(batches[0], planner, decoder)  # builds the pipeline
        begin = time.perf_counter()
        frames = [each for batch in batches for each in _decode_dali(batch, planner, decoder)]
        return _row(name, setting, frames, time.perf_counter() - begin)


def _row(name: str, setting: str, frames: Sequence[Frames], seconds: float) -> BenchRow:
    bad = [each for each in frames if isinstance(each, DecodeError)]
    count = sum(len(each) for each in frames if not isinstance(each, DecodeError))
    reason = bad[0].reason if bad else ""
    return BenchRow(name=name, setting=setting, frames=count, seconds=seconds, bad=len(bad), reason=reason)
