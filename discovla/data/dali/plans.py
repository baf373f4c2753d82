"""What the frames of a clip are to be made from, where a graph makes those of a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from discovla.data.manifest import Clip

Asked = tuple[Clip, Any, str]  # clip, augment and seed
Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation of RandAugment, as a graph applies it to all frames of a clip.

    kind: of `discovla.data.dali.augment`.  numbers: its arguments.  matrix: from a pixel of the result to one
    of the frame, where it moves pixels.
    """

    kind: int
    numbers: tuple[float, float, float] = (0.0, 0.0, 0.0)
    matrix: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The frames of one clip, before they are decoded.

    id, path: of the clip.  room: frames that the model takes.  indices: f' int32, those to decode, ascending;
    none where the clip gives none.  places: of each frame shown, which of those decoded it is.
    means: f' 3 float32, the mean colour of each in levels, NaN where it is not known.  spread: by how many
    levels it may be off.
    content: of each of f' the bytes of a JPEG, or all of them raw, f' y x 3; None reads the file.
    cut, part: y and x of the top left corner and size of what is cut out.  size: to which frames are resized.
    steps: RandAugment's.  light: the seed of `draw_light`, None where it is not drawn.
    asked: what is to be asked of another reader where the graph does not read the clip; None refuses it.
    made: frames that another reader gave, all that the model takes.
    """

    id: str
    path: Path
    room: int
    indices: np.ndarray
    places: np.ndarray
    means: np.ndarray | None = None
    spread: float = 0.0
    content: tuple[bytes, ...] | np.ndarray | None = None
    cut: Pair = (0, 0)
    part: Pair = (0, 0)
    size: Pair = (0, 0)
    steps: tuple[Step, ...] = ()
    light: str | None = None
    asked: Asked | None = None
    made: np.ndarray | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to decode: the row stays black."""
        return len(self.indices) == 0


def no_plan(room: int) -> Plan:
    """What stands in the row of a clip that gives no frames."""
    nothing = np.zeros(0, np.int32)
    return Plan(id="", path=Path(), room=room, indices=nothing, places=nothing)
