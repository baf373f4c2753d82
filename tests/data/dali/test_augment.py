"""RandAugment in DALI's graph, against timm's operations on PIL images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from discovla.data.augment import draw_randaugment, randaugment_steps
from discovla.data.dali.augment import LAYERS, NOTHING, drawn_steps, packed_steps, step_of
from discovla.data.dali.plans import Plan, Step
from discovla.data.dali.support import DaliSettings, missing

LACKING = missing()
SIZE = 96
# Mean of the differences, in levels, of a frame as cameras give them: soft, with edges and a little noise.
# Moving is bicubic in timm and linear in DALI, which is softer.  A step of PIL's equalizing is whole,
# and its sharpening leaves the outermost pixels out.  What else there is differs by a rounding now and then.
MOVED, EQUALIZED, SHARPENED, OTHERS = 1.5, 0.7, 0.05, 0.001
TOLERANCES = dict.fromkeys(("rotate", "shear_x", "shear_y", "translate_x_rel", "translate_y_rel"), MOVED)
TOLERANCES |= {"equalize": EQUALIZED, "sharpness": SHARPENED}
DRAWN = 3.0  # of whole draws, where an operation stretches the error of the one before it
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


def photo(seed: int) -> Image.Image:
    """A soft picture with edges and a little noise, of a limited range."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((SIZE, SIZE))
    picture = np.asarray(coarse).copy()
    picture[20:60, 30:50] = (200, 60, 30)
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.8)))
    noisy = soft * 0.8 + 20 + draws.normal(0, 2, soft.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def plan(pictures: list[Image.Image], steps: tuple[Step, ...]) -> Plan:
    """A clip of raw frames that are neither resized nor cut."""
    numbers, whole = np.arange(len(pictures)), (SIZE, SIZE)
    content = np.stack([np.asarray(picture) for picture in pictures])
    return Plan(
        id="x",
        path=Path("x"),
        room=len(pictures),
        indices=numbers.astype(np.int32),
        places=numbers,
        content=content,
        part=whole,
        size=whole,
        steps=steps,
    )


@pytest.mark.slow
@pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
def test_golden_operations_are_those_of_timm_within_the_tolerances(monkeypatch):
    from timm.data import auto_augment

    from discovla.data.dali.graph import Graph

    pictures = [photo(0), photo(1)]
    content = np.stack([np.asarray(picture) for picture in pictures])
    settings = DaliSettings(content="raw", frames=2, image_size=SIZE, augment="randaugment", threads=1)
    graph = Graph(settings)
    plans = [plan(pictures, (step_of(name, words, (SIZE, SIZE)),)) for name, words in CASES]
    frames, reasons = graph.read(plans)
    assert reasons == [None] * len(CASES)
    for (name, words), found in zip(CASES, frames.numpy().astype(int), strict=True):
        wanted = np.stack([np.asarray(getattr(auto_augment, name)(p, *words, **GREY)) for p in pictures])
        error = float(np.abs(found - wanted).mean())
        assert np.abs(wanted.astype(int) - content).mean() > max(0.5, 5 * error), (
            name
        )  # that it does something
        assert error <= TOLERANCES.get(name, OTHERS), (name, words, error)
    seeds = [f"0/0/{n}" for n in range(12)]
    frames, _ = graph.read([plan(pictures, drawn_steps(seed, (SIZE, SIZE))) for seed in seeds])
    for seed, found in zip(seeds, frames.numpy().astype(int), strict=True):
        change = draw_randaugment(seed)
        wanted = np.stack([np.asarray(change(p)) for p in pictures])
        assert np.abs(found - wanted).mean() <= DRAWN, (
            seed,
            [s[0].__name__ for s in randaugment_steps(seed)],
        )


@pytest.mark.slow  # it imports timm
def test_every_draw_has_its_operations_in_order():
    kinds = set()
    for number in range(60):
        seed = f"0/1/{number}"
        steps = drawn_steps(seed, (64, 48))
        assert len(steps) == len(randaugment_steps(seed)) <= LAYERS
        kinds |= {step.kind for step in steps}
        packed = packed_steps(steps)
        assert packed["kinds"].tolist() == [s.kind for s in steps] + [NOTHING] * (LAYERS - len(steps))
    assert kinds == set(range(1, 9))


def test_an_operation_that_the_graph_lacks_is_named():
    with pytest.raises(ValueError, match="expected an operation that DALI's graph has, got 'gaussian_blur'"):
        step_of("gaussian_blur", (0.5,), (4, 4))
