"""Video frames by torchcodec, an optional decoder on the FFmpeg of the system."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from ctypes.util import find_library
from itertools import pairwise
from pathlib import Path
from typing import Any

from av.video.format import VideoFormat
from PIL import Image

from discovla.data.video.errors import WrongFrames
from discovla.data.video.index import FrameIndex
from discovla.data.video.pyav import Images, Transform

# Codecs of which two versions of FFmpeg give different pixels without an error.
_INEXACT_CODECS = {
    "mpeg4": "whose transform versions of FFmpeg round differently",
    "mjpeg": "of whose damaged pictures versions of FFmpeg make different ones without an error",
    "svq1": "whose colours versions of FFmpeg scale differently",
}
# FFmpeg seeks in these by decoding time, torchcodec by presentation time.
_SOUGHT_BY_DECODING_TIME = ("mpegts", "mpeg", "avi")


def missing() -> str | None:
    """Return why torchcodec cannot be used here, None if it can."""
    if importlib.util.find_spec("torchcodec") is None:
        return "torchcodec is not installed: pip install 'discovla[torchcodec]' and FFmpeg"
    try:
        _decoders()
    except (ImportError, OSError, RuntimeError) as error:
        version, torch = (importlib.metadata.version(name) for name in ("torchcodec", "torch"))
        text = str(error).strip() or repr(error)
        if find_library("avcodec") is None or find_library("avformat") is None:
            return (
                f"torchcodec {version} does not load: expected the libraries of FFmpeg (apt-get install "
                f"ffmpeg), found none: {text.splitlines()[0]}"
            )
        return (
            f"torchcodec {version} does not load beside torch {torch}, although FFmpeg is installed; the "
            f"extra discovla[torchcodec] pins the version that does: {text.splitlines()[0]}"
        )
    return None


def unfit(index: FrameIndex) -> str | None:
    """Return why torchcodec would give other frames or pixels of a file than PyAV, None if it would not."""
    if index.hdr is not None:
        return f"it is HDR ({index.hdr}), which torchcodec does not map to SDR"
    if not index.seekable:
        return "it is damaged, changes its size or has frames without ascending times"
    if index.codec in _INEXACT_CODECS:
        return f"its codec is {index.codec}, {_INEXACT_CODECS[index.codec]}"
    if index.interlaced:
        return "its frames are interlaced, whose colours torchcodec places elsewhere"
    pixels = VideoFormat(index.pixel_format)
    bits = max(part.bits for part in pixels.components)
    if bits > 8:
        return f"it has {bits} bits a colour, which torchcodec rounds differently"
    width, height = index.size
    if pixels.chroma_width(2) == 1 and (width % 2 or height % 2):
        return f"its size {width}x{height} is odd, where torchcodec places colours elsewhere"
    if not index.keyframes or index.keyframes[0][0] != 0:
        return "its first frame is not a keyframe"
    if index.container in _SOUGHT_BY_DECODING_TIME and any(
        index.times[frame] != time for frame, time in index.keyframes
    ):
        return f"its frames are reordered, which torchcodec does not find in {index.container} files"
    return None


def decode_frames(path: Path, index: FrameIndex, frames: Sequence[int], transform: Transform) -> Images:
    """Decode single frames of a file; torchcodec seeks by our index instead of one of its own.

    Raises:
        WrongFrames: torchcodec does not give the frames of the index.
    """
    reason = unfit(index)
    if reason is not None:
        raise WrongFrames(reason)
    images: Images = {}
    # Without a duration in the header torchcodec needs an index of its own.
    mappings = None if index.header_seconds is None else _frame_mappings(index)
    try:
        decoder = _decoders().VideoDecoder(
            str(path.absolute()),
            stream_index=index.stream_index,
            dimension_order="NHWC",
            custom_frame_mappings=mappings,
        )
        if mappings is None and len(decoder) != index.count:
            raise WrongFrames(f"torchcodec counts {len(decoder)} frames, {index.count} decode")
        for number in sorted(set(frames)):
            frame = decoder.get_frame_at(number)
            seconds = index.seconds(number)
            if abs(frame.pts_seconds - seconds) > 1e-4:
                raise WrongFrames(
                    f"torchcodec has frame {number} at {frame.pts_seconds:.4f} s, not at {seconds:.4f}"
                )
            pixels = frame.data.numpy()
            images[number] = pixels if transform is None else transform(Image.fromarray(pixels))
    except (RuntimeError, ValueError, IndexError) as error:
        raise WrongFrames(f"torchcodec: {str(error).strip().splitlines()[0]}") from error
    return images


def _frame_mappings(index: FrameIndex) -> str:
    """Return the frames of an index in the form that torchcodec reads."""
    starts = {frame for frame, _ in index.keyframes}
    times = [time for time in index.times if time is not None]
    durations = [after - time for time, after in pairwise(times)]
    durations.append(durations[-1] if durations else 1)
    rows = [
        {"pts": time, "duration": duration, "key_frame": int(frame in starts)}
        for frame, (time, duration) in enumerate(zip(times, durations, strict=True))
    ]
    return json.dumps({"frames": rows})


def _decoders() -> Any:
    """Return torchcodec's module of decoders, whose import loads the libraries of FFmpeg."""
    return importlib.import_module("torchcodec.decoders")
