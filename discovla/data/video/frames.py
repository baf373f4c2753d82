"""Sampled frames of video files, decoded by the decoder that the user names."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.sandbox import Sandbox, WorkerLost
from discovla.data.video import pyav, torchcodec
from discovla.data.video.errors import DecodeError, WrongFrames, check_file
from discovla.data.video.index import FrameIndex, FrameIndexStore, default_index_dir
from discovla.data.video.pyav import Images, Transform, chosen_stream, decode_through
from discovla.foreign import to_json

logger = logging.getLogger(__name__)
_THREAD = threading.local()

Resize = Literal["shortest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
Damaged = Literal["refuse", "use"]  # a file that breaks off: refuse it, or use the frames up to there
Hdr = Literal["refuse", "tonemap"]  # video with HDR's brightness: refuse it, or map it to SDR
DecoderName = Literal["pyav", "torchcodec", "dali"]
FileDecoder = Literal["pyav", "torchcodec"]  # those that decode one file after another


@dataclass(frozen=True, kw_only=True)
class DecodedFrames:
    """Sampled frames of one clip.

    images: frames by number, uint8 RGB y x 3.
    indices: numbers of the sampled frames, ascending, with repeats where the clip is short (see `Sampling`).
    seconds: their presentation times.
    count: number of frames of the file that decode.
    rate: average frames per second, 0 where it is unknown.
    origin: presentation time of the first frame of the file in seconds.
    problem: why decoding ended early, None if it did not.
    """

    images: Images
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    count: int
    rate: float
    origin: float
    problem: str | None

    @property
    def frames(self) -> np.ndarray:
        """The sampled frames, f y x 3 uint8."""
        return np.stack([self.images[index] for index in self.indices])


def read_frames(
    path: str | Path,
    sampling: Sampling,
    transform: Transform = None,
    *,
    damaged: Damaged = "refuse",
    hdr: Hdr = "refuse",
    decoder: FileDecoder = "pyav",
    store: FrameIndexStore | None = None,
) -> DecodedFrames:
    """Read the sampled frames of a video file as it is displayed.

    Which frames are sampled depends on how many decode, so the first visit of a file decodes all of it with
    PyAV, whichever decoder is named.  Later visits with the same `store` decode the sampled frames only.
    Rotation is applied; pixels that are not square are left as they are, as in the released code.

    Args:
        path: video file; of several video streams the largest is read.
        transform: applied once to each sampled frame, an RGB image, so that no more than one is held in full
            size; returns uint8 y x 3, the same shape for all.  None keeps frames as they are displayed.
        damaged: "refuse" a file that breaks off, or "use" its frames up to there.
        hdr: "refuse" HDR video, or "tonemap" its frames to SDR.
        store: where frame indices are kept; None decodes the file as on a first visit.

    Raises:
        DecodeError: the file gives no frames, is damaged and refused, or the decoder does not give the
            frames that PyAV gives.
    """
    path = Path(path)
    check_file(path)
    images: Images = {}
    index = None if store is None else store.get(path)
    if index is None:
        images, index = decode_through(path, transform, sampling=sampling)
        if store is not None:
            store.put(path, index)
    indices = sampled_indices(path, index, sampling, damaged, hdr)
    if decoder == "torchcodec":
        try:
            images = torchcodec.decode_frames(path, index, indices, transform)
        except WrongFrames as error:
            raise DecodeError(path, f"cannot be read by decoder = 'torchcodec': {error}") from error
    elif not images.keys() >= set(indices):
        images = _decode_known(path, index, indices, transform, store)
    return DecodedFrames(
        images=images,
        indices=tuple(indices),
        seconds=tuple(index.seconds(number) for number in indices),
        count=index.count,
        rate=index.rate or 0.0,
        origin=index.seconds(0),
        problem=index.fault() or None,
    )


def sampled_indices(
    path: Path, index: FrameIndex, sampling: Sampling, damaged: Damaged, hdr: Hdr = "refuse"
) -> list[int]:
    """Return the numbers of the frames that a sampling takes of the frames that decode.

    Raises:
        DecodeError: no frame decodes, the file is damaged or HDR and refused, or the sampling takes none.
    """
    fault = index.fault()
    if fault and (index.count == 0 or damaged == "refuse"):
        raise DecodeError(path, fault)
    check_hdr(path, index.hdr, hdr)
    rate = index.rate
    if rate is None and index.count == 1:
        rate = sampling.sample_rate  # any takes the one frame
    if rate is None:
        raise DecodeError(
            path, "frame rate: expected one in the header or times of the frames, found neither"
        )
    try:
        return sampling.indices(index.count, rate)
    except ValueError as error:
        raise DecodeError(path, str(error)) from error


def check_hdr(path: Path, transfer: str | None, hdr: Hdr) -> None:
    """Refuse HDR video, with the transfer function "PQ" or "HLG", unless it is to be mapped to SDR.

    Raises:
        DecodeError: it is refused.
    """
    if transfer is not None and hdr == "refuse":
        raise DecodeError(path, f"HDR video ({transfer}): expected SDR; data.hdr = 'tonemap' maps it to SDR")


def check_decoder(name: DecoderName) -> None:
    """Check that a decoder of files can be used here.

    Raises:
        ValueError: it cannot; the message says why.
    """
    reason = torchcodec.missing() if name == "torchcodec" else None
    if reason is not None:
        raise ValueError(f"decoder: {reason}")


@dataclass(frozen=True, kw_only=True)
class FrameRequest:
    """Frames to read from one file, for a process of its own.

    image_size: pixels of a side of the square frames.
    resize, interpolation: as in `resize_and_crop`.
    augment: "randaugment" or "resized_crop", drawn by `seed` and applied at full size; else none.
    index_dir: folder of frame indices; None is the user's default.
    """

    path: Path
    sampling: Sampling
    image_size: int
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"
    augment: str = "none"
    seed: str = ""
    damaged: Damaged = "refuse"
    hdr: Hdr = "refuse"
    decoder: FileDecoder = "pyav"
    index_dir: Path | None = None


def read_request(request: FrameRequest) -> np.ndarray:
    """Return the requested frames at the size of the model, uint8 f y x 3.

    Raises:
        DecodeError: as `read_frames`.
        ValueError: the decoder cannot be used here.
    """
    decoded = read_frames(
        request.path,
        request.sampling,
        frame_transform(
            request.augment, request.seed, request.image_size, request.resize, request.interpolation
        ),
        damaged=request.damaged,
        hdr=request.hdr,
        decoder=request.decoder,
        store=_process_store(request.decoder, request.index_dir or default_index_dir()),
    )
    return decoded.frames


def frame_transform(
    augment: str,
    seed: str,
    size: int,
    resize: Resize = "shortest",
    interpolation: Interpolation = "bicubic",
) -> Transform:
    """Return a function that augments a frame of full size and resizes it for the model."""
    change = _full_size_augmentation(augment, seed, size)

    def transform(image: Image.Image) -> np.ndarray:
        return resize_and_crop(image if change is None else change(image), size, resize, interpolation)

    return transform


class SandboxedReader:
    """`read_request` in a process with a time limit, replaced when a file crashes it or takes too long.

    Readers of one thread share the process, since starting one takes as long as decoding many clips.  A
    reader pickles and survives a fork: each worker of a loader then has a process of its own.

    Args:
        limit: seconds that a file may take; None reads in this process and without limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit

    @property
    def sandbox(self) -> Sandbox[FrameRequest, np.ndarray]:
        """The process of this thread for files with this limit."""
        assert self.limit is not None
        sandboxes = _THREAD.__dict__.setdefault("sandboxes", {})
        return sandboxes.setdefault(self.limit, Sandbox(read_request, limit=self.limit))

    def __call__(self, request: FrameRequest) -> np.ndarray:
        """Return the requested frames.

        Raises:
            DecodeError: as `read_request`, or the file crashed the process or took longer than the limit.
        """
        if self.limit is None:
            return read_request(request)
        try:
            return self.sandbox(request)
        except WorkerLost as error:
            raise DecodeError(request.path, f"not decoded: {error}") from error

    def close(self) -> None:
        """End the process; the next file starts another."""
        if self.limit is not None:
            self.sandbox.close()


