"""What one video file is and gives, told by the process that opens it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from av.error import FFmpegError
from PIL import Image

from discovla.data.cache import FrameCache
from discovla.data.sampling import Sampling
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import Damaged, Decoder
from discovla.data.video.index import FrameIndex, FrameIndexStore
from discovla.data.video.pyav import open_video

VARIABLE = 1.5  # a gap between frames longer than the shortest by this factor makes the rate variable


@dataclass(frozen=True, kw_only=True)
class Request:
    """A file and what is taken from it.

    samplings: of the clips that are parts of it.  damaged: as of `decode`.  cache: folder in which its table
    is left, so that a run with this cache need not count its frames.
    """

    path: Path
    samplings: tuple[Sampling, ...]
    damaged: Damaged = "refuse"
    cache: Path | None = None


def examine(request: Request) -> dict[str, Any]:
    """Decode all of a file, and what each of its clips samples, as training does.

    Returns: values that JSON can hold.  kind: `ok` decodes to its end, `damaged` breaks off, `refused` gives
    no frame; reason: why.  clips: for each sampling why it gives no frames, or None.  codec, pixels: names.
    width, height: as displayed; coded_width, coded_height: as stored.  rotation: degrees.  aspect: of a
    pixel.  streams: of video.  declared_rate, declared_duration, declared_count: as the header says; rate,
    duration, count: by the frames that decode.  gaps: least and greatest seconds between two frames.  keys:
    where the file can be entered.  unusual: what is odd about it, in words.
    """
    decoder = Decoder("pyav")
    reasons = [_reason(decoder, request, sampling) for sampling in request.samplings]
    try:
        table = decoder.tables.get(request.path)
    except OSError:
        table = None  # there is no such file
    if table is None:
        return {
            "kind": "refused",
            "reason": next(filter(None, reasons), "it does not open"),
            "clips": reasons,
        }
    if request.cache is not None:
        _kept(request.cache).put(request.path, table)
    kind, reason = "ok", ""
    if table.count == 0:
        kind, reason = "refused", table.nothing()
    elif table.problem is not None:
        kind, reason = "damaged", table.broken()
    found = {"kind": kind, "reason": reason, "clips": reasons, **_header(request.path), **_frames(table)}
    return found | {"unusual": _oddities(found) if table.count else []}


@lru_cache(maxsize=1)
def _kept(cache: Path) -> FrameIndexStore:
    """The tables of a cache."""
    return FrameIndexStore(FrameCache(cache, ".table"))


def _oddities(found: Mapping[str, Any]) -> list[str]:
    """What is unusual about a file that gives frames."""
    low, high = found["gaps"] or (0.0, 0.0)
    rate, declared = found["rate"], found["declared_rate"]
    odd = {
        "variable rate": high > VARIABLE * low > 0,
        "declares another rate": bool(rate and declared and abs(rate / declared - 1) > 0.02),
        "declares another number of frames": found["declared_count"] not in (0, found["count"]),
        "turned": bool(found["rotation"]),
        "pixels not square": found["aspect"] not in (None, "1"),
        "several video streams": found["streams"] > 1,
        "size or format changes": not found["steady"],
        "times do not ascend": not found["ordered"],
        "one frame": found["count"] == 1,
    }
    return [name for name, is_so in odd.items() if is_so]


def _reason(decoder: Decoder, request: Request, sampling: Sampling) -> str | None:
    """Why a clip gives no frames, None where it does."""
    try:
        decoder.read(request.path, sampling, _seen, damaged=request.damaged)
    except DecodeError as error:
        return error.reason
    return None


def _seen(image: Image.Image) -> np.ndarray:
    """Nothing of a frame that was decoded and turned into RGB."""
    return np.zeros((1, 1, len(image.getbands())), np.uint8)


def _header(path: Path) -> dict[str, Any]:
    """What the header says, and the rotation of the first frame."""
    with open_video(path) as (container, stream):
        context = stream.codec_context
        aspect = context.sample_aspect_ratio
        length = stream.duration * stream.time_base if stream.duration and stream.time_base else None
        if length is None and container.duration:
            length = container.duration / 1_000_000
        found: dict[str, Any] = {
            "container": container.format.name,
            "codec": context.codec.canonical_name,
            "coded_width": context.width,
            "coded_height": context.height,
            "aspect": None if not aspect else str(aspect),
            "streams": len(container.streams.video),
            "declared_rate": _rounded(stream.average_rate),
            "declared_duration": _rounded(length),
            "rotation": 0,
        }
        with suppress(FFmpegError, StopIteration):  # no frame: the table says so
            found["rotation"] = next(frame.rotation for frame in container.decode(stream))
    return found


def _frames(table: FrameIndex) -> dict[str, Any]:
    """What the frames that decode say."""
    seconds = sorted(table.seconds(i) for i, time in enumerate(table.times) if time is not None)
    gaps = [after - before for before, after in pairwise(seconds)]
    span = seconds[-1] - seconds[0] if gaps else 0.0
    return {
        "width": table.size[0],
        "height": table.size[1],
        "pixels": table.pixels,
        "rate": _rounded(len(gaps) / span) if span else None,
        "duration": _rounded(span * (1 + 1 / len(gaps))) if span else None,
        "gaps": [round(min(gaps), 6), round(max(gaps), 6)] if gaps else None,
        "declared_count": table.header_count,
        "count": table.count,
        "keys": len(table.keys),
        "steady": table.steady,
        "ordered": table.ordered,
    }


def _rounded(value: Any) -> float | None:
    """A number to six digits behind the point, None where there is none."""
    return None if not value else round(float(value), 6)
