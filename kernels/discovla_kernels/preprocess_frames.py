"""Bytes of decoded frames to the rows that a patch embedding multiplies, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import accumulator, unsupported


def supports(frames: Tensor, like: Tensor) -> str:
    """Why the kernel does not make these frames into the dtype of `like`; empty where it does."""
    return unsupported(frames, like)


@triton.jit
def _preprocess_frames_forward(
    frames_ptr, out_ptr, Y, X, PY, PX, SCALE: tl.constexpr, SHIFT: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[n, patch, c, py, px] = SCALE_c frames[n, y, x, c] + SHIFT_c, (y, x) = patch corner + (py, px).

    Tile: BLOCK pixels of one frame in the order in which they are written, all C channels of each: bytes are
    read from memory once, since the channels of a pixel share cache lines, and written in whole runs.
    Traffic: 1 byte read an entry, one entry written.
    """
    n, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here, area = place < Y * X, PY * PX
    within, patch = place % area, place // area
    across = X // PX
    y, x = patch // across * PY + within // PX, patch % across * PX + within % PX
    for c in tl.static_range(C):
        pixel = tl.load(frames_ptr + n * Y * X * C + (y * X + x) * C + c, mask=here, other=0)
        out = pixel.to(ACC) * SCALE[c] + SHIFT[c]
        tl.store(out_ptr + n * Y * X * C + (patch * C + c) * area + within, out, mask=here)


def patches(
    frames: Tensor,
    size: tuple[int, int],
    scale: tuple[float, ...],
    shift: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """scale x + shift of every channel: n y x c, uint8, to n p (c py px) for patches of `size` py, px."""
    n, y, x, c = frames.shape
    out = frames.new_empty(n, y // size[0] * (x // size[1]), c * size[0] * size[1], dtype=dtype)
    block = 1024
    _preprocess_frames_forward[(n, triton.cdiv(y * x, block))](
        frames, out, y, x, *size, SCALE=scale, SHIFT=shift, C=c, BLOCK=block, ACC=accumulator(out)
    )
    return out
