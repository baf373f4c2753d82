"""Which frames of a clip the model sees: one function per published sampling, and `Sampling` to choose."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol, get_args

from discovla.data.manifest import Clip

Sampler = Literal["discovla", "clip4clip", "clip2video", "t2vparser"]
Slice = Literal["even", "first", "last"]
Span = tuple[float | None, float | None]  # start and end in seconds


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a file to take.

    frames: how many the model sees; `clip4clip` and `clip2video` give fewer where a clip has no more.
    sampler: whose sampling, each a function below.  sample_rate: frames a second, read or (`clip2video`)
    stored; `t2vparser` has none.  divisor: of the stored frames, `clip2video` alone.  slice: what is kept of
    too many frames, `clip4clip` alone.  start, end: span in seconds.  seed: of the shifts of `clip2video` and
    `t2vparser` in training, the only thing they depend on; None takes the frames that testing takes.
    """

    frames: int
    sampler: Sampler = "discovla"
    sample_rate: float = 1.0
    divisor: int = 1
    slice: Slice = "even"
    start: float | None = None
    end: float | None = None
    seed: str | None = None

    @property
    def moves(self) -> bool:
        """Whether another seed may give other frames."""
        return self.sampler in ("clip2video", "t2vparser")

    def candidates(self, count: int, rate: float) -> list[int]:
        """Every frame that `indices` may take under some seed, or without one: ascending, each once.

        Raises:
            ValueError: as the functions below.
        """
        span = (self.start, self.end)
        testing = replace(self, seed=None).indices(count, rate)
        match self.sampler:
            case "clip2video":
                stored = stored_indices(count, rate, stored_rate=self.sample_rate, span=span)
                testing += [stored[i] for i in divided(len(stored), self.divisor, len(stored))]
            case "t2vparser":
                _check(count, rate, 1, 1.0)
                first, last = _span(count, rate, *span)
                testing += range(first, last + 1)
        return sorted(set(testing))

    def indices(self, count: int, rate: float) -> list[int]:
        """The frames of a clip with `count` frames that decode at `rate` a second, ascending.

        Raises:
            ValueError: as the functions below.
        """
        span = (self.start, self.end)
        # Not the generator of the augmentation, which has the same seed: it would repeat its draws.
        draws = None if self.seed is None else random.Random(f"frames/{self.seed}")
        match self.sampler:
            case "discovla":
                start, end = span
                return frame_indices(
                    count, rate, self.frames, sample_rate=self.sample_rate, start=start, end=end
                )
            case "clip4clip":
                read = second_indices(count, rate, sample_rate=self.sample_rate, span=span)
                return sliced(read, self.frames, self.slice)
            case "clip2video":
                stored = stored_indices(count, rate, stored_rate=self.sample_rate, span=span)
                chosen = divided(len(stored), self.divisor, self.frames, draws)
                if not chosen:
                    raise ValueError(
                        f"sampling_divisor: {self.divisor} leaves none of the {len(stored)} frames stored at "
                        f"{self.sample_rate:g} a second; expected at most {len(stored)}"
                    )
                return [stored[i] for i in chosen]
            case "t2vparser":
                return segment_indices(count, rate, self.frames, span=span, draws=draws)
        raise ValueError(f"sampler: expected one of {', '.join(get_args(Sampler))}, got {self.sampler!r}")


class SamplingSettings(Protocol):
    """What says which frames to take, under the names that a config has for the fields of `Sampling`."""

    @property
    def frames(self) -> int: ...

    @property
    def sampling(self) -> Sampler: ...

    @property
    def sample_rate(self) -> float: ...

    @property
    def sampling_divisor(self) -> int: ...

    @property
    def sampling_slice(self) -> Slice: ...


def sampling_of(settings: SamplingSettings, clip: Clip | None = None, seed: str | None = None) -> Sampling:
    """Which frames of a clip to take, of a whole file without one; with a seed those of a training sample."""
    return Sampling(
        frames=settings.frames,
        sampler=settings.sampling,
        sample_rate=settings.sample_rate,
        divisor=settings.sampling_divisor,
        slice=settings.sampling_slice,
        start=None if clip is None else clip.start,
        end=None if clip is None else clip.end,
        seed=seed,
    )


