"""Which frames of a clip the model sees."""

from __future__ import annotations


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


def _span(count: int, rate: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last frame between two times in seconds."""
    for name, value in (("start", start), ("end", end)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name}: expected seconds not below 0, got {value}")
    start = 0.0 if start is None else start
    if end is not None and start > end:
        start, end = end, start
    elif start == end:
        end = start + 1
    first = int(start * rate)
    last = count - 1 if end is None else int(min(end * rate, count - 1))
    if first > last:
        raise ValueError(
            f"start: {start:g} s is frame {first}, the clip ends with {count - 1} ({count / rate:.3f} s)"
        )
    return first, last


def _evenly(first: int, last: int, number: int) -> list[int]:
    """Whole parts of `number` evenly spaced doubles from first to last, the last one exact."""
    if number == 1:
        return [first]
    # The order of operations matters: a product just under a whole number chooses another frame.
    step = (last - first) / (number - 1)
    return [int(i * step + first) for i in range(number - 1)] + [last]
