"""Decoded frames to normalised pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from discovla.ops.blocks import constants
from discovla.ops.dispatch import Impl, choose, kernel

# OpenAI CLIP's pixel statistics, RGB in [0, 1]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess_frames(
    frames: Tensor,
    *,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """(frames / 255 - mean) / std, channels first.

    Args:
        frames: b f y x c, uint8 RGB.  Float frames, b f c y x, count as normalised and are only cast.
        mean, std: of each channel, in [0, 1].
        dtype: of the result; computed in float32 at least.
        impl: reference (plain torch), triton, or auto.

    Returns:
        b f c y x.

    Raises:
        ValueError: `frames` is neither uint8 nor floating.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    if frames.is_floating_point():
        return frames.to(dtype)
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames: expected uint8 (or normalised floats), found {frames.dtype}")
    operands = (frames, frames.new_empty(1, dtype=dtype))
    if choose("preprocess_frames", impl, frames.device.type, operands=operands) == "reference":
        return preprocess_frames_reference(frames, mean, std, dtype)
    pixels, size = frames.flatten(0, 1).contiguous(), (frames.shape[2], frames.shape[3])
    out = patches(pixels, size, *scale_and_shift(mean, std), dtype)  # n 1 (c y x)
    return out.view(*frames.shape[:2], frames.shape[4], *size)


def preprocess_frames_reference(
    frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """The formula of `preprocess_frames`."""
    work = torch.promote_types(dtype, torch.float32)
    scale, shift = (constants(values, work, frames.device) for values in scale_and_shift(mean, std))
    return torch.addcmul(shift, frames.to(work), scale).to(dtype).permute(0, 1, 4, 2, 3)  # b f c y x


def scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return per channel a and b with a x + b = (x / 255 - mean) / std."""
    return tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


@torch.library.custom_op("discovla::patches", mutates_args=())
def patches(
    frames: Tensor, size: Sequence[int], scale: Sequence[float], shift: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """scale x + shift of every channel: n y x c, uint8, contiguous, to n p (c py px), size: py, px."""
    return kernel("preprocess_frames").patches(frames, tuple(size), tuple(scale), tuple(shift), dtype)


@patches.register_fake
def _(frames, size, scale, shift, dtype):
    n, y, x, c = frames.shape
    return frames.new_empty(n, y // size[0] * (x // size[1]), c * size[0] * size[1], dtype=dtype)