def write_frames(
    video: str | Path,
    out: str | Path,
    sampling: Sampling,
    *,
    damaged: Damaged = "refuse",
    hdr: Hdr = "refuse",
) -> list[Path]:
    """Write the sampled frames of a video as PNG at the size displayed, and `frames.json` with their times.

    Args:
        out: folder, made if it does not exist.

    Returns: the PNG files in order; a repeated frame is written once for each repeat.

    Raises:
        DecodeError: as `read_frames`.
        OSError: the folder cannot be written.
    """
    decoded = read_frames(video, sampling, damaged=damaged, hdr=hdr)
    chosen = chosen_stream(Path(video))
    if chosen is not None:
        logger.warning("%s: %s", video, chosen)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, (index, seconds) in enumerate(zip(decoded.indices, decoded.seconds, strict=True)):
        name = f"{place:02d}_frame{index:06d}.png"
        Image.fromarray(decoded.images[index]).save(out / name)
        rows.append({"file": name, "index": index, "seconds": round(seconds, 6)})
    height, width, _ = decoded.images[decoded.indices[0]].shape
    record: dict[str, Any] = {
        "video": str(video),
        "count": decoded.count,
        "rate": decoded.rate,
        "width": width,
        "height": height,
        "problem": decoded.problem,
        "frames": rows,
    }
    text = to_json(record, indent=1) + "\n"
    (out / "frames.json").write_text(text, encoding="utf-8")
    return [out / row["file"] for row in rows]


