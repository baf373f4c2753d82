"""Decoded frames to patches, the rows that a patch embedding multiplies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from discovla.ops.blocks import constants
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.preprocess_frames import (
    CLIP_MEAN,
    CLIP_STD,
    patches,
    preprocess_frames_reference,
    scale_and_shift,
)

CENTRE = 128  # subtracted from bytes, so that they are exact in bfloat16
PixelStatistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, in [0, 1]


def frame_patches(
    frames: Tensor,
    patch_size: int,
    *,
    statistics: PixelStatistics | None = (CLIP_MEAN, CLIP_STD),
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """(frames / 255 - mean) / std, cut into patches; or frames - 128, exact, for a folded patch embedding.

    A row times the weight w c y x of a patch embedding, flattened to w (c y x), equals its convolution.

    Args:
        frames: b f y x c, uint8 RGB; y and x are multiples of `patch_size`.
        patch_size: pixels.
        statistics: mean and std of each channel, in [0, 1]; None if `fold_normalisation` has moved them into
            the patch embedding.
        dtype: of the result; computed in float32 at least.
        impl: reference (plain torch), triton, or auto.

    Returns:
        n p (c y x), n = b f, the patches of an image row by row.

    Raises:
        ValueError: frames that are not uint8 or not a whole number of patches; statistics of other channels.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    _check(frames, patch_size, statistics)
    operands = (frames, frames.new_empty(1, dtype=dtype))
    if choose("frame_patches", impl, frames.device.type, operands=operands) == "reference":
        return frame_patches_reference(frames, patch_size, statistics, dtype)
    if statistics is None:
        scale, shift = (1.0,) * frames.shape[-1], (-float(CENTRE),) * frames.shape[-1]
    else:
        scale, shift = scale_and_shift(*statistics)
    pixels, size = frames.flatten(0, 1).contiguous(), (patch_size, patch_size)
    return patches(pixels, size, scale, shift, dtype)


def frame_patches_reference(
    frames: Tensor,
    patch_size: int,
    statistics: PixelStatistics | None,
    dtype: torch.dtype,
) -> Tensor:
    """The formula of `frame_patches`."""
    if statistics is None:
        pixels = (frames.to(torch.float32) - CENTRE).to(dtype).permute(0, 1, 4, 2, 3)  # b f c y x
    else:
        pixels = preprocess_frames_reference(frames, *statistics, dtype)
    grid = pixels.flatten(0, 1).unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # n p (c y x)


def fold_normalisation(
    weight: Tensor,
    *,
    statistics: PixelStatistics = (CLIP_MEAN, CLIP_STD),
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """W' and b' with W' (x - 128) + b' = W ((x / 255 - mean) / std), x a byte.

    W' = W / (255 std), b' = sum W (128 / 255 - mean) / std.  Bytes minus 128 are exact in bfloat16 and, being
    centred, lose less to the rounding of W' than bytes.  The weight is a constant.

    Args:
        weight: w c y x, of a patch embedding.
        statistics: mean and std of each channel, in [0, 1].
        dtype: of the result, rounded once; None for that of `weight`.
        impl: reference (plain torch, float64), triton (one launch, float32 at least), or auto.

    Returns:
        w (c y x) and w.

    Raises:
        ValueError: statistics of other channels.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    mean, std = statistics
    if {len(mean), len(std)} != {weight.shape[1]}:
        raise ValueError(f"statistics: expected {weight.shape[1]} means and deviations, found {statistics}")
    weight, dtype = weight.detach().contiguous(), dtype or weight.dtype
    scale, offset = [1 / (255 * s) for s in std], [CENTRE - 255 * m for m in mean]
    operands = (weight, weight.new_empty(1, dtype=dtype))
    if choose("frame_patches", impl, weight.device.type, operands=operands) == "triton":
        return _fold_normalisation(weight, scale, offset, dtype)
    factors = constants([*scale, *offset], torch.float64, weight.device).view(2, -1, 1)
    out = weight.double().flatten(2) * factors[0]  # w c (y x)
    return out.flatten(1).to(dtype), (out * factors[1]).flatten(1).sum(1).to(dtype)


@torch.library.custom_op("discovla::fold_normalisation", mutates_args=())
def _fold_normalisation(
    weight: Tensor, scale: Sequence[float], offset: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """scale W for every channel, w c y x to w (c y x), and the sum of offset scale W, w."""
    return kernel("frame_patches").fold_normalisation(weight, tuple(scale), tuple(offset), dtype)


@_fold_normalisation.register_fake
def _(weight, scale, offset, dtype):
    out = weight.new_empty(len(weight), weight[0].numel(), dtype=dtype)
    return out, weight.new_empty(len(weight), dtype=dtype)


def _check(frames: Tensor, patch_size: int, statistics: PixelStatistics | None) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 5:
        actual = f"{frames.dtype} of shape {tuple(frames.shape)}"
        raise ValueError(f"frames: expected uint8, b f y x c, found {actual}")
    _, _, y, x, c = frames.shape
    if y % patch_size or x % patch_size:
        raise ValueError(f"frames: expected sides that are multiples of {patch_size}, found {y} x {x}")
    if statistics is not None and {len(part) for part in statistics} != {c}:
        raise ValueError(f"statistics: expected {c} means and deviations, found {statistics}")
