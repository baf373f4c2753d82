"""Cut a video into moments: at changes of shot, and where a shot is longer than a moment may be."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection

import numpy as np
from PIL import Image

LONGEST = 10.0  # seconds of a moment
OVERLAP = 2.0  # seconds that two moments of one shot share: a short event at a border is whole in one of them
SHORTEST = 1.0  # seconds of a shot; a shorter one is joined to the next
_CHANGE = 0.25  # smallest difference of two frames at a change of shot, of 1
_STANDS_OUT = 2.5  # times the median difference of the frames around it
_AROUND = 4  # frames before and after that the median is of

Span = tuple[float, float]  # seconds


def signature(image: Image.Image) -> np.ndarray:
    """Return the distribution of colours of an RGB image in its upper, middle and lower third.

    Returns: 3 · 3 · 16 float32, the share of pixels in each of 16 steps of red, green and blue.
    """
    pixels = np.asarray(image.resize((48, 27), Image.Resampling.BOX)) >> 4  # y x c
    steps = pixels.reshape(3, -1, 3) + 16 * np.arange(3, dtype=np.uint8)  # third, pixel, c
    counts = np.stack([np.bincount(third.ravel(), minlength=48) for third in steps])
    return (counts / steps.shape[1]).astype(np.float32).ravel()


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Return how different two signatures are, from 0 to 1: half of their mean L1 distance."""
    return float(np.abs(first - second).sum()) / 18


class MomentCutter:
    """Cuts a video while it is decoded: frames in, spans of moments out as soon as they are known.

    A change of shot is a frame whose signature differs from that of the frame before by `_CHANGE`, by
    `_STANDS_OUT` times the median of the differences around it, and by more than its neighbours do.  Shots
    are cut into moments of at most `LONGEST` seconds, each of which begins `OVERLAP` before the end of the
    last.  Moments cover the video.

    Args:
        shots: cut at changes of shot.
        changes: times of the changes in seconds if they are known; signatures are then not compared.
    """

    def __init__(self, *, shots: bool, changes: Collection[float] | None = None) -> None:
        self._shots = shots and changes is None
        self._changes = deque(sorted(changes or ()))
        self._times: list[float] = []  # of frames that are not decided, and of `_AROUND` before them
        self._differences: list[float] = []
        self._last: np.ndarray | None = None
        self._decided = 0  # of `_times`
        self._shot = 0.0  # start of the shot
        self.start = 0.0  # of the moment that is open; no later span begins before it

    def add(self, time: float, mark: np.ndarray | None) -> list[Span]:
        """Add the next frame, with its signature if shots are cut; return the spans that are now complete."""
        apart = 0.0
        if self._shots:
            assert mark is not None, "a signature to compare"
            apart = 0.0 if self._last is None else difference(self._last, mark)
            self._last = mark
        self._times.append(time)
        self._differences.append(apart)
        if len(self._times) - self._decided <= _AROUND:
            return []
        spans = self._decide()
        if self._decided > _AROUND:
            del self._times[0], self._differences[0]
            self._decided -= 1
        return spans

    def finish(self, duration: float) -> list[Span]:
        """End the video; return the last spans."""
        spans: list[Span] = []
        while self._decided < len(self._times):
            spans += self._decide()
        return spans + self._close(duration)

    def _decide(self) -> list[Span]:
        """Decide about the first frame that is not decided."""
        place = self._decided
        self._decided += 1
        time = self._times[place]
        if self._is_change(place, time) and time - self._shot >= SHORTEST:
            spans = self._close(time)
            self._shot = self.start = time
            return spans
        if time - self.start >= LONGEST:
            span = (self.start, self.start + LONGEST)
            self.start += LONGEST - OVERLAP
            return [span]
        return []

    def _is_change(self, place: int, time: float) -> bool:
        if self._changes and time >= self._changes[0]:
            self._changes.popleft()
            return True
        apart = self._differences[place]
        if not self._shots or apart < _CHANGE:
            return False
        low, high = max(0, place - _AROUND), place + _AROUND + 1
        around = self._differences[low:place] + self._differences[place + 1 : high]
        if not around:
            return True
        beside = self._differences[max(0, place - 1) : place] + self._differences[place + 1 : place + 2]
        return apart >= _STANDS_OUT * statistics.median(around) and apart >= max(beside)

    def _close(self, end: float) -> list[Span]:
        """End the shot; what the moment before it covers needs no moment of its own."""
        covered = self.start > self._shot and end - self.start <= OVERLAP
        return [] if covered or end <= self.start else [(self.start, end)]
