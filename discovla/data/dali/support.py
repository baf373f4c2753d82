"""What NVIDIA DALI can read, and what its graphs are made for.

On a CPU DALI decodes VP8, VP9 and MJPEG, on a GPU H.264, HEVC, MPEG-4 and AV1 too, and JPEG on both.  Which
frames, their order and their augmentation come from outside its graphs, so that there is nothing in them to
save: a run that is taken up again feeds them the same.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from discovla.data.video.index import FrameIndex

CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "mpeg4", "av1"}
# Mean of the differences, in levels.  DALI interpolates the colours of 4:2:0 video where FFmpeg repeats them,
# which shows at edges between colours; resizing alone differs by up to 2 levels.
TOLERANCE_MEAN = 3.0
OTHER_COLOUR = 16.0  # levels by which the mean colour of a frame differs where it is another picture

Content = Literal["video", "jpeg", "raw"]
FullSize = Literal["none", "resized_crop", "randaugment"]


@dataclass(frozen=True, kw_only=True)
class DaliSettings:
    """What a graph is made for.

    content: what it decodes.  frames: the most of a clip.  image_size: pixels of a side.  sized: whether
    frames already have that size.  augment: what is done to frames of full size.  device: number of the GPU,
    None for a CPU.  threads: of the CPU.  limit: seconds that a batch may take.
    """

    content: Content = "video"
    frames: int
    image_size: int
    sized: bool = False
    augment: FullSize = "none"
    device: int | None = None
    threads: int = 2
    limit: float = 300.0


def missing() -> str | None:
    """Why DALI cannot be used here, or None."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "DALI is not installed: pip install 'discovla[dali]'"
    return None


def unfit(table: FrameIndex, *, cuda: bool) -> str | None:
    """Why DALI would give other frames than are wanted, or None."""
    codecs = GPU_CODECS if cuda else CPU_CODECS
    if table.codec not in codecs:
        where = "the GPU" if cuda else "a CPU"
        return f"its codec is {table.codec}, DALI decodes {', '.join(sorted(codecs))} on {where}"
    if not table.seekable:
        return "it is damaged, changes its size or has frames without ascending times"
    if table.rotation:
        return "its frames are shown turned, which DALI does not do"
    if table.packets != table.count:
        return f"it has {table.packets} packets, which DALI takes for frames, and {table.count} frames decode"
    if table.stream_index:
        return f"its best video stream is number {table.stream_index} of the file, DALI takes the first"
    if "10" in table.pixel_format or "12" in table.pixel_format:
        return f"its pixels are {table.pixel_format}, DALI's are of 8 bits"
    return None
