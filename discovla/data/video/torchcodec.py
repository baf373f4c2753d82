"""Frames by torchcodec, which brings its own reading of files on the FFmpeg of the system."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from av.video.format import VideoFormat
from PIL import Image

from discovla.data.video.index import FrameIndex

TOLERANCE = 2  # levels: equal but for MPEG-4 part 2, whose transform FFmpeg's versions round differently
_ROUNDED = ("mpeg4",)


class Unfit(Exception):
    """A file that a decoder cannot read exactly, or a decoder that is not there."""


def missing() -> str | None:
    """Why torchcodec cannot be used here, or None."""
    if importlib.util.find_spec("torchcodec") is None:
        return "torchcodec is not installed: pip install 'discovla[torchcodec]'"
    try:
        _decoders()  # loads its libraries, which need those of FFmpeg
    except (ImportError, OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        return f"torchcodec does not load: it needs the system's FFmpeg (apt-get install ffmpeg): {first}"
    return None


def unfit(table: FrameIndex) -> str | None:
    """Why torchcodec would give other frames or other pixels than are wanted, or None."""
    if not table.ordered:
        return "it breaks off, changes its size or has frames without ascending times"
    pixels = VideoFormat(table.pixels)
    bits = max(part.bits for part in pixels.components)
    if bits > 8:
        return f"it has {bits} bits a colour, which torchcodec rounds differently"
    if pixels.chroma_width(2) == 1 and (table.size[0] % 2 or table.size[1] % 2):
        width, height = table.size
        return f"its size {width}x{height} is odd, where torchcodec places colours differently"
    return None


def read_torchcodec(
    path: Path, table: FrameIndex, indices: Sequence[int], each: Callable[[Image.Image], np.ndarray]
) -> dict[int, np.ndarray]:
    """Frames of a file by torchcodec, checked by number, time and checksum against its table.

    What versions of FFmpeg make of broken pictures differs: only the checksums tell.

    Args:
        path, table, indices, each: as of `read_entering`.

    Raises:
        Unfit: torchcodec does not give the frames of the table.
    """
    reason = unfit(table)
    if reason is not None:
        raise Unfit(reason)
    images: dict[int, np.ndarray] = {}
    try:
        decoder = _decoders().VideoDecoder(
            str(path.absolute()), stream_index=table.stream, dimension_order="NHWC"
        )
        if len(decoder) != table.count:
            raise Unfit(f"torchcodec counts {len(decoder)} frames, {table.count} decode")
        for index in sorted(set(indices)):
            frame = decoder.get_frame_at(index)
            seconds = table.seconds(index)
            if abs(frame.pts_seconds - seconds) > 1e-4:
                raise Unfit(
                    f"torchcodec has frame {index} at {frame.pts_seconds:.4f} s, not at {seconds:.4f}"
                )
            image = Image.fromarray(frame.data.numpy())
            if table.differs(index, image, TOLERANCE if table.codec in _ROUNDED else 0):
                raise Unfit(f"torchcodec has another frame {index}")
            images[index] = each(image)
    except (RuntimeError, ValueError, IndexError) as error:
        raise Unfit(f"torchcodec: {str(error).strip().splitlines()[0]}") from error
    return images


def _decoders() -> Any:
    """torchcodec's module of decoders."""
    return importlib.import_module("torchcodec.decoders")
