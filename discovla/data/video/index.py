"""Index of the frames of a video file: number, times and keyframes, built by decoding the file once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame

from discovla.data.video.hdr import hdr_name
from discovla.files import write_file

logger = logging.getLogger(__name__)

VERSION = 7  # of the fields of `FrameIndex` and of the rules by which it is built
_MEMORY = 64 << 20  # bytes of indices that a process keeps, enough for about 20,000 clips of 15 s
_MAGIC = b"dvindex1"
_HEADER = struct.Struct("<8sII")  # magic, CRC-32 of the rest, length of the JSON; the times follow
_NO_TIME = np.iinfo(np.int64).min


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """The frames of a file that decode, in presentation order.

    count: number of frames that decode.
    times: presentation time of each frame in units of `time_base`, None where the file gives none.
    keyframes: frames at which decoding can start, each as (frame, decoding time in units of `time_base`).
    time_base: seconds of one unit of time, as (numerator, denominator).
    header_rate: average frames per second in the header, None where it has none.
    header_count: number of frames in the header, 0 where it has none.
    header_seconds: duration in the header, None where it has none.
    stream_index: index of the video stream in the file.
    container, codec, pixel_format: FFmpeg's names.
    size: width and height as displayed.
    rotation: degrees counterclockwise by which frames are turned for display.
    packets: number of packets that are not empty.
    uniform: True if all frames have the size, pixel format and rotation of the first.
    interlaced: True if a frame is interlaced.
    hdr: "PQ" or "HLG" if the frames have this transfer function of HDR, None for SDR.
    problem: the error that ended decoding early, None if the file decodes to its end.
    faults: number of errors that the decoder reported but decoded past, as in a damaged file.
    sequential: True if seeking to a keyframe gave other frames than the index has.
    """

    count: int
    times: tuple[int | None, ...]
    keyframes: tuple[tuple[int, int], ...]
    time_base: tuple[int, int]
    header_rate: float | None
    header_count: int
    header_seconds: float | None
    stream_index: int
    container: str
    codec: str
    pixel_format: str
    size: tuple[int, int]
    rotation: int
    packets: int
    uniform: bool
    interlaced: bool
    hdr: str | None
    problem: str | None
    faults: int
    sequential: bool = False

    @cached_property
    def ascending(self) -> bool:
        """True if every frame has a time and the times ascend."""
        known = [time for time in self.times if time is not None]
        return len(known) == self.count and all(a < b for a, b in pairwise(known))

    @cached_property
    def seekable(self) -> bool:
        """True if frames decoded from a keyframe on are known to be those decoded from the start.

        What a decoder makes of damaged data depends on the frames decoded before.
        """
        undamaged = self.problem is None and self.faults == 0
        return undamaged and self.uniform and self.ascending and not self.sequential

    @property
    def rate(self) -> float | None:
        """Average frames per second: of the header, else by the times of the frames; None if unknown."""
        if self.header_rate is not None:
            return self.header_rate
        known = sorted(time for time in self.times if time is not None)
        if len(known) < 2 or known[0] == known[-1] or self.time_base[0] == 0:
            return None
        return float((len(known) - 1) / ((known[-1] - known[0]) * Fraction(*self.time_base)))

    def seconds(self, frame: int) -> float:
        """Return the presentation time of a frame in seconds, by the rate where the file gives no time."""
        time = self.times[frame]
        if time is None or self.time_base[0] == 0:
            return frame / self.rate if self.rate else 0.0
        return float(time * Fraction(*self.time_base))

    def keyframe_before(self, frame: int) -> int:
        """Return the position in `keyframes` of the last one at or before a frame, -1 if there is none."""
        return bisect_right(self.keyframes, (frame, np.inf)) - 1

    def fault(self) -> str:
        """Return why the file gives no frames or only its first ones, "" if it decodes to its end."""
        if self.count == 0:
            return f"no frame decodes: {self.problem or 'the video stream is empty'}"
        if self.problem is None:
            return ""
        promised = f" of the {self.header_count} its header promises" if self.header_count else ""
        return f"damaged: {self.count} frames decode{promised}, then {self.problem}"


@dataclass(kw_only=True)
class FrameIndexBuilder:
    """Collects the packets and frames of a file while it is decoded; the fields are those of `FrameIndex`."""

    time_base: tuple[int, int]
    header_rate: float | None
    header_count: int
    header_seconds: float | None
    stream_index: int
    container: str
    codec: str
    count: int = 0
    packets: int = 0
    faults: int = 0
    problem: str | None = None
    size: tuple[int, int] = (0, 0)
    uniform: bool = True
    interlaced: bool = False
    hdr: str | None = None
    times: list[int | None] = field(default_factory=list)
    _format: tuple[int, int, str, int] = (0, 0, "", 0)  # of the first frame
    _starts: list[tuple[int, int]] = field(
        default_factory=list
    )  # keyframe packets: times of display, decoding
    _intra: set[int] = field(default_factory=set)  # display times of frames that refer to no earlier one

    def add_packet(self, packet: Packet) -> None:
        """Count a packet and note the times of a keyframe."""
        if not packet.size:
            return
        self.packets += 1
        if packet.is_keyframe and packet.pts is not None:
            self._starts.append((packet.pts, packet.pts if packet.dts is None else packet.dts))

    def add_frame(self, frame: VideoFrame) -> int:
        """Add the next frame in presentation order and return its number."""
        shape = (frame.width, frame.height, frame.format.name, quarter_turns(frame))
        if self.count == 0:
            self._format = shape
            self.size = displayed_size(frame)
            self.hdr = hdr_name(frame.color_trc)
        elif shape != self._format:
            self.uniform = False
        if frame.interlaced_frame:
            self.interlaced = True
        if frame.is_corrupt:
            self.faults += 1
        # The first picture of a gradual refresh is marked as a keyframe too but refers to earlier ones.
        if frame.key_frame and frame.pts is not None and frame.pict_type == PictureType.I:
            self._intra.add(frame.pts)
        self.times.append(frame.pts)
        self.count += 1
        return self.count - 1

    def build(self) -> FrameIndex:
        """Return the index of all that was added."""
        frame_at = {time: frame for frame, time in enumerate(self.times)}
        _, _, pixel_format, turns = self._format
        public: dict[str, Any] = {k: value for k, value in vars(self).items() if not k.startswith("_")}
        public["times"] = tuple(self.times)
        return FrameIndex(
            **public,
            keyframes=tuple(sorted((frame_at[pts], dts) for pts, dts in self._starts if pts in self._intra)),
            pixel_format=pixel_format,
            rotation=turns,
        )


class FrameIndexStore:
    """Frame indices by file: in memory up to a number of bytes, and in a folder where one is given.

    The key of an index is the path, size and modification time of its file and the version of the format,
    so that a file that has changed is indexed again.  Files are written whole or not at all; one that is
    damaged is ignored and written again.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._packed: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def get(self, video: Path) -> FrameIndex | None:
        """Return the index of a file, None if it has not been indexed."""
        key = _key(video)
        content = self._packed.get(key)
        if content is not None:
            self._packed.move_to_end(key)
            return unpack_index(content)
        if self.folder is None:
            return None
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        index = unpack_index(content)
        if index is None:
            logger.warning("%s: damaged frame index; %s is indexed again", path, video)
        else:
            self._keep(key, content)
        return index

    def put(self, video: Path, index: FrameIndex) -> None:
        """Keep the index of a file in place of an earlier one.

        A folder that cannot be written is one warning: the index then stays in memory only.
        """
        key, content = _key(video), pack_index(index)
        self._keep(key, content)
        if self.folder is None:
            return
        path = self._path(key)
        try:
            write_file(path, content)
        except OSError as error:
            _warn_unwritable(str(self.folder), error.strerror or str(error))

    def _keep(self, key: str, content: bytes) -> None:
        self._bytes += len(content) - len(self._packed.pop(key, b""))
        self._packed[key] = content
        while self._bytes > _MEMORY:
            self._bytes -= len(self._packed.popitem(last=False)[1])

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.index"


