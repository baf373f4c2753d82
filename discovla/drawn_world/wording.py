"""Captions of the drawn world, in a closed vocabulary, and a check of their truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from discovla.drawn_world.drawing import COLOURS, PLACES, RADII, SHAPES, Thing
from discovla.drawn_world.scenes import Actor, Scene, event_kind, other, pick

CONTEXT_LENGTH = 32  # captions have at most 30 tokens, start and end included
VERBS = {  # event -> wordings, the plain one first
    "moves": ("moves", "goes"),
    "stays": ("stays", "remains"),
    "appears": ("appears",),
    "disappears": ("disappears",),
    "turns": ("turns", "becomes"),
    "grows": ("grows",),
    "shrinks": ("shrinks",),
}
ORDERS = {"then": ("then", "and then"), "while": ("while", "as")}
WORDS = tuple(
    sorted(
        {"a", "an", "the", "and", "there", "is", "at", "on", "in", "from", "to", "empty", "picture"}
        | {*SHAPES, *COLOURS, *RADII}
        | {word for place in PLACES for word in place.split()}
        | {
            word
            for table in (VERBS, ORDERS)
            for ways in table.values()
            for way in ways
            for word in way.split()
        }
    )
)
EMPTY = "an empty picture"

Facts = Literal["all", "orderless", "actors"]

# Probabilities that a caption mentions a size, a place, a distractor, and of an error in a still caption.
_SAY_SIZE, _SAY_PLACE, _SAY_DISTRACTOR, _SLIP = 0.4, 0.7, 0.5, 0.05
_ON = {"left": "on", "right": "on", "middle": "in"}  # all other places: at
_ALIKE = {"disappears": "appears", "shrinks": "grows"}  # equal if the direction of time is ignored


@dataclass(frozen=True, kw_only=True)
class Clause:
    """Attributes of one object in a caption, None if not mentioned; `kind` is None without an event."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None
    kind: str | None = None
    place_to: str | None = None
    colour_to: str | None = None


@dataclass(frozen=True, kw_only=True)
class Statement:
    """Meaning of a caption: two events and their order."""

    clauses: tuple[Clause, Clause]
    order: str


def tell(scene: Scene, rng: np.random.Generator | None = None) -> Statement:
    """Make a true statement about a scene.

    Args:
        rng: chooses the sizes and places to leave out and the order of the actors in a "while"; None leaves
            out the sizes alone.
    """
    clauses = [_tell(actor, rng) for actor in scene.actors]
    if rng is not None and scene.order == "while" and rng.random() < 0.5:
        clauses.reverse()
    return Statement(clauses=(clauses[0], clauses[1]), order=scene.order)


def phrase(statement: Statement, rng: np.random.Generator | None = None) -> str:
    """Word a statement as a caption; rng chooses among wordings, None takes the plain one."""
    first, second = (phrase_clause(clause, rng) for clause in statement.clauses)
    return f"{first} {_way(ORDERS[statement.order], rng)} {second}"


def phrase_clause(clause: Clause, rng: np.random.Generator | None = None) -> str:
    """Word a clause; see `phrase`."""
    noun = " ".join(word for word in ("a", clause.size, clause.colour, clause.shape) if word)
    where = f"{_ON.get(clause.place, 'at')} the {clause.place}" if clause.place else ""
    if clause.kind is None:
        return f"{noun} {where}".rstrip()
    verb = _way(VERBS[clause.kind], rng)
    if clause.kind == "moves":
        ends = [f"from the {clause.place}"] if clause.place else []
        ends += [f"to the {clause.place_to}"] if clause.place_to else []
        return " ".join([noun, verb, *ends])
    if clause.colour_to:
        verb = f"{verb} {clause.colour_to}"
    before = where and clause.kind != "appears" and rng is not None and rng.random() < 0.5
    return " ".join(word for word in ((noun, where, verb) if before else (noun, verb, where)) if word)


def still(clauses: Sequence[Clause], rng: np.random.Generator) -> str:
    """Word a caption of one picture."""
    if not clauses:
        return EMPTY
    opening = "there is " if rng.random() < 0.2 else ""
    return opening + " and ".join(phrase_clause(clause, rng) for clause in clauses)


