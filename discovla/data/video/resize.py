"""What happens to the pixels of a frame before they are sent to the device."""

from __future__ import annotations

import numpy as np
from PIL import Image


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """A square of a frame: the short side resized to `size`, bicubic, then the middle cut out.

    Args:
        image: RGB.
        size: pixels of a side of the square.

    Returns: uint8, y x 3 with y = x = size.

    Source: the released DiscoVLA code, which resizes and crops with torchvision on PIL images.
    """
    (width, height), (left, top) = resize_geometry(*image.size, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if (left, top, width, height) != (0, 0, size, size):
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


def resize_geometry(width: int, height: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height to which a frame is resized, and left and top of the square then cut out."""
    short, long = sorted((width, height))
    stretched = int(size * long / short)
    width, height = (size, stretched) if width <= height else (stretched, size)
    return (width, height), (round((width - size) / 2), round((height - size) / 2))
