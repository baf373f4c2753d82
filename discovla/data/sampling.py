"""Frame sampling: which frames of a clip the model sees, one function per published method."""

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
    """Options of one sampling.

    frames: frames the model sees; `clip4clip` and `clip2video` return fewer of a clip that has no more.
    sampler: the method, see the functions below.
    sample_rate: frames a second, sampled or (`clip2video`) stored; `t2vparser` ignores it.
    divisor: divides the number of stored frames; `clip2video` only.
    slice: which frames are kept where too many are sampled; `clip4clip` only.
    start, end: span in seconds.
    seed: seed of the random shifts of `clip2video` and `t2vparser` in training; None for evaluation.
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
    def is_random(self) -> bool:
        """True if training samples other frames in every epoch."""
        return self.sampler in ("clip2video", "t2vparser")

    def candidates(self, count: int, rate: float) -> list[int]:
        """Return every frame that `indices` can return, with any seed or none: ascending, without repeats.

        Raises:
            ValueError: see the functions below.
        """
        span = (self.start, self.end)
        indices = replace(self, seed=None).indices(count, rate)
        match self.sampler:
            case "clip2video":
                stored = stored_indices(count, rate, stored_rate=self.sample_rate, span=span)
                indices += [stored[i] for i in divide_stored(len(stored), self.divisor, len(stored))]
            case "t2vparser":
                _check(count, rate, 1, 1.0)
                first, last = _span(count, rate, *span)
                indices += range(first, last + 1)
        return sorted(set(indices))

    def indices(self, count: int, rate: float) -> list[int]:
        """Return the sampled frames of a clip with `count` frames at `rate` frames a second, ascending.

        Raises:
            ValueError: see the functions below.
        """
        span = (self.start, self.end)
        # The augmentation has the same seed: the prefix keeps the two from repeating each other's draws.
        generator = None if self.seed is None else random.Random(f"frames/{self.seed}")
        match self.sampler:
            case "discovla":
                start, end = span
                return frame_indices(
                    count, rate, self.frames, sample_rate=self.sample_rate, start=start, end=end
                )
            case "clip4clip":
                indices = second_indices(count, rate, sample_rate=self.sample_rate, span=span)
                return slice_indices(indices, self.frames, self.slice)
            case "clip2video":
                stored = stored_indices(count, rate, stored_rate=self.sample_rate, span=span)
                places = divide_stored(len(stored), self.divisor, self.frames, generator)
                if not places:
                    raise ValueError(
                        f"sampling_divisor: expected at most the {len(stored)} frames stored at "
                        f"{self.sample_rate:g} a second, found {self.divisor}, which leaves none"
                    )
                return [stored[place] for place in places]
            case "t2vparser":
                return segment_indices(count, rate, self.frames, span=span, generator=generator)
        raise ValueError(f"sampler: expected one of {', '.join(get_args(Sampler))}, found {self.sampler!r}")


class SamplingConfig(Protocol):
    """A config with the sampling options, under their names in `DataConfig`."""

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


def clip_sampling(config: SamplingConfig, clip: Clip | None = None, seed: str | None = None) -> Sampling:
    """Return the sampling of a clip, or of a whole file if `clip` is None.

    Args:
        seed: seed of a training sample; None for evaluation.
    """
    return Sampling(
        frames=config.frames,
        sampler=config.sampling,
        sample_rate=config.sample_rate,
        divisor=config.sampling_divisor,
        slice=config.sampling_slice,
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
    """Sample frames as DiscoVLA does: one every 1 / sample_rate seconds, evenly thinned to `frames`.

    Let first and last be the ends of the span in frames, stride = round(rate / sample_rate), half to even,
    and P = first, first + stride, ... <= last.  If |P| = frames, the result is P.  If |P| > frames, it is P
    at the integer parts of an even division of 0 .. |P| - 1.  Otherwise it is the integer parts of an even
    division of first .. last, which repeats frames of a clip shorter than `frames`.

    Args:
        count: frames that decode, at least 1.
        rate: average frames per second of the stream, above 0.
        frames: frames to sample, at least 1.
        sample_rate: frames to sample per second, above 0; the stride must not round to 0.
        start, end: span in seconds, not negative.  A reversed span is swapped, an empty one becomes 1 s.

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
    """Sample frames as CLIP4Clip does: the first frame of each of `sample_rate` equal parts of every second.

    With R = floor(rate) and k = sample_rate: the frames floor(s R) + j floor(R / k), j < k, of every second
    s = start, start + 1, ... <= end.  As R truncates the rate, the frames lag behind the true time.

    Args:
        count, rate: see `frame_indices`; the rate is at least 1.
        sample_rate: frames per second, a whole number, at most R.
        span: start and end in seconds, see `frame_indices`.

    Returns: at least one index, ascending.

    Raises:
        ValueError: an argument outside its range, or a span that begins after the last frame.

    Source: CLIP4Clip's extraction of frames, https://github.com/ArrowLuo/CLIP4Clip.
    """
    _check(count, rate, 1, sample_rate)
    _span(count, rate, *span)
    whole_rate, parts = int(rate), int(sample_rate)
    if parts != sample_rate or not 1 <= parts <= whole_rate:
        if whole_rate < 1:
            raise ValueError(f"rate: expected at least 1 fps for sampling = 'clip4clip', found {rate:g}")
        raise ValueError(
            f"sample_rate: expected a whole number of 1..{whole_rate} for a {rate:g} fps clip, "
            f"found {sample_rate:g}"
        )
    start, end = _times(*span)
    offsets = range(0, whole_rate, whole_rate // parts)[:parts]
    indices: list[int] = []
    second = 0
    while (base := int((start + second) * whole_rate)) < count and (end is None or start + second <= end):
        indices += [base + offset for offset in offsets if base + offset < count]
        second += 1
    return indices


def slice_indices(indices: list[int], frames: int, slice: Slice) -> list[int]:
    """Keep at most `frames` indices: evenly spaced with both ends, the first or the last.

    Source: CLIP4Clip's `slice_framepos` 2, 0 and 1.
    """
    if frames < 1:
        raise ValueError(f"frames: expected at least 1, found {frames}")
    if len(indices) <= frames:
        return indices
    match slice:
        case "even":
            return [indices[i] for i in _evenly(0, len(indices) - 1, frames)]
        case "first":
            return indices[:frames]
        case "last":
            return indices[-frames:]
    raise ValueError(f"slice: expected one of {', '.join(get_args(Slice))}, found {slice!r}")


def stored_indices(
    count: int,
    rate: float,
    *,
    stored_rate: float = 5.0,
    span: Span = (None, None),
) -> list[int]:
    """Return the frames that a copy of the clip at `stored_rate` frames a second would store.

    Stored frame i is floor(i rate / stored_rate), from the first frame of the span to its last.  A clip with
    a lower rate repeats frames.

    Args:
        count, rate, span: see `frame_indices`.
        stored_rate: frames per second, above 0.

    Returns: at least one index, ascending.

    Raises:
        ValueError: an argument outside its range, or a span that begins after the last frame.
    """
    _check(count, rate, 1, stored_rate)
    first, last = _span(count, rate, *span)
    number = int((last - first) * stored_rate / rate) + 1
    return [min(first + int(i * rate / stored_rate), last) for i in range(number)]


def divide_stored(
    number: int, divisor: int, frames: int, generator: random.Random | None = None
) -> list[int]:
    """Sample stored frames as CLIP2Video does: floor(number / divisor) of them evenly, thinned to `frames`.

    With a generator and more than `frames` left after the division, all but the first and the last index are
    shifted among the divided frames by integers from [-h, h), h half the first gap, if h > 2.

    Args:
        number: stored frames.
        divisor: CLIP2Video's `feature_framerate`, at least 1.
        frames: most frames to sample, at least 1.
        generator: random generator of the training sample; None for evaluation.

    Returns: at most `frames` places in the stored frames, ascending; none if number < divisor.

    Raises:
        ValueError: an argument outside its range.

    Source: the released CLIP2Video code, https://github.com/CryhanFang/CLIP2Video.
    """
    if divisor < 1 or frames < 1:
        raise ValueError(f"divisor, frames: expected at least 1 each, found {divisor} and {frames}")
    divided = _evenly(0, number - 1, number // divisor)
    if len(divided) <= frames:
        return divided
    places = _evenly(0, len(divided) - 1, frames)
    half = (places[1] - places[0]) // 2 if frames > 1 else 0
    if generator is not None and half > 2:
        places[1:-1] = [place + generator.randrange(-half, half) for place in places[1:-1]]
    return [divided[place] for place in places]


def segment_indices(
    count: int,
    rate: float,
    frames: int,
    *,
    span: Span = (None, None),
    generator: random.Random | None = None,
) -> list[int]:
    """Sample frames as T2VParser does: one of each of `frames` segments of the clip.

    With N frames in the span, g = (N - 1) / frames and rounding half to even, evaluation samples
    round(g i) + floor(g / 2) and training any frame of round(g i) .. round(g (i + 1)), both ends included, so
    that neighbouring segments may return the same frame.

    Args:
        count, rate, frames, span: see `frame_indices`.
        generator: random generator of the training sample; None for evaluation.

    Returns: `frames` indices, ascending; a clip with fewer frames repeats them.

    Raises:
        ValueError: an argument outside its range, or a span that begins after the last frame.
    """
    _check(count, rate, frames, 1.0)
    first, last = _span(count, rate, *span)
    segment = (last - first) / frames
    edges = [first + round(segment * i) for i in range(frames + 1)]
    if generator is None:
        return [edge + int(segment / 2) for edge in edges[:-1]]
    return [generator.randint(low, high) for low, high in pairwise(edges)]


def _check(count: int, rate: float, frames: int, sample_rate: float) -> None:
    """Check every range that does not depend on the span."""
    if count < 1:
        raise ValueError(f"count: expected at least 1 frame that decodes, found {count}")
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate: expected frames per second above 0, found {rate}")
    if frames < 1:
        raise ValueError(f"frames: expected at least 1, found {frames}")
    if not 0 < sample_rate < float("inf"):
        raise ValueError(f"sample_rate: expected frames per second above 0, found {sample_rate}")


def _stride(rate: float, sample_rate: float) -> int:
    """Return the distance of two sampled frames."""
    stride = round(rate / sample_rate)
    if stride == 0:
        raise ValueError(
            f"sample_rate: expected at most {2 * rate:g} for a {rate:g} fps clip, found {sample_rate:g}, "
            "which rounds to a stride of 0 frames"
        )
    return stride


def _times(start: float | None, end: float | None) -> tuple[float, float | None]:
    """Return a span in seconds: swapped if reversed, 1 s long if empty."""
    for name, value in (("start", start), ("end", end)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: expected seconds not below 0, found {value}")
    start = 0.0 if start is None else start
    if end is not None and start > end:
        return end, start
    return start, start + 1 if start == end else end


def _span(count: int, rate: float, start: float | None, end: float | None) -> tuple[int, int]:
    """Return the first and the last frame between two times in seconds."""
    start, end = _times(start, end)
    first = int(start * rate)
    last = count - 1 if end is None else int(min(end * rate, count - 1))
    if first > last:
        raise ValueError(
            f"start: expected a time before the end of the clip ({count / rate:.3f} s, {count} frames), "
            f"found {start:g} s"
        )
    return first, last


def _evenly(first: int, last: int, number: int) -> list[int]:
    """Return the integer parts of `number` evenly spaced doubles from first to last, the last one exact."""
    if number < 2:
        return [first][:number]
    # The order of operations matters: a product just under a whole number chooses another frame.
    step = (last - first) / (number - 1)
    return [int(i * step + first) for i in range(number - 1)] + [last]
