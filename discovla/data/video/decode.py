"""Video files to the frames the model sees, and what is wrong with files that have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from av.error import FFmpegError
from av.video.stream import VideoStream
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.video.opening import DecodeError, is_cut_off, opened, words
from discovla.data.video.tables import DraftTable, FrameTable, displayed

Damaged = Literal["refuse", "use"]


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
    images, table = scan(path, sampling, each, None)
    indices = sampled(path, table, sampling, damaged)
    if not images.keys() >= set(indices):
        images, table = scan(path, sampling, each, table.count)
    if not images.keys() >= set(indices):
        raise DecodeError(path, f"decoded twice, it gave other frames, the second time {table.count}")
    return described(images, indices, table)


def tabulate(path: Path) -> FrameTable:
    """Decode a file to its end, keeping nothing but its table.

    Raises:
        DecodeError: it does not open.
    """
    return scan(path, None, np.asarray, 0)[1]


def look_through(item: tuple[Path, Sampling]) -> FrameTable:
    """Decode a file to its end, keeping its table, which tells each frame from others.

    Raises:
        DecodeError: it does not open.
    """
    path, sampling = item
    return scan(path, sampling, np.asarray, None, prints=True)[1]


def scan(
    path: Path,
    sampling: Sampling | None,
    each: Callable[[Image.Image], np.ndarray],
    count: int | None,
    *,
    prints: bool = False,
) -> tuple[dict[int, np.ndarray], FrameTable]:
    """Decode the whole file, keeping the frames sampled where `count` frames decode; None is a guess.

    Args:
        prints: whether the table is to tell each frame from others.

    Returns: frames by index, those of another count where the guess was wrong, and the table of all.

    Raises:
        DecodeError: the file does not open.
    """
    images: dict[int, np.ndarray] = {}
    with opened(path) as (container, stream):
        draft = DraftTable.of(stream, prints=prints)
        wanted = _wanted(sampling, _guess(path, stream) if count is None else count, draft.rate)
        try:
            for packet in container.demux(stream):
                draft.saw_packet(packet)
                for frame in packet.decode():
                    if draft.saw_frame(frame) in wanted:
                        image = displayed(frame, draft.size)
                        draft.saw_image(image)
                        images[draft.count - 1] = each(image)
        except FFmpegError as error:
            draft.problem = words(error) + (" (the file is cut off)" if is_cut_off(path) else "")
    return images, draft.table()


def sampled(path: Path, table: FrameTable, sampling: Sampling, damaged: Damaged) -> list[int]:
    """Indices of the frames to take, from the frames that did decode.

    Raises:
        DecodeError: as `decode`.
    """
    if table.count == 0:
        raise DecodeError(path, table.nothing())
    if table.problem is not None and damaged == "refuse":
        raise DecodeError(path, table.broken())
    if table.rate is None:
        raise DecodeError(path, "no average frame rate: expected one above 0 in the file, found none")
    try:
        return sampling.indices(table.count, table.rate)
    except ValueError as error:
        raise DecodeError(path, str(error)) from error


def described(images: dict[int, np.ndarray], indices: list[int], table: FrameTable) -> Decoded:
    """Images with what is known of their file."""
    rate = table.rate or 0.0
    return Decoded(
        images=images,
        indices=tuple(indices),
        seconds=tuple(table.seconds(index) for index in indices),
        count=table.count,
        rate=rate,
        problem=None if table.problem is None else table.broken(),
    )


def inspect(path: str | Path) -> Verdict:
    """Decode a file to its end, keeping nothing, and say what it gives."""
    try:
        table = tabulate(Path(path))
    except DecodeError as error:
        return Verdict(kind="refused", reason=error.reason)
    if table.count == 0:
        return Verdict(
            kind="refused", reason=table.nothing(), rate=table.rate, header_count=table.header_count
        )
    return Verdict(
        kind="ok" if table.problem is None else "damaged",
        reason="" if table.problem is None else table.broken(),
        count=table.count,
        rate=table.rate,
        size=table.size,
        header_count=table.header_count,
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
