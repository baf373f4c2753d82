"""The square the model sees of a frame."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from discovla.data.video.frames import resize_and_crop
from discovla.torchvision_cpu import install


@pytest.mark.parametrize(
    "size", [(32, 32), (48, 32), (32, 48), (33, 47), (101, 7), (7, 101), (1, 1), (320, 181)], ids=str
)
def test_a_frame_fits_as_the_released_transform_makes_it(size):
    install()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    height, width = size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    released = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])
    assert np.array_equal(resize_and_crop(image, 32), np.asarray(released(image)))


def test_a_frame_of_the_right_size_is_left_as_it_is():
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(resize_and_crop(Image.fromarray(frame), 16), frame)