def describe(thing: Thing, rng: np.random.Generator, slip: float = 0.0) -> Clause:
    """Describe an object in a picture; each attribute is wrong with probability `slip`."""

    def read(value: str, options: Sequence[str]) -> str:
        return other(rng, options, value) if rng.random() < slip else value

    return Clause(
        shape=read(thing.shape, SHAPES),
        colour=read(thing.colour, list(COLOURS)),
        size=read(thing.size, list(RADII)) if rng.random() < _SAY_SIZE else None,
        place=read(thing.place, list(PLACES)) if rng.random() < _SAY_PLACE else None,
    )


def frame_caption(scene: Scene, time: float, rng: np.random.Generator) -> str:
    """Caption one frame as an image captioner would: with errors, and sometimes with a distractor."""
    actors, distractors = scene.seen(time)
    things = [*actors]
    if distractors and rng.random() < _SAY_DISTRACTOR:
        things.append(pick(rng, distractors))
    return still([describe(things[i], rng, _SLIP) for i in rng.permutation(len(things))], rng)


def holds(statement: Statement, scene: Scene, facts: Facts = "all") -> bool:
    """Return True if a statement is true of a scene.

    Args:
        facts: facts to compare.  "orderless" ignores everything that only the order of frames shows: the
            connector and the direction of events.  "actors" compares only colour and shape of the actors.
    """
    a, b = statement.clauses
    first, second = scene.actors
    if facts == "all" and statement.order != scene.order:
        return False
    straight = _fits(a, first, facts) and _fits(b, second, facts)
    if facts == "all" and scene.order == "then":
        return straight
    return straight or (_fits(a, second, facts) and _fits(b, first, facts))


def change_event(clause: Clause, rng: np.random.Generator) -> Clause:
    """Replace the event of a clause by another one at the same place."""
    kind = event_kind(rng)
    while kind == clause.kind:
        kind = event_kind(rng)
    return replace(
        clause,
        kind=kind,
        place_to=other(rng, list(PLACES), clause.place) if kind == "moves" else None,
        colour_to=other(rng, list(COLOURS), clause.colour) if kind == "turns" else None,
    )


def token_ids() -> tuple[int, ...]:
    """Return all token ids of captions of this world, with padding, start and end, ascending."""
    # Imported here because it takes seconds and captions need no tokenizer.
    from discovla.data.tokens import Tokenizer

    ids, _ = Tokenizer(CONTEXT_LENGTH).encode(WORDS)
    return tuple(sorted({0, *ids.unique().tolist()}))


def _tell(actor: Actor, rng: np.random.Generator | None) -> Clause:
    """Describe an actor; rng chooses the attributes to leave out."""
    clause = Clause(
        shape=actor.shape,
        colour=actor.colour,
        place=actor.place,
        kind=actor.kind,
        place_to=actor.place_to,
        colour_to=actor.colour_to,
    )
    if rng is None:
        return clause
    if rng.random() < _SAY_SIZE:
        clause = replace(clause, size=actor.size)
    if rng.random() >= _SAY_PLACE:
        return replace(clause, place=None, place_to=None)
    # In two of five moves one end is left out.
    match rng.integers(5) if actor.kind == "moves" else 4:
        case 0:
            return replace(clause, place=None)
        case 1:
            return replace(clause, place_to=None)
    return clause


def _way(ways: Sequence[str], rng: np.random.Generator | None) -> str:
    return ways[0] if rng is None else pick(rng, ways)


def _fits(clause: Clause, actor: Actor, facts: Facts) -> bool:
    """Return True if a clause is true of an actor."""
    if facts == "actors":
        return clause.shape == actor.shape and clause.colour == actor.colour
    if facts == "all":
        optional = ("colour", "colour_to", "place", "place_to", "size")
        same = all(getattr(clause, name) in (None, getattr(actor, name)) for name in optional)
        return same and clause.shape == actor.shape and clause.kind == actor.kind
    kind, actor_kind = (_ALIKE.get(k, k) for k in (clause.kind or "", actor.kind))
    size = clause.size is None or kind == "grows" or clause.size == actor.size
    places = {clause.place, clause.place_to} <= {actor.place, actor.place_to, None}
    colours = {clause.colour, clause.colour_to} <= {actor.colour, actor.colour_to, None}
    return kind == actor_kind and clause.shape == actor.shape and size and places and colours
