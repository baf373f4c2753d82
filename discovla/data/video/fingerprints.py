"""What tells every frame of a file from others, at a fraction of the cost of converting it to RGB."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image

Colour = tuple[float, float, float]

UNKNOWN = 0  # the checksum of a frame that has none
_BATCH = 8  # frames whose rows are converted at once
_PAIRS = 24  # of rows that are converted of a frame, at most; one of each is looked at
_COLUMNS = 4  # one of so many is looked at
_BACK = {
    90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Fingerprint:
    """Of some rows and columns of a frame in RGB: checksum, never `UNKNOWN`, and mean colour in levels.

    What is lost of a picture is lost by blocks, mostly of 16 x 16 and up to the end of a row of them.  One
    lower than a 24th of a frame may go unseen.
    """

    checksum: int
    mean: Colour


def fingerprint(image: Image.Image, turn: int = 0) -> Fingerprint:
    """That of a frame as displayed, which was turned by so many degrees counterclockwise."""
    if turn:
        image = image.transpose(_BACK[turn])
    step, rows = _rows(image.height)
    columns = max(1, image.width // _COLUMNS)
    some = _picked(image, (columns, rows), (min(_COLUMNS * columns, image.width), step * rows))
    return Fingerprint(_checksum(some), _mean(some))


def spread(image: Image.Image, found: Fingerprint) -> float:
    """Levels by which the mean colour of a frame may be off where it is that of its fingerprint."""
    others = _picked(image, (max(1, image.width // 5), max(1, image.height // 3)), image.size)
    return float(np.abs(np.subtract(_mean(others), found.mean)).max())


class Fingerprints:
    """Those of frames in the order in which they come.

    Only the rows looked at are converted, those of many frames at once, which gives the pixels that
    converting each whole does: the format repeats colours, and no filter reaches over rows.  A frame of
    another format is converted whole; of one with more than 8 bits a colour there is none.
    """

    def __init__(self) -> None:
        self.found: list[Fingerprint | None] = []
        self._strips: _Strips | None = None

    def add(self, frame: VideoFrame) -> None:
        """Take the next frame."""
        if self._strips is None or not self._strips.fit(frame):
            self._flush()
            self._strips = _Strips(frame) if _planar(frame) else None
        if self._strips is not None:
            self._strips.add(frame)
            if self._strips.full:
                self.found += self._strips.taken()
        elif max(part.bits for part in frame.format.components) > 8:
            self.found.append(None)
        else:
            self.found.append(fingerprint(frame.to_image()))

    def all(self) -> list[Fingerprint | None]:
        """Those of all frames taken."""
        self._flush()
        return self.found

    def _flush(self) -> None:
        if self._strips is not None:
            self.found += self._strips.taken()


class _Strips:
    """Pairs of rows of frames of one kind, in one tall frame that is converted when it is full."""

    def __init__(self, frame: VideoFrame) -> None:
        self._key = _kind(frame)
        self._step, self._rows = _rows(frame.height)
        self._count = 0
        self._tall = VideoFrame(frame.width, 2 * self._rows * _BATCH, frame.format.name)
        self._tall.colorspace, self._tall.color_range = frame.colorspace, frame.color_range
        planes: Any = self._tall.planes
        self._row = self._step // 2  # the one looked at of `step`
        self._planes = []  # of each: f row pair x, and how many of its rows one of `_rows` stands for
        for plane in planes:
            pair = plane.height // _BATCH // self._rows
            view = np.frombuffer(plane, np.uint8, count=plane.height * plane.line_size)
            view = view.reshape(_BATCH, self._rows, pair, plane.line_size)[..., : plane.width]
            self._planes.append((view, self._step * pair // 2))
        self._converter = VideoReformatter()
        columns = frame.width // _COLUMNS
        self._mean = np.tile(np.eye(3, dtype=np.float32), (self._rows * columns, 1))
        self._mean /= self._rows * columns

    def fit(self, frame: VideoFrame) -> bool:
        """Whether a frame is of the same kind."""
        return _kind(frame) == self._key

    @property
    def full(self) -> bool:
        return self._count == _BATCH

    def add(self, frame: VideoFrame) -> None:
        """Take the rows of a frame."""
        planes: Any = frame.planes
        for plane, (view, step) in zip(planes, self._planes, strict=True):
            _, rows, pair, width = view.shape
            first = self._row // 2 * pair
            content = np.frombuffer(plane, np.uint8, count=rows * step * plane.line_size)
            view[self._count] = content.reshape(rows, step, -1)[:, first : first + pair, :width]
        self._count += 1

    def taken(self) -> list[Fingerprint]:
        """The fingerprints of the frames taken since the last time."""
        count, self._count = self._count, 0
        if count == 0:
            return []
        plane: Any = self._converter.reformat(self._tall, format="rgb24").planes[0]
        shape = (plane.height // 2, self._tall.width // _COLUMNS)
        strides = (2 * plane.line_size, 3 * _COLUMNS)
        first = self._row % 2 * plane.line_size + 3 * (_COLUMNS // 2)
        some = np.ndarray(shape, "V3", np.frombuffer(plane, np.uint8), first, strides)
        some = np.ascontiguousarray(some).view(np.uint8).reshape(_BATCH, -1)[:count]
        means = (some.astype(np.float32) @ self._mean).tolist()
        return [Fingerprint(_checksum(row), (r, g, b)) for row, (r, g, b) in zip(some, means, strict=True)]


def _picked(image: Image.Image, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The pixels in the middle of the cells of a grid over the top left part of an image, y x 3."""
    return np.asarray(image.resize(grid, Image.Resampling.NEAREST, (0, 0, *size)))


def _mean(pixels: np.ndarray) -> Colour:
    """The mean colour of pixels, y x 3."""
    rows = pixels.reshape(-1, 3).astype(np.float32)
    red, green, blue = (np.full(len(rows), 1 / len(rows), np.float32) @ rows).tolist()
    return red, green, blue


def _rows(height: int) -> tuple[int, int]:
    """From how many rows one is looked at, and how many that are."""
    step = min(2 * -(-height // (2 * _PAIRS)), height)
    return step, height // step


def _planar(frame: VideoFrame) -> bool:
    """Whether rows of a frame can be converted without the others: a plane a colour, in whole pairs."""
    parts = frame.format.components
    even = frame.width % 2 == frame.height % 2 == 0 and frame.height >= 2 and frame.width >= _COLUMNS
    planes = {part.plane for part in parts}
    yuv = not frame.format.is_rgb and not frame.format.has_palette and len(parts) == len(planes) == 3
    # colours of half the height are repeated only where they have half the width too; else they are scaled
    paired = all(
        plane.height == frame.height or (2 * plane.height == frame.height and 2 * plane.width == frame.width)
        for plane in frame.planes
    )
    return even and yuv and paired and all(part.bits == 8 for part in parts)


def _kind(frame: VideoFrame) -> tuple[object, ...]:
    """What the frames of one conversion have in common."""
    return (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)


def _checksum(some: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(some).data) or 1
