"""What retrieval in the drawn world can and cannot show: ceilings from the facts, and two-way choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from discovla.drawn_world.scenes import Scene, backwards, clip_rng, make_scene
from discovla.drawn_world.wording import Facts, Statement, change_event, holds, phrase, tell

Kind = Literal["verb", "bind", "reversal"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A choice between two captions of one clip.

    clip, control: places in the split.  The control is another clip, for which neither caption was made:
    whoever prefers `true` there as often as on `clip` judges the text and not the video.
    played_backwards: the clip's frames are to be taken in reverse order; `true` is true of them then.
    """

    kind: Kind
    clip: int
    control: int
    true: str
    false: str
    played_backwards: bool = False


def make_probes(seed: int, split: str, count: int) -> list[Probe]:
    """Two-way choices for the first clips of a split.

    verb: both events are exchanged for others.  bind: the two actors exchange their events.  reversal: the
    caption of the clip against that of the clip played backwards, once each way.  Choices whose false caption
    happens to be true of the clip are left out.  All captions are in the plain wording, with every place.

    Args:
        seed, split: as the world was drawn.
        count: clips, at least 2.

    Raises:
        ValueError: fewer than two clips, so that there is no other one.
    """
    if count < 2:
        raise ValueError(f"count: expected at least 2 clips, one to be the other's control, got {count}")
    return [probe for index in range(count) for probe in _probes(seed, split, index, count)]


def ceiling(scenes: Sequence[Scene], statements: Sequence[Statement], facts: Facts = "all") -> float:
    """Text-to-video R@1 in percent of a perfect reader that knows only some of the facts.

    It picks at random among the videos its caption is true of: mean over captions of 100 / (such videos).

    Args:
        scenes: v, the gallery.
        statements: v, what the caption of each says.
        facts: which the reader knows.
    """
    matches = [sum(holds(statement, scene, facts) for scene in scenes) for statement in statements]
    return 100 * sum(1 / n for n in matches) / len(matches)


def _probes(seed: int, split: str, index: int, count: int) -> Iterator[Probe]:
    """All choices about one clip."""
    rng = clip_rng(seed, split, index, "probes")
    scene = make_scene(seed, split, index)
    true, control = tell(scene), (index + 1 + int(rng.integers(count - 1))) % count
    first, second = true.clauses
    verb = replace(true, clauses=(change_event(first, rng), change_event(second, rng)))
    falses: list[tuple[Kind, Statement]] = [("verb", verb), ("bind", _exchanged(true))]
    for kind, false in falses:
        sensible = all(c.colour != c.colour_to for c in false.clauses)
        if sensible and not holds(false, scene):
            yield Probe(kind=kind, clip=index, control=control, true=phrase(true), false=phrase(false))
    reverse = tell(backwards(scene))
    if holds(reverse, scene):
        return
    ways = phrase(true), phrase(reverse)
    yield Probe(kind="reversal", clip=index, control=control, true=ways[0], false=ways[1])
    yield Probe(
        kind="reversal", clip=index, control=control, true=ways[1], false=ways[0], played_backwards=True
    )


def _exchanged(statement: Statement) -> Statement:
    """The statement with the two events, and their places, given to each other's actor."""
    first, second = statement.clauses
    a = replace(second, shape=first.shape, colour=first.colour)
    b = replace(first, shape=second.shape, colour=second.colour)
    return replace(statement, clauses=(a, b))
