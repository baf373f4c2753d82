"""Augmentation of training clips, drawn once per clip and the same for all its frames."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from discovla.torchvision_cpu import install

if TYPE_CHECKING:
    from timm.data.auto_augment import RandAugment

_POLICY = "rand-m7-n4-mstd0.5-inc1"
_GREY = (128, 128, 128)
_LIGHT = 0.2  # largest change of brightness and of contrast, as a share
_Step = tuple[Callable[..., Image.Image], tuple[Any, ...], dict[str, Any]]
_CROP_AREA, _CROP_ASPECT, _CROP_TRIES = (0.08, 1.0), math.log(4 / 3), 10


def draw_randaugment(seed: str) -> Callable[[Image.Image], Image.Image]:
    """Draw DiscoVLA's RandAugment for one clip, to be applied to each frame at full size.

    Four of 15 operations with replacement, each applied with probability 1/2, magnitude from N(7, 0.5^2)
    within 0 .. 10, bicubic, filled with grey.  No crop, no flip.

    Args:
        seed: seed of the draws.  The random state of the process is not changed.

    Returns: a function from an RGB image to one of the same size.

    Source: the released DiscoVLA code; the operations are timm's, Apache-2.0.
    """
    steps = randaugment_steps(seed)

    def augment(image: Image.Image) -> Image.Image:
        for function, arguments, options in steps:
            image = function(image, *arguments, **options)
        return image

    return augment


def randaugment_steps(seed: str) -> list[_Step]:
    """Return the operations of `draw_randaugment` in order: timm's function, its arguments, its options."""
    with _random_state(seed):
        return [step for op in random.choices(_policy().ops, k=_policy().num_layers) for step in _drawn(op)]


def draw_light(seed: str) -> Callable[[np.ndarray], np.ndarray]:
    """Draw a change of brightness and contrast by up to a fifth for one clip.

    x' = ((x - m) c + m) b with m the mean of the clip and b, c from U(0.8, 1.2), as one table of 256 values.

    Args:
        seed: seed of the draws.

    Returns: a function from uint8 frames, f y x 3, to new ones of the same shape.
    """
    return lambda frames: light_table(seed, frames.mean())[frames]


def light_table(seed: str, mean: float) -> np.ndarray:
    """Return the result of `draw_light` for each of 256 values, uint8, in a clip with this mean."""
    draws = random.Random(seed)
    brightness, contrast = (draws.uniform(1 - _LIGHT, 1 + _LIGHT) for _ in range(2))
    table = ((np.arange(256) - mean) * contrast + mean) * brightness
    return np.clip(np.rint(table), 0, 255).astype(np.uint8)


def draw_resized_crop(seed: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """Draw a random crop for one clip, which is resized to a square.

    The area of the crop is U(0.08, 1) of the frame's and its aspect log-uniform in 3/4 .. 4/3, drawn up to
    ten times until it fits; otherwise the crop is the largest square in the middle.

    Args:
        seed: seed of the draws.
        size: pixels of a side of the square.

    Returns: a function from an RGB image to one of size x size.

    Source: T2VParser, section on data.  The crop is cut from the full frame, not from one resized to a short
    side of 256 first: the same part, resampled once.
    """

    def augment(image: Image.Image) -> Image.Image:
        box = crop_box(random.Random(seed), *image.size)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)

    return augment


def crop_box(draws: random.Random, width: int, height: int) -> tuple[int, int, int, int]:
    """Draw the left, top, right and bottom of `draw_resized_crop`."""
    for _ in range(_CROP_TRIES):
        area = draws.uniform(*_CROP_AREA) * width * height
        aspect = math.exp(draws.uniform(-_CROP_ASPECT, _CROP_ASPECT))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draws.randint(0, width - w), draws.randint(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _drawn(op: Any) -> list[_Step]:
    """Draw the arguments of an operation; return no step if it is not applied."""
    if random.random() > op.prob:
        return []
    magnitude = min(max(random.gauss(op.magnitude, op.magnitude_std), 0.0), 10.0)
    arguments = () if op.level_fn is None else op.level_fn(magnitude, op.hparams)
    return [(op.aug_fn, arguments, op.kwargs)]


@contextmanager
def _random_state(seed: str) -> Iterator[None]:
    """Seed Python's global generator, from which timm draws signs, and restore it afterwards."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


@lru_cache(maxsize=1)
def _policy() -> RandAugment:
    """Return timm's RandAugment with the released settings."""
    install()
    from timm.data.auto_augment import rand_augment_transform  # imports torchvision, so only after install()

    return rand_augment_transform(_POLICY, {"img_mean": _GREY, "interpolation": Image.Resampling.BICUBIC})
