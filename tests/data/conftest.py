"""Small H.264 files, encoded when the tests run."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from discovla.data.loader import BatchSpec

STEP = 8  # grey levels between one frame and the next, well above what encoding changes


def grey(i: int, height: int, width: int) -> np.ndarray:
    """Return frame i of a counting clip: one grey level, by which its number is known."""
    return np.full((height, width, 3), (i * STEP) % 256, np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    """Return the numbers of the frames of a counting clip, read from the middle of each."""
    _, height, width, _ = frames.shape
    return [round(float(frame[height // 2, width // 2].mean()) / STEP) for frame in frames]


def movie(
    path: Path,
    count: int = 20,
    *,
    size: tuple[int, int] = (64, 64),
    rate: Fraction | int = 10,
    draw: Callable[[int, int, int], np.ndarray] = grey,
    rotation: int = 0,
) -> Path:
    """Write a clip of frames of (height, width), with B-frames; by default its grey level is its number."""
    height, width = size
    path.parent.mkdir(parents=True, exist_ok=True)
    odd = height % 2 or width % 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "4", "bf": "3", "g": "12"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p" if odd else "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(i, height, width), format="rgb24")))
        container.mux(stream.encode())
    return path


def batch_spec(**changes) -> BatchSpec:
    """Return a specification of batches of two small clips for one process, with changes."""
    fields = {
        "batch_size": 2,
        "rank": 0,
        "world_size": 1,
        "seed": 3,
        "image_size": 16,
        "context_length": 12,
        "frame_captions": False,
    }
    return BatchSpec(**(fields | changes))


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 20 frames at 10 fps."""
    return movie(tmp_path_factory.mktemp("clips") / "counting.mp4")


@pytest.fixture(scope="session")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A damaged clip: its header is whole, its pictures end early."""
    rng = np.random.default_rng(0)

    def noise(_: int, height: int, width: int) -> np.ndarray:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    folder = tmp_path_factory.mktemp("clips")
    whole = folder / "whole.mp4"
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(i, 64, 64), format="rgb24")))
        container.mux(stream.encode())
    path = folder / "cut_off.mp4"
    content = whole.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    return path
