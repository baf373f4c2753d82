"""Video files to the frames the model sees, and what is wrong with files that have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.video import DecodeError, is_cut_off, opened, words

Damaged = Literal["refuse", "use"]

_QUARTER_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Sampled frames of one clip.

    images: by frame index, uint8 RGB y x 3.  indices: those taken, ascending, with repeats where the clip is
    short, or fewer (see `Sampling`).  seconds: their times.  count: frames that decode.  rate: average frames
    per second.  problem: what ended the decoding early, or None.
    """

    images: dict[int, np.ndarray]
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    count: int
    rate: float
    problem: str | None

    @property
    def frames(self) -> np.ndarray:
        """The frames, f y x 3, uint8."""
        return np.stack([self.images[index] for index in self.indices])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What can be had from a file.

    kind: `ok` decodes to its end, `damaged` breaks off after `count` frames, `refused` gives none.  reason:
    why, empty where it is ok.  size: width and height as displayed.  header_count: frames the header
    promises, 0 where it says nothing.
    """

    kind: Literal["ok", "damaged", "refused"]
    reason: str
    count: int = 0
    rate: float | None = None
    size: tuple[int, int] | None = None
    header_count: int = 0


def decode(
    path: str | Path,
    frames: int,
    *,
    sample_rate: float = 1.0,
    start: float | None = None,
    end: float | None = None,
    damaged: Damaged = "refuse",
) -> Decoded:
    """The sampled frames of a video as it is displayed.

    The frames that decode are counted, whatever the header says; rotation is applied, pixels that are not
    square are left as they are, as in the released code.

    Args:
        path: a video file; of several video streams the best is taken.
        frames, sample_rate, start, end: see `frame_indices`.
        damaged: whether a file that breaks off is refused or used up to there.

    Raises:
        DecodeError: the file gives no frames, or is damaged and that is refused.
    """
    sampling = Sampling(frames=frames, sample_rate=sample_rate, start=start, end=end)
    return decode_each(path, sampling, np.asarray, damaged=damaged)


def decode_each(
    path: str | Path,
    sampling: Sampling,
    each: Callable[[Image.Image], np.ndarray],
    *,
    damaged: Damaged = "refuse",
) -> Decoded:
    """As `decode`, with `each` applied once to every chosen frame, so that no more than one is held whole.

    Args:
        each: from an RGB image as displayed to uint8 y x 3, the same shape for all.

    Raises:
        DecodeError: as `decode`.
    """
    path = Path(path)
    scan = _scan(path, sampling, each, None)
    indices, rate = _sampled(path, scan, sampling, damaged)
    if not scan.images.keys() >= set(indices):
        scan = _scan(path, sampling, each, scan.count)
    if not scan.images.keys() >= set(indices):
        raise DecodeError(path, f"decoded twice, it gave other frames, the second time {scan.count}")
    return Decoded(
        images=scan.images,
        indices=tuple(indices),
        seconds=tuple(_seconds(scan.times[index], index / rate) for index in indices),
        count=scan.count,
        rate=rate,
        problem=None if scan.problem is None else scan.broken(),
    )


def inspect(path: str | Path) -> Verdict:
    """Decode a file to its end, keeping nothing, and say what it gives."""
    try:
        scan = _scan(Path(path), None, np.asarray, 0)
    except DecodeError as error:
        return Verdict(kind="refused", reason=error.reason)
    if scan.count == 0:
        return Verdict(kind="refused", reason=scan.nothing(), rate=scan.rate, header_count=scan.header_count)
    return Verdict(
        kind="ok" if scan.problem is None else "damaged",
        reason="" if scan.problem is None else scan.broken(),
        count=scan.count,
        rate=scan.rate,
        size=scan.size,
        header_count=scan.header_count,
    )


def write_frames(
    video: str | Path,
    out: str | Path,
    frames: int,
    *,
    sample_rate: float = 1.0,
    damaged: Damaged = "refuse",
) -> list[Path]:
    """Write the sampled frames of a video as PNG, at the size displayed, and `frames.json` with their times.

    Args:
        out: folder, made where there is none.
        frames, sample_rate, damaged: as `decode`.

    Returns: the PNG files in order; a repeated frame is written once for each time it is seen.

    Raises:
        DecodeError: as `decode`.
        OSError: the folder cannot be written.
    """
    decoded = decode(video, frames, sample_rate=sample_rate, damaged=damaged)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, (index, seconds) in enumerate(zip(decoded.indices, decoded.seconds, strict=True)):
        name = f"{place:02d}_frame{index:06d}.png"
        Image.fromarray(decoded.images[index]).save(out / name)
        rows.append({"file": name, "index": index, "seconds": round(seconds, 6)})
    record = _record(video, decoded) | {"frames": rows}
    (out / "frames.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return [out / row["file"] for row in rows]


def _sampled(path: Path, scan: _Scan, sampling: Sampling, damaged: Damaged) -> tuple[list[int], float]:
    """Indices of the frames to take and the rate, from the frames that did decode."""
    if scan.count == 0:
        raise DecodeError(path, scan.nothing())
    if scan.problem is not None and damaged == "refuse":
        raise DecodeError(path, scan.broken())
    if scan.rate is None:
        raise DecodeError(path, "no average frame rate: expected one above 0 in the file, found none")
    try:
        return sampling.indices(scan.count, scan.rate), scan.rate
    except ValueError as error:
        raise DecodeError(path, str(error)) from error


def _seconds(time: float | None, otherwise: float) -> float:
    """The time of a frame, where the file gives it."""
    return otherwise if time is None else time


def _record(video: str | Path, decoded: Decoded) -> dict[str, Any]:
    """What `frames.json` says of the whole clip."""
    height, width, _ = decoded.images[decoded.indices[0]].shape
    return {
        "video": str(video),
        "count": decoded.count,
        "rate": decoded.rate,
        "width": width,
        "height": height,
        "problem": decoded.problem,
    }


@dataclass(kw_only=True)
class _Scan:
    """One decoding of a file to its end, and what was kept of it."""

    rate: float | None
    header_count: int
    count: int = 0
    size: tuple[int, int] | None = None
    problem: str | None = None
    images: dict[int, np.ndarray] = field(default_factory=dict)
    times: dict[int, float | None] = field(default_factory=dict)

    def nothing(self) -> str:
        """Why there is no frame."""
        return f"no frame decodes: {self.problem or 'the video stream is empty'}"

    def broken(self) -> str:
        """Where the decoding ended."""
        promised = f" of the {self.header_count} its header promises" if self.header_count else ""
        return f"damaged: {self.count} frames decode{promised}, then {self.problem}"


def _scan(
    path: Path, sampling: Sampling | None, each: Callable[[Image.Image], np.ndarray], count: int | None
) -> _Scan:
    """Decode the whole file, keeping the frames sampled where `count` frames decode; None is a guess."""
    with opened(path) as (container, stream):
        scan = _Scan(rate=float(stream.average_rate or 0) or None, header_count=stream.frames)
        if count is None:
            count = _guess(path, stream)
        wanted = _wanted(sampling, count, scan.rate)
        try:
            for frame in container.decode(stream):
                if scan.size is None:
                    scan.size = _displayed(frame)
                if scan.count in wanted:
                    scan.images[scan.count] = each(_image(frame, scan.size))
                    scan.times[scan.count] = frame.time
                scan.count += 1
        except FFmpegError as error:
            scan.problem = words(error) + (" (the file is cut off)" if is_cut_off(path) else "")
    return scan


def _wanted(sampling: Sampling | None, count: int | None, rate: float | None) -> set[int]:
    """Frames to keep if `count` decode; none where that cannot be right, which the true count then shows."""
    if sampling is None or rate is None or not count:
        return set()
    try:
        return set(sampling.indices(count, rate))
    except ValueError:
        return set()


def _guess(path: Path, stream: VideoStream) -> int:
    """How many frames may decode: what the header promises, or else the packets of the file."""
    if stream.frames:
        return stream.frames
    with opened(path) as (container, again):
        try:
            return sum(1 for packet in container.demux(again) if packet.size)
        except FFmpegError:
            return 0


def _turn(frame: VideoFrame) -> int:
    """Degrees to turn a frame counterclockwise, a whole number of quarter turns."""
    return round(frame.rotation / 90) * 90 % 360


def _displayed(frame: VideoFrame) -> tuple[int, int]:
    """Width and height of a frame after it is turned."""
    return (frame.height, frame.width) if _turn(frame) % 180 else (frame.width, frame.height)


def _image(frame: VideoFrame, size: tuple[int, int]) -> Image.Image:
    """A frame in RGB as displayed, at the size of the first frame where the stream changes size."""
    image = frame.to_image()
    turn = _turn(frame)
    if turn:
        image = image.transpose(_QUARTER_TURNS[turn])
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