def default_index_dir() -> Path:
    """Return the folder of frame indices where none is configured: of the user, below `$XDG_CACHE_HOME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "discovla" / "frame_index"


def pack_index(index: FrameIndex) -> bytes:
    """Return an index as bytes."""
    values = {name: getattr(index, name) for name in index.__dataclass_fields__ if name != "times"}
    text = json.dumps(values, separators=(",", ":")).encode()
    times = np.array([_NO_TIME if time is None else time for time in index.times], "<i8").tobytes()
    return _HEADER.pack(_MAGIC, zlib.crc32(text + times), len(text)) + text + times


def unpack_index(content: bytes) -> FrameIndex | None:
    """Return the index packed in bytes, None if they are damaged."""
    if len(content) < _HEADER.size:
        return None
    magic, checksum, length = _HEADER.unpack_from(content)
    body = content[_HEADER.size :]
    if magic != _MAGIC or zlib.crc32(body) != checksum:
        return None
    values: dict[str, Any] = json.loads(body[:length])
    times = np.frombuffer(body, "<i8", offset=length).tolist()
    values["times"] = tuple(None if time == _NO_TIME else time for time in times)
    values["keyframes"] = tuple((frame, time) for frame, time in values["keyframes"])
    for name in ("time_base", "size"):
        values[name] = tuple(values[name])
    return FrameIndex(**values)


def quarter_turns(frame: VideoFrame) -> int:
    """Return the degrees by which a frame is turned counterclockwise: 0, 90, 180 or 270."""
    return round(frame.rotation / 90) * 90 % 360


def displayed_size(frame: VideoFrame) -> tuple[int, int]:
    """Return width and height of a frame once it is turned."""
    return (frame.height, frame.width) if quarter_turns(frame) % 180 else (frame.width, frame.height)


def _key(video: Path) -> str:
    stat = video.stat()
    text = f"{video}\n{stat.st_size}\n{stat.st_mtime_ns}\n{VERSION}"
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


@lru_cache(maxsize=16)
def _warn_unwritable(folder: str, reason: str) -> None:
    """Warn once per process, folder and reason."""
    logger.warning(
        "data.index_dir: %s cannot be written (%s): each process decodes each file once more", folder, reason
    )