def frame_indices(
    count: int,
    rate: float,
    frames: int,
    *,
    sample_rate: float = 1.0,
    start: float | None = None,
    end: float | None = None,
) -> list[int]:
    """The frames sampled from a clip: one every 1 / sample_rate seconds, thinned evenly where too many.

    With first and last the ends of the span in frames, stride = round(rate / sample_rate), half to even, and
    P = first, first + stride, ... <= last: P itself where |P| = frames, P at the whole parts of an even
    division of 0 .. |P| - 1 where |P| > frames, and otherwise the whole parts of an even division of
    first .. last, which repeats frames of a clip shorter than `frames`.

    Args:
        count: frames that decode, at least 1.
        rate: average frames per second of the stream, above 0.
        frames: how many to choose, at least 1.
        sample_rate: frames per second wanted, above 0; the stride it gives must not round to 0.
        start, end: span in seconds, not negative.  A reversed span is turned round, an empty one becomes 1 s.

    Returns: `frames` indices, ascending, 0 <= index < count.

    Raises:
        ValueError: an argument outside its range, a stride of 0, or a span that begins after the last frame.

    Source: the sampling of the released DiscoVLA code, https://github.com/LunarShen/DsicoVLA.
    """
    _check(count, rate, frames, sample_rate)
    first, last = _span(count, float(rate), start, end)
    stride = _stride(float(rate), sample_rate)
    positions = range(first, last + 1, stride)
    if len(positions) == frames:
        return list(positions)
    if len(positions) > frames:
        return [positions[i] for i in _evenly(0, len(positions) - 1, frames)]
    return _evenly(first, last, frames)


