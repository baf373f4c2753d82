"""Sampled frames of video files, by the decoder that the user names."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from discovla.data.cache import FrameCache
from discovla.data.sampling import Sampling
from discovla.data.sandbox import Sandbox, WorkerLost
from discovla.data.video.errors import DecodeError, check_file
from discovla.data.video.index import FrameIndex, FrameIndexStore
from discovla.data.video.pyav import Astray, read_entering, scan
from discovla.data.video.resize import resize_and_crop
from discovla.data.video.torchcodec import Unfit, missing, read_torchcodec, unfit

logger = logging.getLogger(__name__)

Damaged = Literal["refuse", "use"]
DecoderName = Literal["pyav", "torchcodec", "auto"]  # those that read one file after another
Each = Callable[[Image.Image], np.ndarray]
Images = dict[int, np.ndarray]

TRIED = 8  # files on which `auto` measures


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Sampled frames of one clip.

    images: by frame index, uint8 RGB y x 3.  indices: those taken, ascending, with repeats where the clip is
    short, or fewer (see `Sampling`).  seconds: their times.  count: frames that decode.  rate: average frames
    per second.  problem: what ended the decoding early, or None.
    """

    images: dict[int, np.ndarray]
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    count: int
    rate: float
    problem: str | None

    @property
    def frames(self) -> np.ndarray:
        """The frames, f y x 3, uint8."""
        return np.stack([self.images[index] for index in self.indices])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What can be had from a file.

    kind: `ok` decodes to its end, `damaged` breaks off after `count` frames, `refused` gives none.  reason:
    why, empty where it is ok.  size: width and height as displayed.  header_count: frames the header
    promises, 0 where it says nothing.
    """

    kind: Literal["ok", "damaged", "refused"]
    reason: str
    count: int = 0
    rate: float | None = None
    size: tuple[int, int] | None = None
    header_count: int = 0


def decode(
    path: str | Path,
    frames: int,
    *,
    sample_rate: float = 1.0,
    start: float | None = None,
    end: float | None = None,
    damaged: Damaged = "refuse",
) -> Decoded:
    """The sampled frames of a video as it is displayed.

    The frames that decode are counted, whatever the header says; rotation is applied, pixels that are not
    square are left as they are, as in the released code.

    Args:
        path: a video file; of several video streams the best is taken.
        frames, sample_rate, start, end: see `frame_indices`.
        damaged: whether a file that breaks off is refused or used up to there.

    Raises:
        DecodeError: the file gives no frames, or is damaged and that is refused.
    """
    sampling = Sampling(frames=frames, sample_rate=sample_rate, start=start, end=end)
    return read_frames(path, sampling, np.asarray, damaged=damaged)


def read_frames(
    path: str | Path,
    sampling: Sampling,
    each: Callable[[Image.Image], np.ndarray],
    *,
    damaged: Damaged = "refuse",
) -> Decoded:
    """As `decode`, with `each` applied once to every chosen frame, so that no more than one is held whole.

    Args:
        each: from an RGB image as displayed to uint8 y x 3, the same shape for all.

    Raises:
        DecodeError: as `decode`.
    """
    path = Path(path)
    images, table = scan(path, sampling, each, None)
    indices = sampled(path, table, sampling, damaged)
    if not images.keys() >= set(indices):
        images, table = scan(path, sampling, each, table.count)
    if not images.keys() >= set(indices):
        raise DecodeError(path, f"decoded twice, it gave other frames, the second time {table.count}")
    return described(images, indices, table)


def tabulate(path: Path) -> FrameIndex:
    """Decode a file to its end, keeping nothing but its table.

    Raises:
        DecodeError: it does not open.
    """
    return scan(path, None, np.asarray, 0)[1]


def look_through(item: tuple[Path, Sampling]) -> FrameIndex:
    """Decode a file to its end, keeping its table, which tells each frame from others.

    Raises:
        DecodeError: it does not open.
    """
    path, sampling = item
    return scan(path, sampling, np.asarray, None, prints=True)[1]


def sampled(path: Path, table: FrameIndex, sampling: Sampling, damaged: Damaged) -> list[int]:
    """Indices of the frames to take, from the frames that did decode.

    Raises:
        DecodeError: as `decode`.
    """
    if table.count == 0:
        raise DecodeError(path, table.nothing())
    if table.problem is not None and damaged == "refuse":
        raise DecodeError(path, table.broken())
    if table.rate is None:
        raise DecodeError(path, "no average frame rate: expected one above 0 in the file, found none")
    try:
        return sampling.indices(table.count, table.rate)
    except ValueError as error:
        raise DecodeError(path, str(error)) from error


def described(images: dict[int, np.ndarray], indices: list[int], table: FrameIndex) -> Decoded:
    """Images with what is known of their file."""
    rate = table.rate or 0.0
    return Decoded(
        images=images,
        indices=tuple(indices),
        seconds=tuple(table.seconds(index) for index in indices),
        count=table.count,
        rate=rate,
        problem=None if table.problem is None else table.broken(),
    )


def inspect(path: str | Path) -> Verdict:
    """Decode a file to its end, keeping nothing, and say what it gives."""
    try:
        table = tabulate(Path(path))
    except DecodeError as error:
        return Verdict(kind="refused", reason=error.reason)
    if table.count == 0:
        return Verdict(
            kind="refused", reason=table.nothing(), rate=table.rate, header_count=table.header_count
        )
    return Verdict(
        kind="ok" if table.problem is None else "damaged",
        reason="" if table.problem is None else table.broken(),
        count=table.count,
        rate=table.rate,
        size=table.size,
        header_count=table.header_count,
    )


def write_frames(
    video: str | Path,
    out: str | Path,
    frames: int,
    *,
    sample_rate: float = 1.0,
    damaged: Damaged = "refuse",
) -> list[Path]:
    """Write the sampled frames of a video as PNG, at the size displayed, and `frames.json` with their times.

    Args:
        out: folder, made where there is none.
        frames, sample_rate, damaged: as `decode`.

    Returns: the PNG files in order; a repeated frame is written once for each time it is seen.

    Raises:
        DecodeError: as `decode`.
        OSError: the folder cannot be written.
    """
    decoded = decode(video, frames, sample_rate=sample_rate, damaged=damaged)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, (index, seconds) in enumerate(zip(decoded.indices, decoded.seconds, strict=True)):
        name = f"{place:02d}_frame{index:06d}.png"
        Image.fromarray(decoded.images[index]).save(out / name)
        rows.append({"file": name, "index": index, "seconds": round(seconds, 6)})
    record = _record(video, decoded) | {"frames": rows}
    (out / "frames.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return [out / row["file"] for row in rows]


def _record(video: str | Path, decoded: Decoded) -> dict[str, Any]:
    """What `frames.json` says of the whole clip."""
    height, width, _ = decoded.images[decoded.indices[0]].shape
    return {
        "video": str(video),
        "count": decoded.count,
        "rate": decoded.rate,
        "width": width,
        "height": height,
        "problem": decoded.problem,
    }


def check_decoder(name: DecoderName) -> None:
    """Refuse a decoder that is not there.

    Raises:
        ValueError: what it lacks.
    """
    lacking = missing() if name == "torchcodec" else None
    if lacking is not None:
        raise ValueError(f"decoder: {lacking}")


class Decoder:
    """Reads sampled frames of files, and remembers the table of each file it has decoded to its end.

    Which frames a sampling takes depends on how many decode, and only decoding tells: the first time a file
    is read it is decoded whole, by PyAV for every decoder.  From then on its table is known, and only what is
    needed for the frames wanted is decoded.

    Args:
        name: `pyav`; `torchcodec`, which refuses the files it does not read exactly; `auto`, the faster of
            the two on the first files, those that torchcodec does not read exactly going to PyAV.
        tables: where tables are kept.

    Raises:
        ValueError: the decoder asked for is not there.
    """

    def __init__(self, name: DecoderName = "pyav", tables: FrameIndexStore | None = None) -> None:
        self.name = name
        self.tables = FrameIndexStore() if tables is None else tables
        self.chosen: DecoderName | None = None if name == "auto" else name
        self._seconds: dict[DecoderName, list[float]] = {"pyav": [], "torchcodec": []}
        check_decoder(name)
        lacking = missing() if name == "auto" else None
        if lacking is not None:
            logger.info("decoder: auto takes pyav: %s", lacking)
            self.chosen = "pyav"

    def read(self, path: Path, sampling: Sampling, each: Each, *, damaged: Damaged = "refuse") -> Decoded:
        """The sampled frames of a file, as `read_frames`.

        Raises:
            DecodeError: as `read_frames`, or the decoder asked for cannot read the file exactly.
        """
        check_file(path)
        images: dict[int, np.ndarray] = {}
        table = self.tables.get(path)
        if table is None:
            images, table = scan(path, sampling, each, None, prints=True)
            self.tables.put(path, table)
        indices = sampled(path, table, sampling, damaged)
        if self.chosen is None:
            images = self._tried(path, table, sampling, indices, each)
        elif self.chosen == "torchcodec" or not images.keys() >= set(indices):
            images = self._images(path, table, sampling, indices, each)
        return described(images, indices, table)

    def _images(
        self, path: Path, table: FrameIndex, sampling: Sampling, indices: list[int], each: Each
    ) -> Images:
        """The frames by the decoder chosen."""
        if self.chosen == "torchcodec":
            try:
                return read_torchcodec(path, table, indices, each)
            except Unfit as error:
                if self.name != "auto":
                    raise DecodeError(path, f"cannot be read by decoder = 'torchcodec': {error}") from error
                warn_once(str(path), f"decoder: auto leaves it to pyav: {error}")
        return self._by_pyav(path, table, sampling, indices, each)

    def _by_pyav(
        self, path: Path, table: FrameIndex, sampling: Sampling, indices: list[int], each: Each
    ) -> Images:
        """The frames by PyAV, from key frames where the file can be entered there."""
        if table.ordered:
            try:
                return read_entering(path, table, indices, each)
            except Astray as error:
                warn_once(str(path), f"decoded whole each time: entered at a key frame, {error}")
                self.tables.put(path, replace(table, sequential=True))
        images, again = scan(path, sampling, each, table.count)
        if not images.keys() >= set(indices):
            raise DecodeError(path, f"decoded twice, it gave other frames, the second time {again.count}")
        return images

    def _tried(
        self, path: Path, table: FrameIndex, sampling: Sampling, indices: list[int], each: Each
    ) -> Images:
        """The frames by both decoders in turn, with their times, until there are enough to choose."""
        if unfit(table) is not None:
            return self._by_pyav(path, table, sampling, indices, each)
        images: Images = {}
        turn = len(self._seconds["pyav"]) % 2
        names: list[DecoderName] = ["pyav", "torchcodec"]
        for name in (names[turn], names[1 - turn]):
            self.chosen = name
            begin = time.perf_counter()
            images = self._images(path, table, sampling, indices, each)
            self._seconds[name].append(time.perf_counter() - begin)
        self.chosen = None
        if len(self._seconds["pyav"]) == TRIED:
            spent = {name: sum(seconds) for name, seconds in self._seconds.items()}
            self.chosen = min(names, key=spent.__getitem__)
            figures = ", ".join(f"{name} {seconds / TRIED:.3f} s" for name, seconds in spent.items())
            logger.info("decoder: auto takes %s: %s a clip, over %d clips", self.chosen, figures, TRIED)
        return images


@lru_cache(maxsize=256)
def warn_once(path: str, what: str) -> None:
    """Say something of a file, once in a process."""
    logger.warning("%s: %s", path, what)


@dataclass(frozen=True, kw_only=True)
class FrameRequest:
    """What is to be read: which frames of which file, how large, by which decoder.

    augment: `randaugment` or `resized_crop`, drawn by `seed` and applied at full size; anything else is not.
    cache: folder in which the tables of files are kept, for all processes.
    """

    path: Path
    sampling: Sampling
    image_size: int
    augment: str = "none"
    seed: str = ""
    damaged: Damaged = "refuse"
    decoder: DecoderName = "pyav"
    cache: Path | None = None


def read_request(reading: FrameRequest) -> np.ndarray:
    """The frames of a file at the size of the model, uint8 f y x 3.

    Raises:
        DecodeError: as `Decoder.read`.
        ValueError: the decoder is not there.
    """
    decoder = _decoder(reading.decoder, reading.cache)
    each = resizing(reading.augment, reading.seed, reading.image_size)
    return decoder.read(reading.path, reading.sampling, each, damaged=reading.damaged).frames


def resizing(augment: str, seed: str, size: int) -> Callable[[Image.Image], np.ndarray]:
    """Return a function that augments a frame of full size and resizes it for the model."""
    change = _augmentation(augment, seed, size)
    return lambda image: resize_and_crop(image if change is None else change(image), size)


class SandboxedReader:
    """`read_request` in a process of its own, which is replaced where it does not survive a file.

    It pickles and survives a fork, so that each worker of a loader has a process of its own.

    Args:
        limit: seconds that a file may take; None reads in this process and without limit.
    """

    def __init__(self, limit: float | None) -> None:
        self._worker = None if limit is None else Sandbox(read_request, limit=limit)

    def __call__(self, reading: FrameRequest) -> np.ndarray:
        """The frames of a file.

        Raises:
            DecodeError: as `read_request`, or the file took longer than the limit or crashed its process.
        """
        if self._worker is None:
            return read_request(reading)
        try:
            return self._worker(reading)
        except WorkerLost as error:
            raise DecodeError(reading.path, f"not decoded: {error}") from error

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()


@lru_cache(maxsize=4)
def _decoder(name: DecoderName, cache: Path | None) -> Decoder:
    """The decoder of this process, which remembers the files it met."""
    if name != "pyav" and "torch" not in sys.modules:
        import torch  # on all cores unless told otherwise, in each of many processes

        torch.set_num_threads(1)
    try:
        kept = None if cache is None else FrameCache(cache, ".table")
    except ValueError as error:  # a disk that filled up since the cache was made; the run goes on without
        logger.warning("%s: each process counts the frames of each file", error)
        kept = None
    return Decoder(name, FrameIndexStore(kept))


def _augmentation(augment: str, seed: str, size: int) -> Callable[[Image.Image], Image.Image] | None:
    """What changes the frames at full size."""
    if augment not in ("randaugment", "resized_crop"):
        return None
    # Imported where they are needed: they bring torch, which a process that only decodes does without.
    from discovla.data.augment import draw_randaugment, draw_resized_crop

    return draw_randaugment(seed) if augment == "randaugment" else draw_resized_crop(seed, size)
