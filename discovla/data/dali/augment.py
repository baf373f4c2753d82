"""RandAugment in DALI's graph, with the draws of `draw_randaugment`.

The operations are those of timm on PIL images, in DALI's own.  They differ where DALI moves pixels (linear,
not bicubic), sharpens (up to the edge) and equalizes (with parts of a step where PIL's is a whole number).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from discovla.data.augment import randaugment_steps
from discovla.data.dali.plans import Step

NOTHING, POINT, MOVE, FADE, COLOUR, CONTRAST, SHARPEN, STRETCH, EQUALIZE = range(9)
LAYERS = 4
_GREY = 128.0
_KEEP = (255.0, 0.0, 256.0)  # of POINT: all bits, nothing added, no value inverted
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def drawn_steps(seed: str, size: tuple[int, int]) -> tuple[Step, ...]:
    """The operations that `draw_randaugment` applies to frames of this width and height."""
    return tuple(step_of(function.__name__, words, size) for function, words, _ in randaugment_steps(seed))


def packed_steps(steps: Sequence[Step]) -> dict[str, np.ndarray]:
    """Operations as inputs of the graph: kinds k int32, numbers k 3, matrices k 2 3, k = LAYERS."""
    all_steps = [*steps, *[Step(kind=NOTHING)] * (LAYERS - len(steps))]
    return {
        "kinds": np.array([step.kind for step in all_steps], np.int32),
        "numbers": np.array([step.numbers for step in all_steps], np.float32),
        "matrices": np.array([step.matrix for step in all_steps], np.float32).reshape(LAYERS, 2, 3),
    }


def augmented(dali: Any, x: Any, fed: Mapping[str, Any], device: str) -> Any:
    """Nodes of a graph with conditionals: frames f y x 3 or y x 3 uint8, after all operations.

    Args:
        dali: the module.
        fed: nodes of what `packed_steps` gives.
        device: `cpu` or `gpu`, where the frames are.
    """
    for layer in range(LAYERS):
        numbers = fed["numbers"][layer]
        if device == "gpu":
            numbers = numbers.gpu()
        x = _applied(dali, x, fed["kinds"][layer], (numbers, fed["matrices"][layer]))
    return x


def step_of(name: str, words: tuple[Any, ...], size: tuple[int, int]) -> Step:
    """One operation of timm by its name and arguments."""
    width, height = size
    match name, *words:
        case ["auto_contrast"]:
            return Step(kind=STRETCH)
        case ["equalize"]:
            return Step(kind=EQUALIZE)
        case ["invert"]:
            return Step(kind=POINT, numbers=(*_KEEP[:2], 0.0))
        case ["posterize", bits]:
            return Step(kind=POINT, numbers=(float(256 - (1 << max(0, 8 - bits))), *_KEEP[1:]))
        case ["solarize", threshold]:
            return Step(kind=POINT, numbers=(*_KEEP[:2], float(threshold)))
        case ["solarize_add", add]:
            return Step(kind=POINT, numbers=(_KEEP[0], float(add), _KEEP[2]))
        case ["rotate", degrees]:
            return Step(kind=MOVE, matrix=_rotation(degrees, width, height))
        case ["shear_x", factor]:
            return Step(kind=MOVE, matrix=(1, factor, 0, 0, 1, 0))
        case ["shear_y", factor]:
            return Step(kind=MOVE, matrix=(1, 0, 0, factor, 1, 0))
        case ["translate_x_rel", share]:
            return Step(kind=MOVE, matrix=(1, 0, share * width, 0, 1, 0))
        case ["translate_y_rel", share]:
            return Step(kind=MOVE, matrix=(1, 0, 0, 0, 1, share * height))
    kinds = {"brightness": FADE, "color": COLOUR, "contrast": CONTRAST, "sharpness": SHARPEN}
    if name not in kinds:
        raise ValueError(f"randaugment: expected an operation that DALI's graph has, got {name!r}")
    return Step(kind=kinds[name], numbers=(words[0], 0.0, 0.0))


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """A turn counterclockwise about the middle."""
    angle = -math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _applied(dali: Any, x: Any, kind: Any, words: tuple[Any, Any]) -> Any:
    """One operation, chosen by its kind for each clip."""
    numbers, matrix = words
    if kind == POINT:
        x = _pointwise(dali, x, numbers)
    elif kind == MOVE:
        x = dali.fn.warp_affine(x, matrix=matrix, fill_value=_GREY)
    elif kind == FADE:
        x = _blended(dali, 0.0, x, numbers[0])
    elif kind == COLOUR:
        x = _blended(dali, _luma(dali, x), x, numbers[0])
    elif kind == CONTRAST:
        mean = dali.fn.reductions.mean(_luma(dali, x), axis_names="HW", keep_dims=True)
        x = _blended(dali, dali.math.floor(mean + 0.5), x, numbers[0])
    elif kind == SHARPEN:
        smooth = dali.fn.filter(x, dali.types.Constant(_SMOOTH), dtype=dali.types.FLOAT)
        x = _blended(dali, dali.math.floor(smooth + 0.5), x, numbers[0])
    elif kind == STRETCH:
        x = _stretched(dali, x)
    elif kind == EQUALIZE:
        # Of the inverted frame: PIL counts the pixels below a value, DALI those up to it.
        x = _inverted(dali, dali.fn.equalize(_inverted(dali, x)))
    return x


def _pointwise(dali: Any, x: Any, numbers: Any) -> Any:
    """Some bits kept, something added to dark values, bright values inverted: x 3 numbers."""
    whole = dali.fn.cast(numbers, dtype=dali.types.INT32)
    kept = dali.fn.cast(x, dtype=dali.types.INT32) & whole[0]
    added = dali.math.clamp(kept + whole[1] * (kept < 128), 0, 255)
    return dali.fn.cast(added + (added >= whole[2]) * (255 - 2 * added), dtype=dali.types.UINT8)


def _inverted(dali: Any, x: Any) -> Any:
    return dali.fn.cast(255 - x, dtype=dali.types.UINT8)


def _blended(dali: Any, base: Any, x: Any, factor: Any) -> Any:
    """x' = base + factor (x - base) with a base in floats, cut off at whole numbers as PIL does."""
    mixed = dali.math.floor(base + factor * (x - base))
    return dali.fn.cast(dali.math.clamp(mixed, 0.0, 255.0), dtype=dali.types.UINT8)


def _luma(dali: Any, x: Any) -> Any:
    """The grey of each pixel, a whole number."""
    weighted = x * dali.types.Constant(_LUMA)
    return dali.math.floor(dali.fn.reductions.sum(weighted, axis_names="C", keep_dims=True) + 0.5)


def _stretched(dali: Any, x: Any) -> Any:
    """Each channel of each frame stretched to 0 .. 255; one of a single value is left as it is."""
    least = dali.fn.reductions.min(x, axis_names="HW", keep_dims=True)
    most = dali.fn.reductions.max(x, axis_names="HW", keep_dims=True)
    span = dali.fn.cast(most, dtype=dali.types.FLOAT) - least
    flat = span < 1.0
    stretched = dali.math.floor((x - least * (flat ^ True)) * 255.0 / (span + flat * 255.0))
    return dali.fn.cast(stretched, dtype=dali.types.UINT8)
