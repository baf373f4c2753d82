"""Video files by PyAV: open, decode to the end, decode single frames by the index."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.video.errors import DecodeError, WrongFrames, check_file, error_text
from discovla.data.video.hdr import hdr_name, tone_map
from discovla.data.video.index import FrameIndex, FrameIndexBuilder, quarter_turns
from discovla.foreign import HEAD, other_contents

Transform = Callable[[Image.Image], np.ndarray] | None  # RGB as displayed to uint8 y x 3; None keeps it
Images = dict[int, np.ndarray]  # transformed frames by their number

_PICTURE_CODECS = ("mjpeg", "png", "bmp", "webp")  # of covers and previews beside a video
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class OpenVideo:
    """An open file, its best video stream, and the messages that FFmpeg logs while it is read."""

    container: InputContainer
    stream: VideoStream
    messages: list[tuple[int, str, str]] = field(default_factory=list)

    def take_faults(self) -> int:
        """Return how many errors FFmpeg has logged since the last call."""
        faults = sum(level <= av.logging.ERROR for level, _, _ in self.messages)
        self.messages.clear()
        return faults


@contextmanager
def open_video(path: Path) -> Iterator[OpenVideo]:
    """Open a file and its best video stream for decoding on one thread.

    Raises:
        DecodeError: it is not a file, does not open or has no video stream.
    """
    check_file(path)
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    with av.logging.Capture() as messages:
        try:
            # A title in a broken encoding is no reason to refuse a video.
            container = av.open(str(path.absolute()), metadata_errors="replace")
        except (FFmpegError, OSError) as error:
            raise DecodeError(path, _open_failure(path, error)) from error
        with container:
            stream = _best_stream(path, container)
            # Frame threading gives other frames, and other numbers of them, on broken files.
            stream.thread_type = "SLICE"
            stream.codec_context.thread_count = 1
            yield OpenVideo(container, stream, messages)


def decode_through(
    path: Path,
    transform: Transform,
    *,
    sampling: Sampling | None = None,
    frames: Collection[int] | None = None,
) -> tuple[Images, FrameIndex]:
    """Decode a file to its end, transforming some of its frames, and index all of them.

    Args:
        sampling: keep the frames it takes if the number of frames and the rate are those of the header, or
            else those of the packets; the index tells whether they are.
        frames: keep these frames instead.

    Raises:
        DecodeError: the file does not open.
    """
    images: Images = {}
    with open_video(path) as video:
        index = index_builder(video)
        if frames is None:
            frames = set() if sampling is None else _expected_frames(path, index, sampling)
        with noting_problem(path, index):
            for number, frame in numbered_frames(video, index):
                if number in frames:
                    images[number] = displayed_pixels(frame, index.size, transform)
    return images, index.build()


def numbered_frames(video: OpenVideo, index: FrameIndexBuilder) -> Iterator[tuple[int, VideoFrame]]:
    """Decode an open file to its end, adding all of it to the index; yield each frame with its number."""
    for packet in video.container.demux(video.stream):
        index.add_packet(packet)
        for frame in packet.decode():
            yield index.add_frame(frame), frame
        if video.messages:
            index.faults += video.take_faults()


@contextmanager
def noting_problem(path: Path, index: FrameIndexBuilder) -> Iterator[None]:
    """Note an error of FFmpeg, which ends the frames of a file, in its index."""
    try:
        yield
    except FFmpegError as error:
        index.problem = error_text(error) + (" (the file is cut off)" if is_cut_off(path) else "")


def index_video(path: Path) -> FrameIndex:
    """Decode a file to its end and return its index.

    Raises:
        DecodeError: the file does not open.
    """
    return decode_through(path, None)[1]


def decode_frames(path: Path, index: FrameIndex, frames: Sequence[int], transform: Transform) -> Images:
    """Decode single frames of a file, each from the last keyframe before it on.

    Pictures that no other refers to are skipped.  With one keyframe in the file that is all up to the last
    frame, with many the way from a keyframe to each frame.

    Args:
        path, index: a file and its index, which is `seekable`.
        frames: numbers below `index.count`.

    Raises:
        WrongFrames: a frame of the index is not found, or is damaged.
        DecodeError: the file no longer opens.
    """
    images: Images = {}
    with open_video(path) as video:
        for keyframe, group in groupby(sorted(set(frames)), index.keyframe_before):
            for number, frame in _frames_after(video, index, keyframe, list(group)):
                if frame.is_corrupt:
                    raise WrongFrames(
                        f"frame {number} is damaged, which it is not when decoded from the start"
                    )
                images[number] = displayed_pixels(frame, index.size, transform)
    return images


def displayed_pixels(frame: VideoFrame, size: tuple[int, int], transform: Transform) -> np.ndarray:
    """Return a frame in RGB as displayed, transformed; HDR is mapped to SDR.

    A frame of another size than the first is resized to it, with its rotation applied.
    """
    pixels = tone_map(frame) if hdr_name(frame.color_trc) else frame.to_ndarray(format="rgb24")
    turns = quarter_turns(frame)
    if transform is None and not turns and size == (frame.width, frame.height):
        return pixels
    image = Image.fromarray(pixels)
    if turns:
        image = image.transpose(_TURNS[turns])
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image) if transform is None else transform(image)


def chosen_stream(path: Path) -> str | None:
    """Return which of several video streams is read, in words; None if there is one.

    Raises:
        DecodeError: the file does not open.
    """
    with open_video(path) as video:
        streams = video.container.streams.video
        if len(streams) < 2:
            return None
        sizes = ", ".join(f"{one.index} {one.width}x{one.height}" for one in streams)
        return f"of the video streams {sizes}, {video.stream.index} is read"


def is_cut_off(path: Path) -> bool:
    """Return True if an MP4 file ends before the last of its boxes does."""
    end, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while end < size:
            file.seek(end)
            head = file.read(16)
            if len(head) < 8 or (end == 0 and head[4:8] != b"ftyp"):
                return end > 0
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            if length < 8:
                return False  # 0: the box runs to the end of the file, wherever that is
            end += length
    return end > size


def index_builder(video: OpenVideo) -> FrameIndexBuilder:
    """Return an empty index with the header of a file."""
    stream = video.stream
    base = stream.time_base
    seconds = float(stream.duration * base) if stream.duration and base else 0.0
    if not seconds and video.container.duration:
        seconds = video.container.duration / av.time_base
    return FrameIndexBuilder(
        time_base=(base.numerator, base.denominator) if base else (0, 1),
        header_rate=float(stream.average_rate or 0) or None,
        header_count=stream.frames,
        header_seconds=seconds or None,
        stream_index=stream.index,
        container=video.container.format.name,
        codec=stream.codec.canonical_name,
    )


def _expected_frames(path: Path, index: FrameIndexBuilder, sampling: Sampling) -> set[int]:
    """Return the frames that are sampled if as many decode as the header promises or the file has packets."""
    count, rate = index.header_count, index.header_rate
    if not count or rate is None:
        times: list[int | None] = []
        with open_video(path) as video:
            try:
                times = [packet.pts for packet in video.container.demux(video.stream) if packet.size]
            except FFmpegError:
                return set()
        count = count or len(times)
        known = [time for time in times if time is not None]
        if rate is None and len(known) > 1 and max(known) > min(known) and index.time_base[0]:
            ticks = (max(known) - min(known)) * index.time_base[0]
            rate = (len(known) - 1) * index.time_base[1] / ticks
    try:
        return set(sampling.indices(count, rate or sampling.sample_rate))
    except ValueError:
        return set()


def _frames_after(
    video: OpenVideo, index: FrameIndex, keyframe: int, frames: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Decode frames that all come after one keyframe, in any order.

    Args:
        keyframe: position in `index.keyframes`, -1 decodes from where the file stands.
    """
    number_at = {index.times[number]: number for number in frames}
    # Some formats seek to the time at which a keyframe is shown, others to the one at which it is decoded.
    starts: tuple[int | None, ...] = (None,)
    if keyframe >= 0:
        number, decoding_time = index.keyframes[keyframe]
        starts = (index.times[number], decoding_time)
    for start in starts:
        try:
            if start is not None:
                video.container.seek(start, stream=video.stream, backward=True)
            for frame in _decode_times(video, set(number_at)):
                yield number_at.pop(frame.pts), frame
        except FFmpegError as error:
            raise WrongFrames(error_text(error)) from error
        if not number_at:
            return
    raise WrongFrames(f"frame {min(number_at.values())} is not found")


