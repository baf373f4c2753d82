"""Augmentation and resizing of decoded frames on the device, against PIL operations of the PyAV reader."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from discovla.data.augment import draw_randaugment, randaugment_steps
from discovla.data.dali import pipeline
from discovla.data.dali.pipeline import PipelineConfig, augment_and_resize, randaugment
from discovla.data.video.frames import frame_transform
from discovla.torchvision_cpu import install

SIZE = 96
# Mean difference in levels of a picture like a camera's: soft, with edges and a little noise.  Geometric
# operations are bicubic in timm and bilinear here; blending rounds in torchvision and truncates in PIL.
GEOMETRIC, BLENDED = 1.5, 0.5
TOLERANCES = dict.fromkeys(("rotate", "shear_x", "shear_y", "translate_x_rel", "translate_y_rel"), GEOMETRIC)
TOLERANCES |= dict.fromkeys(("color", "contrast", "auto_contrast"), BLENDED)
DRAWN = 3.0  # of whole draws, whose operations stretch the error of those before
GREY = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}
CASES = [
    ("auto_contrast", ()),
    ("equalize", ()),
    ("invert", ()),
    ("posterize", (2,)),
    ("solarize", (77,)),
    ("solarize_add", (77,)),
    ("color", (0.4,)),
    ("color", (1.6,)),
    ("contrast", (0.3,)),
    ("contrast", (1.7,)),
    ("brightness", (1.6,)),
    ("sharpness", (0.4,)),
    ("sharpness", (1.6,)),
    ("rotate", (-21.0,)),
    ("shear_x", (0.21,)),
    ("shear_y", (-0.21,)),
    ("translate_x_rel", (0.3,)),
    ("translate_y_rel", (-0.3,)),
]


@pytest.fixture(scope="module", autouse=True)
def torchvision() -> None:
    install()


def photo(seed: int) -> Image.Image:
    """A soft picture with edges and a little noise, of a limited range."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((SIZE + 30, SIZE))
    picture = np.asarray(coarse).copy()
    picture[20:60, 30:50] = (200, 60, 30)
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.8)))
    noisy = soft * 0.8 + 20 + draws.normal(0, 2, soft.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


PHOTOS = [photo(0), photo(1)]
FRAMES = torch.from_numpy(np.stack([np.asarray(picture) for picture in PHOTOS]))  # f y x c


def apply_steps(monkeypatch, steps: Sequence[tuple[Any, ...]]) -> np.ndarray:
    """Return the photos after given operations instead of drawn ones."""
    monkeypatch.setattr(pipeline, "randaugment_steps", lambda seed: steps)
    return randaugment(FRAMES.permute(0, 3, 1, 2), "").permute(0, 2, 3, 1).numpy().astype(int)


@pytest.mark.slow  # imports timm
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_operations_are_near_to_those_of_timm(name, arguments, monkeypatch):
    function = getattr(importlib.import_module("timm.data.auto_augment"), name)
    expected = np.stack([np.asarray(function(picture, *arguments, **GREY)) for picture in PHOTOS])
    augmented = apply_steps(monkeypatch, [(function, arguments, {})])
    error = float(np.abs(augmented - expected).mean())
    assert error <= TOLERANCES.get(name, 0.001)
    change = np.abs(expected.astype(int) - FRAMES.numpy()).mean()
    assert change > max(0.5, 5 * error), "the operation changes the picture"


@pytest.mark.slow  # imports timm
@pytest.mark.parametrize("number", range(12))
def test_randaugment_is_near_to_that_of_the_pyav_reader(number):
    seed = f"0/0/{number}"
    change = draw_randaugment(seed)
    expected = np.stack([np.asarray(change(picture)) for picture in PHOTOS]).astype(int)
    augmented = randaugment(FRAMES.permute(0, 3, 1, 2), seed).permute(0, 2, 3, 1).numpy()
    names = [step[0].__name__ for step in randaugment_steps(seed)]
    assert np.abs(augmented - expected).mean() <= DRAWN, names


@pytest.mark.slow  # imports timm
def test_every_drawn_operation_has_a_counterpart():
    drawn = set()
    for number in range(60):
        drawn |= {step[0].__name__ for step in randaugment_steps(f"0/1/{number}")}
        randaugment(FRAMES[:1, :8, :8].permute(0, 3, 1, 2), f"0/1/{number}")
    assert drawn == {name for name, _ in CASES}


@pytest.mark.parametrize("augment", ["none", "resized_crop"])
@pytest.mark.parametrize("size", [32, 96, 128])
def test_resizing_and_cropping_are_near_to_those_of_the_pyav_reader(augment, size):
    config = PipelineConfig(frames=2, image_size=size, augment=augment)
    resized = augment_and_resize(FRAMES, "0/0/3", config).numpy().astype(int)
    resize = frame_transform(augment, "0/0/3", size)
    expected = np.stack([resize(picture) for picture in PHOTOS])
    assert resized.shape == expected.shape == (2, size, size, 3)
    assert np.abs(resized - expected).mean() <= 0.5
