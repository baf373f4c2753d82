"""Times of the frames of a file while it is decoded."""

from __future__ import annotations

from av.video.frame import VideoFrame

from discovla.data.video.index import FrameIndexBuilder

LARGEST_GAP = 30.0  # seconds between two frames; a longer gap is an error of the times


class Clock:
    """Times of frames in seconds from the first one; a frame with no time, or a wrong one, has the rate's."""

    def __init__(self) -> None:
        self.now = 0.0
        self._anchor: tuple[int | None, float] = (None, 0.0)  # a frame's time in the file, and in seconds

    def step(self, index: FrameIndexBuilder) -> float:
        """Return the seconds of a frame by the rate of the header; 1/25 where it has none."""
        return 1 / (index.header_rate or 25.0)

    def time(self, frame: VideoFrame, index: FrameIndexBuilder) -> float:
        """Return the time of the next frame."""
        (numerator, denominator), (pts, seconds) = index.time_base, self._anchor
        time = self.now + self.step(index) if index.count > 1 else 0.0
        if frame.pts is not None and pts is not None and numerator:
            by_file = seconds + (frame.pts - pts) * numerator / denominator
            if 0 <= by_file - self.now <= LARGEST_GAP:
                self.now = by_file
                return by_file
        self._anchor, self.now = (frame.pts, time), time
        return time
