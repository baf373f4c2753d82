"""What is known of the frames of a file that was decoded to its end: how many, when, where to enter it."""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from discovla.data.cache import FrameCache

_VERSION = "frame table 3"
_KEPT = 32 << 20  # bytes of tables that a process keeps, of about 10,000 clips of 15 s

Colour = tuple[float, float, float]

_QUARTER_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, kw_only=True)
class FrameTable:
    """The frames that decode, in the order in which they are shown.

    count: how many.  rate: average frames per second of the stream.  header_count: frames the header
    promises, 0 where it says nothing.  size: width and height as displayed.  problem: what ended the decoding
    early, or None.  stream: index in the file.  tick: seconds of a unit of time, numerator and denominator.
    times: of each frame in ticks, None where the file has none.  keys: frames after which nothing depends on
    what came before, each with the time of decoding to seek.  codec, pixels: the stream's codec and pixel
    format.  packets: that hold something.  turned: whether frames are shown turned.  steady: whether size and
    format are those of the first frame throughout.  sums, means: checksums and mean colours of some frames.
    sequential: whether other frames came where the file was entered at a key frame.
    """

    count: int
    rate: float | None
    header_count: int
    size: tuple[int, int]
    problem: str | None
    stream: int
    tick: tuple[int, int]
    times: tuple[int | None, ...]
    keys: tuple[tuple[int, int], ...]
    codec: str
    pixels: str
    packets: int
    turned: bool
    steady: bool
    sums: dict[int, int]
    means: dict[int, Colour]
    sequential: bool = False

    @property
    def ordered(self) -> bool:
        """Whether the file can be entered and its frames told by their times: it is whole, they ascend."""
        known = [time for time in self.times if time is not None]
        ascending = all(a < b for a, b in pairwise(known))
        whole = self.problem is None and self.steady and not self.sequential
        return whole and len(known) == self.count and ascending

    def key_of(self, index: int) -> int:
        """The place in `keys` of the last one at or before a frame, -1 where there is none."""
        return bisect_right(self.keys, (index, np.inf)) - 1

    def seconds(self, index: int) -> float:
        """The time of a frame, where the file gives it, and otherwise as by its rate."""
        time = self.times[index]
        if time is None or self.tick[0] == 0:
            return index / self.rate if self.rate else 0.0
        return float(time * Fraction(*self.tick))

    def nothing(self) -> str:
        """Why there is no frame."""
        return f"no frame decodes: {self.problem or 'the video stream is empty'}"

    def broken(self) -> str:
        """Where the decoding ended."""
        promised = f" of the {self.header_count} its header promises" if self.header_count else ""
        return f"damaged: {self.count} frames decode{promised}, then {self.problem}"


@dataclass(kw_only=True)
class DraftTable:
    """A table that grows while a file is decoded."""

    rate: float | None
    header_count: int
    stream: int
    tick: tuple[int, int]
    codec: str
    packets: int = 0
    turned: bool = False
    count: int = 0
    size: tuple[int, int] = (0, 0)
    problem: str | None = None
    pixels: str = ""
    steady: bool = True
    times: list[int | None] = field(default_factory=list)
    sums: dict[int, int] = field(default_factory=dict)
    means: dict[int, Colour] = field(default_factory=dict)
    entries: list[tuple[int, int]] = field(default_factory=list)  # times of showing and decoding
    intra: set[int | None] = field(default_factory=set)  # times of showing

    @staticmethod
    def of(stream: VideoStream) -> DraftTable:
        """What the header of a stream says."""
        tick = stream.time_base or Fraction(0)
        return DraftTable(
            rate=float(stream.average_rate or 0) or None,
            header_count=stream.frames,
            stream=stream.index,
            tick=(tick.numerator, tick.denominator),
            codec=stream.codec.canonical_name,
        )

    def saw_packet(self, packet: Packet) -> None:
        """Count a packet, and note where the file can be entered."""
        self.packets += packet.size > 0
        if packet.is_keyframe and packet.size and packet.pts is not None and packet.dts is not None:
            self.entries.append((packet.pts, packet.dts))

    def saw_frame(self, frame: VideoFrame) -> int:
        """Count a frame and give its index."""
        self.turned |= _turn(frame) != 0
        if self.count == 0:
            self.size, self.pixels = displayed_size(frame), frame.format.name
        elif self.steady:
            self.steady = (self.size, self.pixels) == (displayed_size(frame), frame.format.name)
        # The pictures from which a refresh begins are marked as key frames too, but build on earlier ones.
        if frame.key_frame and frame.pict_type == PictureType.I:
            self.intra.add(frame.pts)
        self.times.append(frame.pts)
        self.count += 1
        return self.count - 1

    def saw_image(self, image: Image.Image) -> None:
        """Note what tells the last frame from another."""
        red, green, blue = np.asarray(image).mean((0, 1)).round(2).tolist()
        self.sums[self.count - 1], self.means[self.count - 1] = checksum(image), (red, green, blue)

    def table(self) -> FrameTable:
        """The table of what was decoded."""
        index_of = {time: index for index, time in enumerate(self.times)}
        entered = (entry for entry in self.entries if entry[0] in self.intra)
        keys = sorted((index_of[shown], decoded) for shown, decoded in entered)
        return FrameTable(
            count=self.count,
            rate=self.rate,
            header_count=self.header_count,
            size=self.size,
            problem=self.problem,
            stream=self.stream,
            tick=self.tick,
            times=tuple(self.times),
            keys=tuple(keys),
            codec=self.codec,
            pixels=self.pixels,
            packets=self.packets,
            turned=self.turned,
            steady=self.steady,
            sums=dict(self.sums),
            means=dict(self.means),
        )


