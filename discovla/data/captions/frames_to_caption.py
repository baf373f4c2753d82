"""The sampled frames of a clip as a captioner sees them, told by the process that decodes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.video.frames import Damaged, read_frames


@dataclass(frozen=True, kw_only=True)
class FrameRequest:
    """Which frames of which file; side: pixels of the longer side, to which larger frames are reduced."""

    path: Path
    sampling: Sampling
    side: int
    damaged: Damaged = "refuse"


@dataclass(frozen=True, kw_only=True)
class HashedFrames:
    """hashes: of each sampled frame, in order.  images: each different one, uint8 RGB y x 3."""

    hashes: tuple[str, ...]
    images: dict[str, np.ndarray]


def hashed_frames(request: FrameRequest) -> HashedFrames:
    """Decode and hash the frames of a clip.

    Raises:
        DecodeError: the clip gives none.
    """

    def each(image: Image.Image) -> np.ndarray:
        scale = request.side / max(image.size)
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(image)

    decoded = read_frames(request.path, request.sampling, each, damaged=request.damaged)
    by_index = {index: frame_hash(decoded.images[index]) for index in set(decoded.indices)}
    return HashedFrames(
        hashes=tuple(by_index[index] for index in decoded.indices),
        images={digest: decoded.images[index] for index, digest in by_index.items()},
    )


def frame_hash(image: np.ndarray) -> str:
    """What tells a picture from all others: size and pixels."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()[:32]
