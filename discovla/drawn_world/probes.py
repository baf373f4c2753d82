"""Diagnostics of retrieval in the drawn world: upper bounds of R@1, and choices between two captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from discovla.drawn_world.scenes import Scene, backwards, clip_rng, make_scene
from discovla.drawn_world.wording import Facts, Statement, change_event, holds, phrase, tell

Kind = Literal["verb", "bind", "reversal"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A choice between a true and a false caption of one clip."""

    kind: Kind
    clip: int
    """Index in the split."""
    control: int
    """Index of a clip that neither caption describes: a model that prefers `true` there as often as on `clip`
    judges the text, not the video."""
    true: str
    false: str
    played_backwards: bool = False
    """True if `true` describes the frames of the clip in reverse order."""


def make_probes(seed: int, split: str, count: int) -> list[Probe]:
    """Make the choices for the first clips of a split.

    In the false caption of a `verb` probe both events are replaced by others; in that of a `bind` probe the
    two actors exchange their events; a `reversal` probe opposes the captions of the clip played forwards and
    backwards, once for each direction.  Probes whose false caption is also true of the clip are left out.
    All captions have the plain wording, with every place.

    Args:
        seed, split: of the drawn world.
        count: number of clips, at least 2.

    Raises:
        ValueError: fewer than two clips, so that a clip has no control.
    """
    if count < 2:
        raise ValueError(f"count: expected at least 2 clips, one as a control, got {count}")
    return [probe for index in range(count) for probe in _probes(seed, split, index, count)]


def ceiling(scenes: Sequence[Scene], statements: Sequence[Statement], facts: Facts = "all") -> float:
    """Return the highest text-to-video R@1, in percent, of a model that knows only some of the facts.

    Such a model chooses at random among the videos that its caption describes: the mean over captions of
    100 / (number of such videos).

    Args:
        scenes: v, the gallery.
        statements: v, the caption of each scene.
        facts: known to the model.
    """
    matches = [sum(holds(statement, scene, facts) for scene in scenes) for statement in statements]
    return 100 * sum(1 / n for n in matches) / len(matches)


def _probes(seed: int, split: str, index: int, count: int) -> Iterator[Probe]:
    """Make the probes of one clip."""
    rng = clip_rng(seed, split, index, "probes")
    scene = make_scene(seed, split, index)
    true, control = tell(scene), (index + 1 + int(rng.integers(count - 1))) % count
    first, second = true.clauses
    verb = replace(true, clauses=(change_event(first, rng), change_event(second, rng)))
    false_statements: list[tuple[Kind, Statement]] = [("verb", verb), ("bind", _exchanged(true))]
    for kind, false in false_statements:
        turns_into_itself = any(clause.colour == clause.colour_to for clause in false.clauses)
        if not turns_into_itself and not holds(false, scene):
            yield Probe(kind=kind, clip=index, control=control, true=phrase(true), false=phrase(false))
    reverse = tell(backwards(scene))
    if holds(reverse, scene):
        return
    forwards, backward = phrase(true), phrase(reverse)
    yield Probe(kind="reversal", clip=index, control=control, true=forwards, false=backward)
    yield Probe(
        kind="reversal", clip=index, control=control, true=backward, false=forwards, played_backwards=True
    )


def _exchanged(statement: Statement) -> Statement:
    """Exchange the events of the two actors, with their places."""
    first, second = statement.clauses
    a = replace(second, shape=first.shape, colour=first.colour)
    b = replace(first, shape=second.shape, colour=second.colour)
    return replace(statement, clauses=(a, b))