class FrameTables:
    """Tables of files, in memory for a bounded number of frames and on disk where there is a cache.

    A table is known by the file's path, size and time of change: that of a changed file is never met again.
    """

    def __init__(self, cache: FrameCache | None = None) -> None:
        self._cache = cache
        self._kept: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._bytes = 0

    def get(self, path: Path) -> FrameTable | None:
        """The table of a file, or None where it is not known."""
        name = _name(path)
        content = self._kept.get(name)
        if content is not None:
            self._kept.move_to_end(name)
        elif self._cache is not None:
            found = self._cache.get(self._cache.key(path, _VERSION))
            if found is not None:
                content = found.tobytes()
                self._keep(name, content)
        return None if content is None else unpacked(content)

    def put(self, path: Path, table: FrameTable) -> None:
        """Keep a table in place of an earlier one."""
        content = packed(table)
        self._keep(_name(path), content)
        if self._cache is not None:
            column = np.frombuffer(content, np.uint8).reshape(1, -1, 1, 1)
            self._cache.put(self._cache.key(path, _VERSION), column)

    def _keep(self, name: tuple[str, int, int], content: bytes) -> None:
        self._bytes += len(content) - len(self._kept.pop(name, b""))
        self._kept[name] = content
        while self._bytes > _KEPT:
            self._bytes -= len(self._kept.popitem(last=False)[1])


def packed(table: FrameTable) -> bytes:
    """A table as bytes."""
    return json.dumps(asdict(table), separators=(",", ":")).encode()


def unpacked(content: bytes) -> FrameTable:
    """The table in bytes."""
    fields = json.loads(content)
    pairs: dict[str, Any] = {"keys": tuple((index, time) for index, time in fields["keys"])}
    for name in ("size", "tick", "times"):
        pairs[name] = tuple(fields[name])
    pairs["sums"] = {int(i): each for i, each in fields["sums"].items()}
    pairs["means"] = {int(i): tuple(each) for i, each in fields["means"].items()}
    return FrameTable(**(fields | pairs))


def checksum(image: Image.Image) -> int:
    """A checksum of every eighth row: what is lost of a picture is lost by blocks of at least eight."""
    return zlib.crc32(np.asarray(image)[::8].tobytes())


def displayed_size(frame: VideoFrame) -> tuple[int, int]:
    """Width and height of a frame after it is turned."""
    return (frame.height, frame.width) if _turn(frame) % 180 else (frame.width, frame.height)


def displayed(frame: VideoFrame, size: tuple[int, int]) -> Image.Image:
    """A frame in RGB as displayed, at the size of the first frame where the stream changes size."""
    image = frame.to_image()
    turn = _turn(frame)
    if turn:
        image = image.transpose(_QUARTER_TURNS[turn])
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _turn(frame: VideoFrame) -> int:
    """Degrees to turn a frame counterclockwise, a whole number of quarter turns."""
    return round(frame.rotation / 90) * 90 % 360


def _name(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns
