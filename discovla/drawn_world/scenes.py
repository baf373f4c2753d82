"""Scenes of drawn clips: two actors with one event each, and distractors that no caption mentions."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from discovla.drawn_world.drawing import (
    COLOURS,
    JITTER,
    PLACES,
    RADII,
    SHAPES,
    Look,
    Thing,
    expose,
    ground,
    picture,
)

FRAMES = 32
RATE = 4  # frames a second
LOOK = Look(clutter=(3, 7), noise=2.5)
EVENTS = {  # kind -> probability
    "moves": 0.34,
    "stays": 0.14,
    "appears": 0.13,
    "disappears": 0.13,
    "turns": 0.14,
    "grows": 0.06,
    "shrinks": 0.06,
}
# The hash of a scene's facts assigns it to one of eight parts.  Splits have separate parts, so no scene is
# in two splits, although a clip depends on (seed, split, index) alone.  Each sibling has its own part.
PARTS = {"train": (2, 3), "val": (0,), "test": (1,), "siblings": (4, 5, 6, 7)}
SIBLINGS = 4  # clips of a group, with the same two actors

_GROW = {"grows": "small", "shrinks": "big"}
_BACKWARDS = {"appears": "disappears", "disappears": "appears", "grows": "shrinks", "shrinks": "grows"}
_THEN = 0.8  # share of "then" among scenes where no actor stays; about 0.6 of all scenes
_LAST = 0.86  # latest end of an event: 8 of 32 frames are sampled, the last at 28/32
_STREAMS = ("actors", "scene", "pixels", "captions", "probes", "reversed")  # independent random numbers

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Actor:
    """An object and its event; colour, size, place and `at` hold before the event."""

    shape: str
    colour: str
    size: str
    place: str
    kind: str
    """A key of `EVENTS`."""
    start: float
    """Of the event, as a share of the clip's length."""
    end: float
    at: tuple[float, float]
    """Centre in pixels before the event."""
    to: tuple[float, float]
    """Centre in pixels after the event."""
    colour_to: str | None = None
    """Colour after the event, if it changes."""
    place_to: str | None = None
    """Place after the event, if it changes."""

    def seen(self, time: float) -> Thing | None:
        """Return the object at a time (share of the clip's length), or None while it is invisible."""
        done = min(max((time - self.start) / (self.end - self.start), 0.0), 1.0)
        after = done >= 0.5
        if (self.kind == "appears" and not after) or (self.kind == "disappears" and after):
            return None
        radius = RADII[self.size]
        if self.kind in _GROW:
            other = RADII["big" if self.size == "small" else "small"]
            radius += done * (other - radius)
        colour = self.colour_to if self.colour_to is not None and after else self.colour
        x, y = (a + done * (b - a) for a, b in zip(self.at, self.to, strict=True))
        return Thing(shape=self.shape, colour=colour, x=x, y=y, radius=radius)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Two actors and the distractors."""

    actors: tuple[Actor, Actor]
    order: str
    """ "then" if the first event ends before the second begins, "while" if they overlap."""
    distractors: tuple[Thing, ...]

    @property
    def facts(self) -> tuple[object, ...]:
        """Return everything that a caption can express."""
        acts = [(a.shape, a.colour, a.size, a.place, a.kind, a.colour_to, a.place_to) for a in self.actors]
        return (self.order, *(acts if self.order == "then" else sorted(acts, key=str)))

    def seen(self, time: float) -> tuple[list[Thing], list[Thing]]:
        """Return the actors visible at a time (share of the clip's length), and the distractors."""
        actors = [thing for actor in self.actors if (thing := actor.seen(time)) is not None]
        return actors, list(self.distractors)


def clip_rng(seed: int, split: str, index: int, stream: str) -> np.random.Generator:
    """Return the random generator of one clip for one purpose, a name in `_STREAMS`."""
    return np.random.default_rng((seed, list(PARTS).index(split), index, _STREAMS.index(stream)))


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Make the scene of one clip, which depends on the arguments alone."""
    group = index // SIBLINGS if split == "siblings" else index
    looks = _looks(clip_rng(seed, split, group, "actors"))
    parts = PARTS[split]
    if split == "siblings":
        parts = (parts[index % SIBLINGS],)
    rng = clip_rng(seed, split, index, "scene")
    while True:
        scene = _scene(rng, looks)
        if zlib.crc32(repr(scene.facts).encode()) % 8 in parts:
            return scene


def film(scene: Scene, seed: int, split: str, index: int) -> np.ndarray:
    """Draw the frames of a clip.

    Returns:
        f y x 3, uint8.
    """
    rng = clip_rng(seed, split, index, "pixels")
    canvas = ground(rng, LOOK)
    flicker = 1 + rng.uniform(0, 0.05) * np.sin(
        rng.uniform(0, 6.28) + rng.uniform(0.3, 2) * np.arange(FRAMES)
    )
    frames = []
    for i in range(FRAMES):
        actors, distractors = scene.seen(i / FRAMES)
        frames.append(expose(picture(canvas, distractors + actors), rng, LOOK, float(flicker[i])))
    return np.stack(frames)


def backwards(scene: Scene) -> Scene:
    """Return the scene of the clip played backwards."""

    def back(a: Actor) -> Actor:
        size = a.size if a.kind not in _GROW else ("big" if a.size == "small" else "small")
        ends = {"size": size, "kind": _BACKWARDS.get(a.kind, a.kind), "at": a.to, "to": a.at}
        if a.place_to is not None:
            ends |= {"place": a.place_to, "place_to": a.place}
        if a.colour_to is not None:
            ends |= {"colour": a.colour_to, "colour_to": a.colour}
        return replace(a, start=1 - a.end, end=1 - a.start, **ends)

    first, second = scene.actors
    return replace(scene, actors=(back(second), back(first)))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Choose one of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def other(rng: np.random.Generator, options: Sequence[T], *taken: T | None) -> T:
    """Choose one of the options that are not taken."""
    return pick(rng, [o for o in options if o not in taken])


def centre(rng: np.random.Generator, place: str) -> tuple[float, float]:
    """Choose a centre near that of a place, in pixels."""
    dx, dy = rng.uniform(-JITTER, JITTER, 2)
    x, y = PLACES[place]
    return x + float(dx), y + float(dy)


def event_kind(rng: np.random.Generator) -> str:
    """Choose a kind of event by its probability."""
    return list(EVENTS)[int(np.searchsorted(np.cumsum(list(EVENTS.values())), rng.random() * 0.999999))]


def _looks(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Choose shape, colour and size of two actors that differ in shape or colour."""
    pairs = len(SHAPES) * len(COLOURS)
    chosen = rng.choice(pairs, 2, replace=False)
    return [
        (SHAPES[i % len(SHAPES)], list(COLOURS)[i // len(SHAPES)], pick(rng, list(RADII)))
        for i in map(int, chosen)
    ]


def _scene(rng: np.random.Generator, looks: list[tuple[str, str, str]]) -> Scene:
    """Make a scene of two actors; no two objects share a place, or both shape and colour."""
    kinds = [event_kind(rng), event_kind(rng)]
    while kinds == ["stays", "stays"]:
        kinds[1] = event_kind(rng)
    order = "then" if "stays" not in kinds and rng.random() < _THEN else "while"
    places = [str(p) for p in rng.permutation(list(PLACES))]
    used = {look[:2] for look in looks}
    actors = []
    for look, kind, (start, end) in zip(looks, kinds, _times(rng, order), strict=True):
        shape, colour, size = look
        place = places.pop()
        place_to = places.pop() if kind == "moves" else None
        colour_to = None
        if kind == "turns":
            colour_to = other(rng, list(COLOURS), *(c for s, c in used if s == shape))
            used.add((shape, colour_to))
        at = centre(rng, place)
        to = centre(rng, place_to) if place_to else at
        size = _GROW.get(kind, size)
        actor = Actor(
            shape=shape, colour=colour, size=size, place=place, kind=kind, start=start, end=end, at=at, to=to
        )
        actors.append(replace(actor, colour_to=colour_to, place_to=place_to))
    if rng.random() < 0.5:
        # All siblings of a group have their actors in one order; the first to act must vary.
        (a, b) = actors
        actors = [replace(b, start=a.start, end=a.end), replace(a, start=b.start, end=b.end)]
    return Scene(actors=(actors[0], actors[1]), order=order, distractors=_distractors(rng, places, used))


def _times(rng: np.random.Generator, order: str) -> list[tuple[float, float]]:
    """Choose start and end of both events, as shares of the clip's length."""
    first, second = rng.uniform(0.12, 0.3, 2)
    if order == "then":
        a, b = rng.uniform(0.06, 0.47 - first), rng.uniform(0.5, _LAST - second)
        return [(float(a), float(a + first)), (float(b), float(b + second))]
    start = rng.uniform(0.1, _LAST - 0.05 - first)
    late = start + rng.uniform(-0.04, 0.04)
    return [(float(start), float(start + first)), (float(late), float(late + first))]


def _distractors(
    rng: np.random.Generator, places: list[str], used: set[tuple[str, str]]
) -> tuple[Thing, ...]:
    """Choose up to two objects without events that differ from the actors in shape or colour."""
    things = []
    for _ in range(rng.choice(3, p=(0.3, 0.5, 0.2))):
        free = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in used]
        shape, colour = pick(rng, free)
        used.add((shape, colour))
        x, y = centre(rng, places.pop())
        things.append(Thing(shape=shape, colour=colour, x=x, y=y, radius=RADII[pick(rng, list(RADII))]))
    return tuple(things)
