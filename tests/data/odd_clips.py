"""One small clip of each kind that decoders treat differently, made on the spot."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

COUNT = 40


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of clip: file suffix, codec with its options, and the oddity.

    skipped, delayed: ticks that an MP4's edit list leaves out at the beginning, and that it waits before.
    """

    suffix: str = ".mp4"
    codec: str = "libx264"
    options: dict[str, str] = field(default_factory=lambda: {"g": "250", "bf": "3"})
    size: tuple[int, int] = (64, 80)
    pixels: str = "yuv420p"
    rotation: int = 0
    aspect: Fraction | None = None
    ticks: int = 1000  # of a second
    times: Callable[[int], int] = lambda i: i * 100  # in ticks
    muxing: dict[str, str] = field(default_factory=dict)
    streams: int = 1
    count: int = COUNT
    skipped: int = 0
    delayed: int = 0

    @property
    def shown(self) -> list[int]:
        """The frames that are shown."""
        return [i for i in range(self.count) if self.times(i) - self.times(0) >= self.skipped]


VP9 = {"g": "10", "deadline": "realtime"}
KINDS = {
    "long-gop": Kind(),
    "short-gop": Kind(options={"g": "6", "bf": "2"}),
    "every-frame-key": Kind(options={"g": "1"}),
    "open-gop": Kind(options={"g": "8", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "intra-refresh": Kind(options={"g": "12", "bf": "0", "x264-params": "intra-refresh=1"}),
    "hevc-open-gop": Kind(codec="libx265", options={"x265-params": "open-gop=1:keyint=8:log-level=none"}),
    "vp9": Kind(suffix=".webm", codec="libvpx-vp9", options=VP9),
    "vp8-without-duration": Kind(
        suffix=".webm", codec="libvpx", options={"g": "10"}, muxing={"live": "1"}, size=(48, 64)
    ),
    "mjpeg": Kind(suffix=".avi", codec="mjpeg", options={}, pixels="yuvj420p", ticks=10, times=lambda i: i),
    "mpeg4-b-frames": Kind(
        suffix=".avi", codec="mpeg4", options={"g": "10", "bf": "2"}, ticks=10, times=lambda i: i
    ),
    "transport-stream": Kind(suffix=".ts", options={"g": "10", "bf": "2"}),
    "fragmented": Kind(options={"g": "10"}, muxing={"movflags": "frag_keyframe+empty_moov"}),
    "variable-rate": Kind(times=lambda i: i * 40 + (i % 3) * 11 + (i // 5) * 900),
    "late-start": Kind(options={"g": "10"}, times=lambda i: 8000 + i * 100),
    "turned": Kind(rotation=90),
    "flat-pixels": Kind(aspect=Fraction(4, 3)),
    "odd-size": Kind(size=(33, 47), pixels="yuv444p"),
    "odd-size-vp9": Kind(suffix=".webm", codec="libvpx-vp9", options={"deadline": "realtime"}, size=(33, 47)),
    "ten-bit": Kind(pixels="yuv420p10le"),
    "two-streams": Kind(streams=2),
    "one-frame": Kind(count=1),
    "edit-skips-start": Kind(options={"g": "6", "bf": "2"}, skipped=1300),
    "edit-skips-far": Kind(skipped=2500),
    "edit-skips-start-vp9": Kind(codec="libvpx-vp9", options=VP9, skipped=1300),
    "edit-skips-gop": Kind(codec="libvpx-vp9", options=VP9, skipped=1000),
    "edit-delays-start": Kind(delayed=700),
    "edit-delays-start-vp9": Kind(codec="libvpx-vp9", options=VP9, delayed=700),
}


def odd_clip(folder: Path, name: str) -> Path:
    """Write the clip of a kind: a picture that moves, with a bar that jumps."""
    kind = KINDS[name]
    path = folder / f"{name}{kind.suffix}"
    with av.open(str(path), "w", options=kind.muxing) as container:
        streams = [_stream(container, kind, small=n > 0) for n in reversed(range(kind.streams))]
        for i in range(kind.count):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture(i, stream.height, stream.width), format="rgb24")
                frame.pts, frame.time_base = kind.times(i), Fraction(1, kind.ticks)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    if kind.skipped or kind.delayed:
        edits = _with_edits(path.read_bytes(), kind.skipped / kind.ticks, kind.delayed / kind.ticks)
        path.write_bytes(edits)
    return path


def picture(i: int, height: int, width: int) -> np.ndarray:
    """Frame i: a smooth pattern that moves, and a bright bar that never stands still."""
    y, x = np.mgrid[:height, :width]
    waves = (np.sin((x + 2 * i) / 9) + np.sin((y - i) / 7) + 2) * 60
    frame = np.stack([waves, np.roll(waves, i, 0), 255 - waves], 2).astype(np.uint8)
    frame[:, (i * 11) % width :][:, :4] = 255
    return frame


def _with_edits(content: bytes, skipped: float, delayed: float) -> bytes:
    """An MP4 file whose index follows its pictures, with another edit list, in seconds.

    Source: ISO 14496-12, 8.6.6: an edit is its length in units of the movie, where it begins in units of the
    track, -1 for nothing, and its speed.
    """
    here = content.rfind(b"elst")
    size, length, begin = (struct.unpack_from(">i", content, here + at)[0] for at in (-4, 12, 16))
    movie, track = (struct.unpack_from(">I", content, content.rfind(b) + 16)[0] for b in (b"mvhd", b"mdhd"))
    edits = [(length - round(skipped * movie), begin + round(skipped * track))]
    if delayed:
        edits.insert(0, (round(delayed * movie), -1))
    rows = b"".join(struct.pack(">IiI", *edit, 1 << 16) for edit in edits)
    box = struct.pack(">I4sII", 16 + len(rows), b"elst", 0, len(edits)) + rows
    changed = bytearray(content)
    for name in (b"edts", b"trak", b"moov"):
        at = content.rfind(name, 0, here) - 4
        grown = struct.unpack_from(">I", content, at)[0] + len(box) - size
        struct.pack_into(">I", changed, at, grown)
    changed[here - 4 : here - 4 + size] = box
    return bytes(changed)


def _stream(container, kind: Kind, *, small: bool):
    """A video stream, half as large where `small`."""
    stream = container.add_stream(kind.codec, rate=10, options=kind.options)
    height, width = kind.size
    stream.height, stream.width = (height // 2, width // 2) if small else (height, width)
    stream.pix_fmt, stream.codec_context.time_base = kind.pixels, Fraction(1, kind.ticks)
    if kind.rotation:
        stream.set_display_rotation(kind.rotation)
    if kind.aspect:
        stream.codec_context.sample_aspect_ratio = kind.aspect
    return stream
