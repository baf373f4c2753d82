"""Augmentation of a clip: drawn once, the same for every frame."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from discovla.data import augment
from discovla.data.augment import draw_light, draw_randaugment, draw_resized_crop


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def steps(seed: str) -> list[tuple]:
    """Return the operations drawn for a clip: name, arguments, options."""
    with augment._random_state(seed):
        ops = random.choices(augment._policy().ops, k=augment._policy().num_layers)
        return [(op.name, *step[1:]) for op in ops for step in augment._drawn(op)]


@pytest.fixture(scope="module")
def drawn() -> list[list[tuple]]:
    """Return the operations of many clips."""
    return [steps(f"0/0/{i}") for i in range(2000)]


def test_equal_frames_stay_equal_under_one_seed():
    image = Image.fromarray(noise())
    for i in range(20):
        change = draw_randaugment(f"0/1/{i}")
        first = np.asarray(change(image))
        change(Image.fromarray(noise(1)))
        assert np.array_equal(np.asarray(change(image)), first)
        assert np.array_equal(np.asarray(draw_randaugment(f"0/1/{i}")(image)), first)


def test_different_seeds_give_different_pictures():
    image = Image.fromarray(noise())
    pictures = {np.asarray(draw_randaugment(f"0/0/{i}")(image)).tobytes() for i in range(20)}
    assert len(pictures) > 15


def test_drawing_does_not_change_the_random_state_of_the_process():
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].copy()
    draw_randaugment("0/0/0")(Image.fromarray(noise()))
    draw_light("0/0/0")(noise()[None])
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()


def test_the_draws_do_not_depend_on_the_random_state():
    random.seed(1)
    first = steps("0/0/3")
    random.seed(2)
    assert steps("0/0/3") == first


def test_the_random_state_is_restored_after_an_error():
    before = random.getstate()
    with pytest.raises(KeyError), augment._random_state("x"):
        raise KeyError
    assert random.getstate() == before


def test_the_operations_are_the_fifteen_of_the_release():
    names = {op.name for op in augment._policy().ops}
    assert names == {
        "AutoContrast",
        "Equalize",
        "Invert",
        "Rotate",
        "PosterizeIncreasing",
        "SolarizeIncreasing",
        "SolarizeAdd",
        "ColorIncreasing",
        "ContrastIncreasing",
        "BrightnessIncreasing",
        "SharpnessIncreasing",
        "ShearX",
        "ShearY",
        "TranslateXRel",
        "TranslateYRel",
    }
    assert augment._policy().num_layers == 4


def test_each_of_four_draws_is_applied_half_the_time(drawn):
    counts = Counter(len(ops) for ops in drawn)
    shares = [counts[n] / len(drawn) for n in range(5)]
    assert shares == pytest.approx([1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16], abs=0.04)


def test_an_operation_may_be_drawn_twice(drawn):
    assert any(len({name for name, *_ in ops}) < len(ops) for ops in drawn)


def test_every_operation_is_drawn_about_as_often(drawn):
    counts = Counter(name for ops in drawn for name, *_ in ops)
    assert len(counts) == 15
    assert max(counts.values()) < 1.5 * min(counts.values())


@pytest.mark.parametrize(
    ("name", "unit", "centre"),
    [
        ("Rotate", 3.0, 0.0),
        ("ShearX", 0.03, 0.0),
        ("ShearY", 0.03, 0.0),
        ("TranslateXRel", 0.045, 0.0),
        ("TranslateYRel", 0.045, 0.0),
        ("ColorIncreasing", 0.09, 1.0),
        ("ContrastIncreasing", 0.09, 1.0),
        ("BrightnessIncreasing", 0.09, 1.0),
        ("SharpnessIncreasing", 0.09, 1.0),
    ],
)
def test_strengths_follow_the_magnitude_with_either_sign_equally_often(drawn, name, unit, centre):
    values = np.array([arguments[0] for ops in drawn for n, arguments, _ in ops if n == name]) - centre
    magnitudes = np.abs(values) / unit
    assert magnitudes.mean() == pytest.approx(7, abs=0.2)
    assert magnitudes.std() == pytest.approx(0.5, abs=0.15)
    assert (values > 0).mean() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("PosterizeIncreasing", lambda m: 4 - int(0.4 * m)),
        ("SolarizeIncreasing", lambda m: 256 - int(25.6 * m)),
        ("SolarizeAdd", lambda m: int(11 * m)),
    ],
    ids=["Posterize", "Solarize", "SolarizeAdd"],
)
def test_integer_strengths_are_those_of_the_release(name, of):
    op = next(op for op in augment._policy().ops if op.name == name)
    for magnitude in (0.0, 5.3, 7.0, 8.1, 10.0):
        assert op.level_fn(magnitude, op.hparams) == (of(magnitude),)


def test_geometric_operations_fill_with_grey_and_interpolate_bicubically():
    for op in augment._policy().ops:
        assert op.kwargs == {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}


def test_light_augmentation_changes_all_frames_alike():
    frames = np.stack([noise(), noise(), noise(1)])
    changed = draw_light("0/0/1")(frames)
    assert changed.dtype == np.uint8
    assert np.array_equal(changed[0], changed[1])
    assert not np.array_equal(changed, frames)


def test_light_augmentation_changes_brightness_and_contrast_by_a_fifth_at_most():
    frames = np.full((1, 4, 4, 3), 100, np.uint8)
    frames[..., 0] = 90
    frames[..., 2] = 110
    means, spreads = [], []
    for i in range(300):
        changed = draw_light(f"0/0/{i}")(frames).astype(float)
        means.append(changed[..., 1].mean())
        spreads.append(np.ptp(changed))
    assert 79 <= min(means) < 85
    assert 115 < max(means) <= 121
    assert min(spreads) >= 20 * 0.8 * 0.8 - 1
    assert max(spreads) <= 20 * 1.2 * 1.2 + 1


def ramp(width: int, height: int) -> Image.Image:
    """Return a picture whose red is the x and whose green is the y of each pixel."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 7)], axis=-1).astype(np.uint8))


def test_a_crop_is_the_same_part_of_every_frame_of_a_clip():
    frames = [Image.fromarray(noise(i)) for i in range(2)]
    for i in range(20):
        cut = draw_resized_crop(f"0/0/{i}", 16)
        assert all(cut(frame).size == (16, 16) for frame in frames)
        assert np.array_equal(np.asarray(cut(frames[0])), np.asarray(cut(frames[0])))
        left, top, right, bottom = augment.crop_box(random.Random(f"0/0/{i}"), 40, 24)
        pixels = np.asarray(draw_resized_crop(f"0/0/{i}", 64)(ramp(40, 24)))
        assert left <= pixels[..., 0].min() and pixels[..., 0].max() < right
        assert top <= pixels[..., 1].min() and pixels[..., 1].max() < bottom


def test_crops_have_the_areas_and_aspects_of_the_release():
    boxes = [augment.crop_box(random.Random(i), 320, 240) for i in range(3000)]
    w, h = (np.array([box[i + 2] - box[i] for box in boxes]) for i in range(2))
    share = w * h / (320 * 240)
    assert 0.075 < share.min() < 0.1
    assert share.max() <= 1
    assert abs(share[share < 0.5].mean() - 0.29) < 0.01  # what always fits is uniform
    assert (w / h).min() > 0.74
    assert (w / h).max() < 1.35
    assert abs(np.log(w / h)[share < 0.5].mean()) < 0.01


def test_a_frame_that_no_crop_fits_gives_its_middle_square():
    assert augment.crop_box(random.Random(0), 1000, 10) == (495, 0, 505, 10)
