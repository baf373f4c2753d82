"""What is known of the frames of a file that was decoded to its end: how many, when, where to enter it."""

from __future__ import annotations

import json
import math
import struct
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
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
from discovla.data.video.fingerprints import UNKNOWN, Colour, Fingerprint, Fingerprints, fingerprint, spread

_VERSION = "frame table 5"
_KEPT = 64 << 20  # bytes of tables that a process keeps, of about 10,000 clips of 15 s
_LENGTH = struct.Struct("<I")  # of what a packed table says in words; its times, checksums and colours follow
_COMPARED = 4  # frames of a file whose mean colour is taken in another way too
_NO_TIME = np.iinfo(np.int64).min

_QUARTER_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """The frames that decode, in the order in which they are shown.

    count: how many.  rate: average frames per second of the stream.  header_count: frames the header
    promises, 0 where it says nothing.  size: width and height as displayed.  problem: what ended the decoding
    early, or None.  stream: index in the file.  tick: seconds of a unit of time, numerator and denominator.
    times: of each frame in ticks, None where the file has none.  keys: frames after which nothing depends on
    what came before, each with the time of decoding to seek.  codec, pixels: the stream's codec and pixel
    format.  packets: that hold something.  turn: degrees counterclockwise by which frames are shown turned.
    steady: whether size and format are those of the first frame throughout.  sums: checksum of each frame,
    `UNKNOWN` where there is none.  means: of each frame with a checksum three bytes, its colour.  spread: by
    how many levels that may be off.  sequential: whether other frames came where the file was entered at a
    key frame.
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
    turn: int
    steady: bool
    sums: tuple[int, ...]
    means: bytes
    spread: float
    sequential: bool = False

    @property
    def ordered(self) -> bool:
        """Whether the file can be entered and its frames told by their times: it is whole, they ascend."""
        known = [time for time in self.times if time is not None]
        ascending = all(a < b for a, b in pairwise(known))
        whole = self.problem is None and self.steady and not self.sequential
        return whole and len(known) == self.count and ascending

    def mean(self, index: int) -> Colour | None:
        """The mean colour of a frame in levels, None where it is not known."""
        if index >= len(self.sums) or self.sums[index] == UNKNOWN:
            return None
        red, green, blue = self.means[3 * index : 3 * index + 3]
        return red, green, blue

    def differs(self, index: int, image: Image.Image, tolerance: int = 0) -> bool:
        """Whether an image is known to be another than a frame, of whose pixels it is `tolerance` off."""
        mean = self.mean(index)
        if mean is None:
            return False
        found = fingerprint(image, self.turn)
        if not tolerance:
            return found.checksum != self.sums[index]
        off = np.abs(np.subtract(found.mean, mean))
        return float(off.max()) > tolerance + 0.5  # means are kept as whole numbers

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
class FrameIndexBuilder:
    """A table that grows while a file is decoded."""

    rate: float | None
    header_count: int
    stream: int
    tick: tuple[int, int]
    codec: str
    packets: int = 0
    turn: int = 0
    count: int = 0
    size: tuple[int, int] = (0, 0)
    problem: str | None = None
    pixels: str = ""
    steady: bool = True
    times: list[int | None] = field(default_factory=list)
    prints: Fingerprints | None = None
    seen: dict[int, Fingerprint] = field(default_factory=dict)  # of frames that were converted whole
    spread: float = 0.0
    entries: list[tuple[int, int]] = field(default_factory=list)  # times of showing and decoding
    intra: set[int | None] = field(default_factory=set)  # times of showing

    @staticmethod
    def of(stream: VideoStream, *, prints: bool) -> FrameIndexBuilder:
        """What the header of a stream says.

        Args:
            prints: whether to note what tells each frame from others.
        """
        tick = stream.time_base or Fraction(0)
        return FrameIndexBuilder(
            rate=float(stream.average_rate or 0) or None,
            header_count=stream.frames,
            stream=stream.index,
            tick=(tick.numerator, tick.denominator),
            codec=stream.codec.canonical_name,
            prints=Fingerprints() if prints else None,
        )

    def saw_packet(self, packet: Packet) -> None:
        """Count a packet, and note where the file can be entered."""
        self.packets += packet.size > 0
        if packet.is_keyframe and packet.size and packet.pts is not None and packet.dts is not None:
            self.entries.append((packet.pts, packet.dts))

    def saw_frame(self, frame: VideoFrame) -> int:
        """Count a frame and give its index."""
        kind = (displayed_size(frame), frame.format.name, _turn(frame))
        if self.count == 0:
            self.size, self.pixels, self.turn = kind
        elif self.steady:
            self.steady = (self.size, self.pixels, self.turn) == kind
        if self.prints is not None and self.steady:
            self.prints.add(frame)
        # The pictures from which a refresh begins are marked as key frames too, but build on earlier ones.
        if frame.key_frame and frame.pict_type == PictureType.I:
            self.intra.add(frame.pts)
        self.times.append(frame.pts)
        self.count += 1
        return self.count - 1

    def saw_image(self, image: Image.Image) -> None:
        """Note how the last frame is displayed."""
        if self.prints is None:
            return
        found = self.seen[self.count - 1] = fingerprint(image, self.turn)
        if len(self.seen) <= _COMPARED:
            self.spread = max(self.spread, spread(image, found))

    def table(self) -> FrameIndex:
        """The table of what was decoded."""
        index_of = {time: index for index, time in enumerate(self.times)}
        entered = (entry for entry in self.entries if entry[0] in self.intra)
        keys = sorted((index_of[shown], decoded) for shown, decoded in entered)
        prints = [] if self.prints is None or not self.steady else self.prints.all()
        known = [each or self.seen.get(index) for index, each in enumerate(prints)]
        colours = [(0.0, 0.0, 0.0) if each is None else each.mean for each in known]
        return FrameIndex(
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
            turn=self.turn,
            steady=self.steady,
            sums=tuple(UNKNOWN if each is None else each.checksum for each in known),
            means=np.rint(np.array(colours)).astype(np.uint8).tobytes(),
            spread=math.ceil(self.spread),
        )


class FrameIndexStore:
    """Tables of files, in memory for a bounded number of frames and on disk where there is a cache.

    A table is known by the file's path, size and time of change: that of a changed file is never met again.
    """

    def __init__(self, cache: FrameCache | None = None) -> None:
        self._cache = cache
        self._kept: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._bytes = 0

    def get(self, path: Path) -> FrameIndex | None:
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

    def put(self, path: Path, table: FrameIndex) -> None:
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


def packed(table: FrameIndex) -> bytes:
    """A table as bytes."""
    words = {name: value for name, value in vars(table).items() if name not in ("times", "sums", "means")}
    text = json.dumps(words, separators=(",", ":")).encode()
    times = np.array([_NO_TIME if time is None else time for time in table.times], "<i8")
    parts = (text, times.tobytes(), np.array(table.sums, "<u4").tobytes(), table.means)
    return _LENGTH.pack(len(text)) + b"".join(parts)


def unpacked(content: bytes) -> FrameIndex:
    """The table in bytes."""
    end = _LENGTH.size + _LENGTH.unpack_from(content)[0]
    fields = json.loads(content[_LENGTH.size : end])
    times = np.frombuffer(content, "<i8", fields["count"], end).tolist()
    end += 8 * len(times)
    number = (len(content) - end) // 7
    pairs: dict[str, Any] = {"keys": tuple((index, time) for index, time in fields["keys"])}
    for name in ("size", "tick"):
        pairs[name] = tuple(fields[name])
    pairs["times"] = tuple(None if time == _NO_TIME else time for time in times)
    pairs["sums"] = tuple(np.frombuffer(content, "<u4", number, end).tolist())
    pairs["means"] = content[end + 4 * number :]
    return FrameIndex(**(fields | pairs))


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