def second_indices(
    count: int,
    rate: float,
    *,
    sample_rate: float = 1.0,
    span: Span = (None, None),
) -> list[int]:
    """The frames CLIP4Clip reads: of each second, the first of each of `sample_rate` equal parts.

    With R = floor(rate) and k = sample_rate, the frames floor(s R) + j floor(R / k), j < k, for every second
    s = start, start + 1, ... <= end, as long as there are any: the truncated rate runs behind the true time.

    Args:
        count, rate: as `frame_indices`; the rate at least 1.
        sample_rate: frames of a second, a whole number, at most R.
        span: start and end in seconds, as `frame_indices`.

    Returns: at least one index, ascending.

    Raises:
        ValueError: an argument outside its range, or a span that begins after the last frame.

    Source: CLIP4Clip's extraction of frames, https://github.com/ArrowLuo/CLIP4Clip.
    """
    _check(count, rate, 1, sample_rate)
    _span(count, rate, *span)
    whole, wanted = int(rate), int(sample_rate)
    if wanted != sample_rate or not 1 <= wanted <= whole:
        raise ValueError(
            f"sample_rate: expected a whole number of frames of a second, at most the {whole} of a clip with "
            f"{rate:g} a second, got {sample_rate:g}"
        )
    start, end = _times(*span)
    offsets = range(0, whole, whole // wanted)[:wanted]
    found: list[int] = []
    second = 0
    while (base := int((start + second) * whole)) < count and (end is None or start + second <= end):
        found += [base + offset for offset in offsets if base + offset < count]
        second += 1
    return found


def sliced(read: list[int], frames: int, how: Slice) -> list[int]:
    """At most `frames` of the frames read: evenly spaced with both ends, the first or the last of them.

    Source: CLIP4Clip's `slice_framepos` 2, 0 and 1.
    """
    if frames < 1:
        raise ValueError(f"frames: expected at least 1, got {frames}")
    if len(read) <= frames:
        return read
    match how:
        case "even":
            return [read[i] for i in _evenly(0, len(read) - 1, frames)]
        case "first":
            return read[:frames]
        case "last":
            return read[-frames:]
    raise ValueError(f"slice: expected one of {', '.join(get_args(Slice))}, got {how!r}")


def stored_indices(
    count: int,
    rate: float,
    *,
    stored_rate: float = 5.0,
    span: Span = (None, None),
) -> list[int]:
    """The frames a copy of the clip with `stored_rate` frames a second would hold: those shown at i / r.

    Index i is floor(i rate / r), from the first frame of the span to its last; a clip with fewer frames a
    second than that repeats them.

    Args:
        count, rate, span: as `frame_indices`.
        stored_rate: r, above 0.

    Returns: at least one index, ascending.

    Raises:
        ValueError: an argument outside its range, or a span that begins after the last frame.
    """
    _check(count, rate, 1, stored_rate)
    first, last = _span(count, rate, *span)
    number = int((last - first) * stored_rate / rate) + 1
    return [min(first + int(i * rate / stored_rate), last) for i in range(number)]


def divided(number: int, divisor: int, frames: int, draws: random.Random | None = None) -> list[int]:
    """Which of `number` stored frames CLIP2Video takes: floor(number / divisor) evenly, thinned to `frames`.

    With a generator, and where there were too many, all chosen but the first and the last move among the
    divided ones by integers from [-h, h), h half the distance of the first two, unless h <= 2.

    Args:
        number: stored frames.
        divisor: `feature_framerate`, at least 1.
        frames: the most to take, at least 1.
        draws: the training sample's own generator; None in testing.

    Returns: at most `frames` places in the stored frames, ascending; none where number < divisor.

    Raises:
        ValueError: an argument outside its range.

    Source: the released CLIP2Video code, https://github.com/CryhanFang/CLIP2Video.
    """
    if divisor < 1 or frames < 1:
        raise ValueError(f"divisor, frames: expected at least 1 each, got {divisor} and {frames}")
    left = _evenly(0, number - 1, number // divisor)
    if len(left) <= frames:
        return left
    chosen = _evenly(0, len(left) - 1, frames)
    half = (chosen[1] - chosen[0]) // 2 if frames > 1 else 0
    if draws is not None and half > 2:
        chosen[1:-1] = [place + draws.randrange(-half, half) for place in chosen[1:-1]]
    return [left[place] for place in chosen]


def segment_indices(
    count: int,
    rate: float,
    frames: int,
    *,
    span: Span = (None, None),
    draws: random.Random | None = None,
) -> list[int]:
    """The frames T2VParser takes: one of each of `frames` segments of the clip.

    With the segment g = (N - 1) / frames, rounding half to even: round(g i) + floor(g / 2), or in training
    any of round(g i) .. round(g (i + 1)), both included, so that neighbours may share a frame.

    Args:
        count, rate, frames, span: as `frame_indices`; N is the frames of the span.
        draws: the training sample's own generator; None in testing.

    Returns: `frames` indices, ascending; a clip with fewer repeats them.

    Raises:
        ValueError: an argument outside its range, or a span that begins after the last frame.
    """
    _check(count, rate, frames, 1.0)
    first, last = _span(count, rate, *span)
    segment = (last - first) / frames
    edges = [first + round(segment * i) for i in range(frames + 1)]
    if draws is None:
        return [edge + int(segment / 2) for edge in edges[:-1]]
    return [draws.randint(low, high) for low, high in pairwise(edges)]


def _check(count: int, rate: float, frames: int, sample_rate: float) -> None:
    """Every range that does not depend on the span."""
    if count < 1:
        raise ValueError(f"count: expected at least 1 frame that decodes, got {count}")
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate: expected frames per second above 0, got {rate}")
    if frames < 1:
        raise ValueError(f"frames: expected at least 1, got {frames}")
    if not 0 < sample_rate < float("inf"):
        raise ValueError(f"sample_rate: expected frames per second above 0, got {sample_rate}")


def _stride(rate: float, sample_rate: float) -> int:
    """Frames from one sampled frame to the next."""
    stride = round(rate / sample_rate)
    if stride == 0:
        raise ValueError(
            f"sample_rate: {sample_rate:g} frames a second of a clip with {rate:g} rounds to a stride of 0 "
            f"frames; expected at most {2 * rate:g}"
        )
    return stride


def _times(start: float | None, end: float | None) -> tuple[float, float | None]:
    """A span in seconds, turned round where it is reversed and of 1 s where it is empty."""
    for name, value in (("start", start), ("end", end)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: expected seconds not below 0, got {value}")
    start = 0.0 if start is None else start
    if end is not None and start > end:
        return end, start
    return start, start + 1 if start == end else end


def _span(count: int, rate: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last frame between two times in seconds."""
    start, end = _times(start, end)
    first = int(start * rate)
    last = count - 1 if end is None else int(min(end * rate, count - 1))
    if first > last:
        raise ValueError(
            f"start: {start:g} s is frame {first}, the clip ends with {count - 1} ({count / rate:.3f} s)"
        )
    return first, last


def _evenly(first: int, last: int, number: int) -> list[int]:
    """Whole parts of `number` evenly spaced doubles from first to last, the last one exact."""
    if number < 2:
        return [first][:number]
    # The order of operations matters: a product just under a whole number chooses another frame.
    step = (last - first) / (number - 1)
    return [int(i * step + first) for i in range(number - 1)] + [last]
