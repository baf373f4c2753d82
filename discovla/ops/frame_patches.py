"""Decoded frames to the rows that a patch embedding multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.dispatch import Impl, choose
from discovla.ops.preprocess_frames import CLIP_MEAN, CLIP_STD, patches, preprocess_frames_reference

CENTRE = 128  # of a byte: what is left of it is exact in bfloat16


def frame_patches(
    frames: Tensor,
    patch_size: int,
    *,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = (CLIP_MEAN, CLIP_STD),
    dtype: torch.dtype = torch.float32,
    impl: Impl = "auto",
) -> Tensor:
    """(frames / 255 - mean) / std, cut into patches; or frames - 128, exact, for a folded patch embedding.

    A row times a patch embedding w c y x flattened to w (c y x) is what its convolution gives.

    Args:
        frames: b f y x c, uint8 RGB; y and x are multiples of `patch_size`.
        patch_size: pixels.
        statistics: mean and std of each channel, in [0, 1]; None where `fold_normalisation` has moved them
            into the patch embedding.
        dtype: of the result; the arithmetic is done in float32 at least.
        impl: reference (plain torch), triton, or auto.

    Returns:
        n p (c y x), n = b f, patches in rows of an image.

    Raises:
        ValueError: frames that are not uint8, or of no whole number of patches; statistics of other channels.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    _check(frames, patch_size, statistics)
    operands = (frames, frames.new_empty(1, dtype=dtype))
    if choose("frame_patches", impl, frames.device.type, operands=operands) == "reference":
        return frame_patches_reference(frames, patch_size, statistics, dtype)
    scale, shift = (1.0,) * frames.shape[-1], (-float(CENTRE),) * frames.shape[-1]
    if statistics is not None:
        scale = tuple(1 / (255 * s) for s in statistics[1])
        shift = tuple(-m / s for m, s in zip(*statistics, strict=True))
    pixels, size = frames.flatten(0, 1).contiguous(), (patch_size, patch_size)
    return patches(pixels, size, scale, shift, dtype)


def frame_patches_reference(
    frames: Tensor,
    patch_size: int,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The formula of `frame_patches`."""
    if statistics is None:
        pixels = (frames.to(torch.float32) - CENTRE).to(dtype).permute(0, 1, 4, 2, 3)  # b f c y x
    else:
        pixels = preprocess_frames_reference(frames, *statistics, dtype)
    cut = pixels.flatten(0, 1).unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # n p (c y x)


def fold_normalisation(
    weight: Tensor, *, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> tuple[Tensor, Tensor]:
    """W' and b' with W' (x - 128) + b' = W ((x / 255 - mean) / std), x a byte.

    W' = W / (255 std), b' = sum W (128 / 255 - mean) / std.  Bytes less 128 are exact in bfloat16 and, around
    zero, lose less to the rounding of W' than bytes do.

    Args:
        weight: w c y x, of a patch embedding.
        mean, std: of each channel, in [0, 1].

    Returns:
        w (c y x) and w, computed in float64, in the dtype of `weight`.
    """
    wide = weight.double()
    scale = torch.tensor([1 / s for s in std], dtype=wide.dtype, device=wide.device)[:, None, None]
    offset = torch.tensor([CENTRE / 255 - m for m in mean], dtype=wide.dtype, device=wide.device)
    bias = (wide * scale * offset[:, None, None]).flatten(1).sum(1)
    return (wide * scale / 255).flatten(1).to(weight.dtype), bias.to(weight.dtype)


def _check(
    frames: Tensor, patch_size: int, statistics: tuple[tuple[float, ...], tuple[float, ...]] | None
) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 5:
        found = f"{frames.dtype} of shape {tuple(frames.shape)}"
        raise ValueError(f"frames: expected uint8, b f y x c, found {found}")
    _, _, y, x, c = frames.shape
    if y % patch_size or x % patch_size:
        raise ValueError(f"frames: expected sides that are multiples of {patch_size}, found {y} x {x}")
    if statistics is not None and {len(part) for part in statistics} != {c}:
        raise ValueError(f"statistics: expected {c} means and deviations, found {statistics}")