@lru_cache(maxsize=256)
def warn_once(path: str, message: str) -> None:
    """Log a warning about a file once in a process."""
    logger.warning("%s: %s", path, message)


def _decode_known(
    path: Path, index: FrameIndex, indices: list[int], transform: Transform, store: FrameIndexStore | None
) -> Images:
    """Decode frames of a file with PyAV, from keyframes on where that is known to give the same frames."""
    if index.seekable and store is not None:
        try:
            return pyav.decode_frames(path, index, indices, transform)
        except WrongFrames as error:
            warn_once(str(path), f"decoded from its start on each visit: from a keyframe on, {error}")
            store.put(path, replace(index, sequential=True))
    images, again = decode_through(path, transform, frames=set(indices))
    if not images.keys() >= set(indices):
        raise DecodeError(path, f"decoded twice, it gave {index.count} frames and then {again.count}")
    return images


@lru_cache(maxsize=4)
def _process_store(decoder: FileDecoder, index_dir: Path) -> FrameIndexStore:
    """Return the index store of this process, after a check of the decoder.

    Raises:
        ValueError: the decoder cannot be used here.
    """
    if decoder != "pyav" and "torch" not in sys.modules:
        import torch  # by default on all cores, in each of many processes

        torch.set_num_threads(1)
    check_decoder(decoder)
    return FrameIndexStore(index_dir)


def _full_size_augmentation(
    augment: str, seed: str, size: int
) -> Callable[[Image.Image], Image.Image] | None:
    """Return the augmentation of frames of full size, None if there is none."""
    if augment not in ("randaugment", "resized_crop"):
        return None
    # Imported where needed: it imports torch, which a process that only decodes does without.
    from discovla.data.augment import draw_randaugment, draw_resized_crop

    return draw_randaugment(seed) if augment == "randaugment" else draw_resized_crop(seed, size)


def resize_and_crop(
    image: Image.Image,
    size: int,
    resize: Resize = "shortest",
    interpolation: Interpolation = "bicubic",
) -> np.ndarray:
    """Resize the short side of an RGB frame to `size` pixels and cut out the middle square.

    Args:
        resize: "squash" resizes both sides to `size` instead, which changes the aspect and cuts nothing.

    Returns: uint8, y x 3 with y = x = size.

    Source: the released DiscoVLA code, which resizes and crops with torchvision on PIL images; open_clip's
    transforms for "squash" and "bilinear".
    """
    filter = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    if resize == "squash":
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), filter))
    (width, height), (left, top) = resize_geometry(*image.size, size)
    if image.size != (width, height):
        image = image.resize((width, height), filter)
    if (left, top, width, height) != (0, 0, size, size):
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def resize_geometry(width: int, height: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return width and height after the resize, and left and top of the square then cut out."""
    short, long = sorted((width, height))
    stretched = int(size * long / short)
    width, height = (size, stretched) if width <= height else (stretched, size)
    return (width, height), (round((width - size) / 2), round((height - size) / 2))
