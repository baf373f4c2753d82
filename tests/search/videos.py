"""Make small videos of plain scenes."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

Scene = tuple[str, float]  # kind and seconds
RATE = 10


def write_video(path: Path, scenes: Sequence[Scene], *, rate: int = RATE, seed: int = 0) -> Path:
    """Write an H.264 video whose scenes each have one pattern; different kinds have different colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for kind, seconds in scenes:
            rng = np.random.default_rng((seed, sum(kind.encode())))
            picture = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            for number in range(round(seconds * rate)):
                image = picture.copy()
                image[8:16, number % 88 : number % 88 + 8] = 255  # something moves
                for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                    container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path
