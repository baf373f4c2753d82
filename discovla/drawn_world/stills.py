"""Drawn pictures with captions, made while training: the data of the small CLIP of the drawn world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from discovla.data.dataset import Sample
from discovla.drawn_world.drawing import COLOURS, PLACES, RADII, SHAPES, Look, Thing, expose, ground, picture
from discovla.drawn_world.scenes import centre, event_kind, other, pick
from discovla.drawn_world.wording import EMPTY, ORDERS, Clause, describe, phrase_clause, still

LOOK = Look(clutter=(0, 4), noise=2.0)
_NUMBER = (0.03, 0.27, 0.35, 0.25, 0.10)  # probability of 0, 1, 2, 3, 4 objects
_DESCRIBED = 3  # most objects in a caption; more would exceed the context length
_VERB, _CONNECTOR = 0.3, 0.2  # probability of each in a clause, and between two
_STREAM = 9  # no split of the clips has this number, so stills and clips share no random numbers


@dataclass(frozen=True, kw_only=True)
class Stills:
    """A training dataset of drawn stills, new ones in every epoch.

    Stills show no events, but the token embeddings of the words for events must be trained here, because
    adaptation to video leaves them frozen.  So some clauses have a verb, and some captions a connector, that
    does not describe the picture.

    Args:
        count: pictures in an epoch.
        seed: of all random numbers.
        easy_epochs: number of first epochs with one object on an empty background and no verbs; with several
            objects from the start, the model takes far longer to learn anything but colours.
        moment: that a picture shows of a move or a change of colour; see `StillsConfig`.
    """

    count: int
    seed: int = 0
    easy_epochs: int = 0
    moment: Literal["start_or_end", "end"] = "start_or_end"
    frames_per_clip: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: expected at least 1 still, got {self.count}")

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, epoch: int) -> Sample:
        """Draw still `index` of an epoch; it depends on (seed, epoch, index) alone.

        Raises:
            IndexError: the index is out of range.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"index: expected 0..{self.count - 1}, got {index}")
        rng = np.random.default_rng((self.seed, _STREAM, epoch, index))
        easy = epoch < self.easy_epochs
        look = replace(LOOK, clutter=(0, 0)) if easy else LOOK
        things = make_things(
            rng, 1 if easy else int(np.searchsorted(np.cumsum(_NUMBER), rng.random() * 0.999999))
        )
        frame = expose(picture(ground(rng, look), things), rng, look, float(rng.uniform(0.95, 1.05)))
        if easy:
            text = still([describe(thing, rng) for thing in things], rng)
        else:
            text = caption(things, rng, end=self.moment == "end")
        return Sample(text=text, frames=frame[None], video_index=index)


def make_things(rng: np.random.Generator, number: int) -> list[Thing]:
    """Make objects at different places, no two with the same shape and colour."""
    places = rng.choice(len(PLACES), number, replace=False)
    kinds = rng.choice(len(SHAPES) * len(COLOURS), number, replace=False)
    things = []
    for place, kind in zip(places, kinds, strict=True):
        x, y = centre(rng, list(PLACES)[place])
        colour = list(COLOURS)[kind // len(SHAPES)]
        radius = RADII[pick(rng, list(RADII))]
        things.append(Thing(shape=SHAPES[kind % len(SHAPES)], colour=colour, x=x, y=y, radius=radius))
    return things


def caption(things: Sequence[Thing], rng: np.random.Generator, *, end: bool = False) -> str:
    """Describe up to three of the objects, some with a verb that the picture does not show.

    Args:
        end: the picture is the end of every move and change of colour; else the start or the end, by chance.
    """
    chosen = [things[i] for i in rng.permutation(len(things))[:_DESCRIBED]]
    if not chosen:
        return EMPTY
    clauses = [describe(thing, rng) for thing in chosen]
    verbs = rng.random(len(clauses)) < _VERB
    if not verbs.any() and rng.random() >= _CONNECTOR:
        return still(clauses, rng)
    clauses = [_act(c, t, rng, end) if v else c for c, t, v in zip(clauses, chosen, verbs, strict=True)]
    if len(clauses) == _DESCRIBED:
        clauses = [_short(clause) for clause in clauses]
    texts = [phrase_clause(clause, rng) for clause in clauses]
    joined = texts[0]
    for text in texts[1:]:
        joined += f" {_connector(rng)} {text}"
    return joined


def _connector(rng: np.random.Generator) -> str:
    """Choose a word between two clauses; it does not describe the picture."""
    return pick(rng, ORDERS[pick(rng, list(ORDERS))]) if rng.random() < _CONNECTOR else "and"


def _act(clause: Clause, thing: Thing, rng: np.random.Generator, end: bool) -> Clause:
    """Add an event of any kind to a clause, with the picture as the moment before or after it."""
    clause = replace(clause, kind=event_kind(rng))
    after = rng.random() < 0.5 or end
    if clause.kind == "turns":
        colour = other(rng, list(COLOURS), thing.colour)
        ends = (colour, thing.colour) if after else (thing.colour, colour)
        return replace(clause, colour=ends[0], colour_to=ends[1])
    if clause.kind == "moves" and clause.place is not None:
        place = other(rng, list(PLACES), clause.place)
        ends = (place, clause.place) if after else (clause.place, place)
        return replace(clause, place=ends[0], place_to=ends[1])
    return clause


def _short(clause: Clause) -> Clause:
    """Shorten a clause so that three fit the context length."""
    match clause.kind:
        case None:
            return clause
        case "moves":
            return replace(clause, size=None, place=None)
        case "turns":
            return replace(clause, size=None, place=None)
    return replace(clause, size=None)
