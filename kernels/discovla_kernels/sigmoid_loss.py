"""Pairwise sigmoid loss, tile by tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import Traffic, accumulator, precision, product_tile, unsupported_tensors

BLOCK_BYTES = 1 << 26  # of the derivative of one block


def unsupported(*tensors: Tensor | None) -> str:
    """Why the kernels do not take these tensors; empty where they do."""
    return unsupported_tensors(*tensors)


@triton.jit
def _sigmoid_loss(
    text_ptr, video_ptr, scale_ptr, bias_ptr, weight_ptr, dx_ptr, sum_ptr, R, C, D, shift,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """sum softplus(-z (s x + b)) of a block, x = text videoᵀ, z = 1 where row = column + shift, else -1.

    Tile: BLOCK texts x BLOCK videos in registers; a tile writes its own sum. With BACKWARD it writes instead
    s dx = -w s z sigmoid(-z (s x + b)), and its sums of the derivative by s and by b.
    Traffic: `traffic`.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    r = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    c = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    scale, bias = tl.load(scale_ptr).to(ACC), tl.load(bias_ptr).to(ACC)
    here = (r < R)[:, None] & (c < C)[None, :]
    x = product_tile(text_ptr, video_ptr, r, c, r < R, c < C, D, BLOCK_D, PRECISION, ACC)
    sign = tl.where(r[:, None] == c[None, :] + shift, 1.0, -1.0)
    y = -sign * (scale * x + bias)
    tile, tiles = (
        i.to(tl.int64) * tl.num_programs(1) + j,
        tl.num_programs(0).to(tl.int64) * tl.num_programs(1),
    )
    small = tl.exp(-tl.abs(y))
    if BACKWARD:
        slope = -tl.load(weight_ptr).to(ACC) * sign * tl.where(y > 0, 1.0, small) / (1 + small)
        slope = tl.where(here, slope, 0.0)
        tl.store(dx_ptr + r[:, None] * C + c[None, :], scale * slope, mask=here)
        tl.store(sum_ptr + tile, tl.sum(tl.sum(slope * x, axis=1), axis=0))
        tl.store(sum_ptr + tiles + tile, tl.sum(tl.sum(slope, axis=1), axis=0))
    else:
        loss = tl.where(here, tl.maximum(y, 0.0) + tl.log(1 + small), 0.0)
        tl.store(sum_ptr + tile, tl.sum(tl.sum(loss, axis=1), axis=0))


def forward(text: Tensor, video: Tensor, scale: Tensor, bias: Tensor, shift: int) -> Tensor:
    """Sum of the losses of one block of unit rows, r d and c d."""
    return _launch(text, video, scale, bias, shift, None)[1][0].sum()


def backward(
    text: Tensor, video: Tensor, scale: Tensor, bias: Tensor, shift: int, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative by the block's cosines, r c, by the scale and by the bias, times `weight`."""
    dx, sums = _launch(text, video, scale, bias, shift, weight)
    return dx, sums[0].sum(), sums[1].sum()


def pairs_per_block(text: Tensor) -> int:
    """How many pairs one block may have."""
    return BLOCK_BYTES // max(4, text.element_size())


def traffic(shapes: tuple[int, int, int], *, backward: bool) -> Traffic:
    """Of one block of r texts and c videos in d dimensions; shapes: r c d.

    A tile loads its rows and the scalars, and stores a sum, with `backward` two and the derivative.
    """
    r, c, d = shapes
    block = _block(r, c)
    tiles = triton.cdiv(r, block), triton.cdiv(c, block)
    count = tiles[0] * tiles[1]
    loads = (r * tiles[1] + c * tiles[0]) * d + count * (3 if backward else 2)
    return Traffic(loads=loads, stores=r * c + 2 * count if backward else count)


def _block(rows: int, columns: int) -> int:
    """Side of a tile; small ones where large ones would leave processors idle."""
    return 128 if rows * columns >= 1 << 20 else 32


def _launch(
    text: Tensor, video: Tensor, scale: Tensor, bias: Tensor, shift: int, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    (rows, d), columns = text.shape, len(video)
    block = _block(rows, columns)
    grid = (triton.cdiv(rows, block), triton.cdiv(columns, block))
    dx = text.new_empty((1, 1) if weight is None else (rows, columns))
    sums = torch.zeros(2, *grid, dtype=scale.dtype, device=text.device)
    _sigmoid_loss[grid](
        text, video, scale, bias, scale if weight is None else weight, dx, sums, rows, columns, d, shift,
        BACKWARD=weight is not None, BLOCK=block, BLOCK_D=64 if text.element_size() == 2 else 32,
        PRECISION=precision(text), ACC=accumulator(text), num_warps=8 if block == 128 else 4,
    )  # fmt: skip
    return dx, sums
