"""Frames of a file whose table is known, without decoding what nothing asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from discovla.data.video.opening import opened, words
from discovla.data.video.tables import FrameTable, displayed


class Astray(Exception):
    """A file which, entered at its key frames, does not give the frames of its table."""


def read_entering(
    path: Path, table: FrameTable, indices: Sequence[int], each: Callable[[Image.Image], np.ndarray]
) -> dict[int, np.ndarray]:
    """Frames from the last key frame before each on, leaving out those which no other frame needs.

    How far apart the key frames are decides how much is decoded: with one in the file all up to the last
    frame wanted but the pictures no other refers to, with many the way from a key frame to each frame.

    Args:
        path, table: a file and the table of it, whose times are `ordered`.
        indices: of frames, each < table.count.
        each: as of `decode_each`.

    Raises:
        Astray: a frame does not come, or not as it was when the table was made.
        DecodeError: the file no longer opens.
    """
    images: dict[int, np.ndarray] = {}
    wanted = sorted(set(indices))
    with opened(path) as (container, stream):
        for key, group in groupby(wanted, table.key_of):
            for index, frame in _found(container, stream, table, key, list(group)):
                image = displayed(frame, table.size)
                if table.differs(index, image):
                    raise Astray(f"frame {index} is not the one it was")
                images[index] = each(image)
    return images


def _found(
    container: InputContainer, stream: VideoStream, table: FrameTable, key: int, indices: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """The frames of these indices, all after the same key frame, in any order."""
    index_of = {table.times[index]: index for index in indices}
    # Some formats seek the time at which a key frame is shown, others that at which it is decoded.
    shown, decoded = (None, None) if key < 0 else (table.times[table.keys[key][0]], table.keys[key][1])
    for time in (shown, decoded):
        try:
            if time is not None:
                container.seek(time, stream=stream, backward=True)
            for frame in _entered(container, stream, set(index_of)):
                yield index_of.pop(frame.pts), frame
        except FFmpegError as error:
            raise Astray(words(error)) from error
        if not index_of:
            return
    raise Astray(f"frame {min(index_of.values())} does not come")


def _entered(container: InputContainer, stream: VideoStream, times: set[int | None]) -> Iterator[VideoFrame]:
    """The frames of these times, from where the file stands to where the last of them is decoded."""
    unsent = set(times)
    for packet in container.demux(stream):
        if packet.size:
            unsent.discard(packet.pts)
            # Pictures that no other refers to are left out, those wanted excepted.
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
        frames = stream.decode(packet)
        if packet.size and not unsent:
            frames += stream.decode(None)  # what the decoder holds back; seeking wakes it again
        yield from (frame for frame in frames if frame.pts in times)
        if not unsent:
            return