def _decode_times(video: OpenVideo, times: set[int | None]) -> Iterator[VideoFrame]:
    """Decode the frames with these times, up to the last of them."""
    unsent = set(times)
    context = video.stream.codec_context
    for packet in video.container.demux(video.stream):
        if packet.size:
            unsent.discard(packet.pts)
            context.skip_frame = "DEFAULT" if packet.pts in times else "NONREF"
        frames = video.stream.decode(packet)
        if packet.size and not unsent:
            frames += video.stream.decode(None)  # frames that the decoder holds back; a seek resets it
        yield from (frame for frame in frames if frame.pts in times)
        if not unsent:
            return


def _open_failure(path: Path, error: Exception) -> str:
    """Return why a file does not open."""
    if isinstance(error, PermissionError):
        return f"cannot be read: {error_text(error)}"
    with path.open("rb") as file:
        head = file.read(HEAD)
    other = other_contents(head)
    if other is not None:
        return f"not a video file: {other}"
    if head[4:8] == b"ftyp":
        return f"truncated: an MP4 file without its index ({error_text(error)})"
    return f"not a video file ({error_text(error)})"


def _best_stream(path: Path, container: InputContainer) -> VideoStream:
    """Return the best video stream, not the cover picture of a sound file.

    Of several that FFmpeg decodes, it is the largest among those with the flags of FFmpeg's choice.
    """
    stream = container.streams.best("video")
    if isinstance(stream, VideoStream) and stream.codec_context is not None:
        stream = max(_equal_streams(container, stream), key=lambda one: (_area(one), -one.index))
    if not isinstance(stream, VideoStream) or stream.disposition & stream.disposition.attached_pic:
        if container.streams.video and not isinstance(stream, VideoStream):
            raise DecodeError(path, "no video stream that can be decoded")
        kind = "audio only" if container.streams.audio else "neither video nor audio in it"
        raise DecodeError(path, f"no video stream: {kind}")
    if stream.codec_context is None:
        raise DecodeError(path, "no decoder for its video stream")
    return stream


def _equal_streams(container: InputContainer, stream: VideoStream) -> list[VideoStream]:
    """Return the video streams with a decoder and with the flags of one of them, which is among them."""
    pictures = stream.codec_context.name in _PICTURE_CODECS
    return [
        one
        for one in container.streams.video
        if one.codec_context is not None
        and one.disposition == stream.disposition
        and (pictures or one.codec_context.name not in _PICTURE_CODECS)
    ]


def _area(stream: VideoStream) -> int:
    return stream.codec_context.width * stream.codec_context.height
