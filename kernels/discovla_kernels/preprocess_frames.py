"""Decoded frames to patches, and a patch embedding that takes bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import accumulator, unsupported_tensors


def unsupported(source: Tensor, like: Tensor) -> str:
    """Return why no kernel converts these frames, or this weight, to the dtype of `like`, or ""."""
    return unsupported_tensors(source) or unsupported_tensors(like)


@triton.jit
def _preprocess_frames_forward(
    frames_ptr, out_ptr, Y, X, PY, PX, SCALE: tl.constexpr, SHIFT: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[n, patch, c, py, px] = SCALE_c frames[n, y, x, c] + SHIFT_c, (y, x) = patch corner + (py, px).

    Tile: BLOCK pixels of one frame in the order of the output, with all C channels of each: the channels of a
    pixel share cache lines, so bytes are read from memory once, and writes are contiguous.
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
    """Return scale x + shift of every channel: n y x c, uint8, to n p (c py px); size: py, px."""
    n, y, x, c = frames.shape
    out = frames.new_empty(n, y // size[0] * (x // size[1]), c * size[0] * size[1], dtype=dtype)
    block = 1024
    _preprocess_frames_forward[(n, triton.cdiv(y * x, block))](
        frames, out, y, x, *size, SCALE=scale, SHIFT=shift, C=c, BLOCK=block, ACC=accumulator(out)
    )
    return out


@triton.jit
def _fold_normalisation_forward(
    weight_ptr, out_ptr, bias_ptr, AREA, SCALE: tl.constexpr, OFFSET: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[w, c, p] = SCALE_c weight[w, c, p], and bias[w] = sum over c and p of OFFSET_c out[w, c, p].

    Tile: the row of one output, channel by channel; the sum is taken before `out` is rounded.
    """
    w, place = tl.program_id(0), tl.arange(0, BLOCK)
    here, start = place < AREA, w.to(tl.int64) * C * AREA
    total = tl.zeros((BLOCK,), ACC)
    for c in tl.static_range(C):
        folded = tl.load(weight_ptr + start + c * AREA + place, mask=here, other=0).to(ACC) * SCALE[c]
        tl.store(out_ptr + start + c * AREA + place, folded, mask=here)
        total += folded * OFFSET[c]
    tl.store(bias_ptr + w, tl.sum(total))


def fold_normalisation(
    weight: Tensor, scale: tuple[float, ...], offset: tuple[float, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return W' = scale W, w (c y x), and sum offset W', w, for a weight w c y x."""
    w, c, y, x = weight.shape
    out, bias = weight.new_empty(w, c * y * x, dtype=dtype), weight.new_empty(w, dtype=dtype)
    wider = out.new_empty(0, dtype=torch.promote_types(weight.dtype, dtype))
    _fold_normalisation_forward[(w,)](
        weight, out, bias, y * x, SCALE=scale, OFFSET=offset, C=c, BLOCK=triton.next_power_of_2(y * x),
        ACC=accumulator(wider),
    )  # fmt: skip
    return out, bias
