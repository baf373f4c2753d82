"""Resize and crop frames to the square that the model sees."""

from __future__ import annotations

import numpy as np
from PIL import Image


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the short side of an RGB frame to `size` pixels, bicubic, and cut out the middle square.

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
    """Return width and height after the resize, and left and top of the square then cut out."""
    short, long = sorted((width, height))
    stretched = int(size * long / short)
    width, height = (size, stretched) if width <= height else (stretched, size)
    return (width, height), (round((width - size) / 2), round((height - size) / 2))
