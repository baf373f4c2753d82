"""Tiles of whole pairs: every product of a text's rows and a video's rows, and their launch settings."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import accumulator, part_rows, precision, product_tile, unsupported_tensors

MAX_PRODUCTS = 1 << 14  # of one pair, both sides padded; a few arrays of that size live in registers
BLOCK_BYTES = 3 << 25  # of the derivative of one block


def unsupported(text: Tensor, video: Tensor, *masks: Tensor | None) -> str:
    """Return why the kernels cannot take t i d texts and v j d videos, or ""."""
    rows, columns = padded(text.shape[1]), padded(video.shape[1])
    if max(16, rows) * max(16, columns) > MAX_PRODUCTS:
        return (
            f"expected at most {MAX_PRODUCTS} products of a pair's rows, counts rounded up to powers of two, "
            f"found {rows} x {columns}"
        )
    return unsupported_tensors(text, video, *masks)


@triton.jit
def pair_products(
    text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, t, v, T, V, I_ROWS, J_ROWS, D,
    HAS_TEXT_MASK: tl.constexpr, HAS_VIDEO_MASK: tl.constexpr, I_BLOCK: tl.constexpr, J_BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the cosines of texts t and videos v, t i v j; of each side (rows, exists, real), broadcastable.

    exists: not padding of the tile.  real: exists, and the mask is true.
    """
    shape: tl.constexpr = (t.shape[0], I_BLOCK, v.shape[0], J_BLOCK)
    down: tl.constexpr = (t.shape[0], I_BLOCK, 1, 1)
    across: tl.constexpr = (1, 1, v.shape[0], J_BLOCK)
    i, i_exists, i_real = part_rows(t, I_BLOCK, 0, text_mask_ptr, T, I_ROWS, HAS_TEXT_MASK)
    j, j_exists, j_real = part_rows(v, J_BLOCK, 0, video_mask_ptr, V, J_ROWS, HAS_VIDEO_MASK)
    match = product_tile(text_ptr, video_ptr, i, j, i_exists, j_exists, D, BLOCK_D, PRECISION, ACC)
    text = tl.reshape(i, down), tl.reshape(i_exists, down), tl.reshape(i_real, down)
    video = tl.reshape(j, across), tl.reshape(j_exists, across), tl.reshape(j_real, across)
    return tl.reshape(match, shape), text, video


def pairs_per_block(text: Tensor, video: Tensor) -> int:
    """Return how many pairs a block may have, so that their derivative stays within BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // (text.shape[1] * video.shape[1] * text.element_size()))


def padded(rows: int) -> int:
    """Return the number of rows of a sample in a tile."""
    return triton.next_power_of_2(rows)


def tile_sizes(i: int, j: int) -> tuple[int, int]:
    """Return how many texts and videos a tile has: 64 x 64 products, or one pair if it has more."""
    return max(1, 64 // padded(i)), max(1, 64 // padded(j))


def pair_settings(
    text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None
) -> dict[str, object]:
    """Return the constants and launch options that kernels on whole pairs share."""
    block_t, block_v = tile_sizes(text.shape[1], video.shape[1])
    i_block, j_block = padded(text.shape[1]), padded(video.shape[1])
    return {
        "HAS_TEXT_MASK": text_mask is not None,
        "HAS_VIDEO_MASK": video_mask is not None,
        "I_BLOCK": i_block,
        "J_BLOCK": j_block,
        "BLOCK_T": block_t,
        "BLOCK_V": block_v,
        "BLOCK_D": 64 if text.element_size() == 2 else 32,
        "PRECISION": precision(text),
        "ACC": accumulator(text),
        "num_warps": 4 if block_t * i_block * block_v * j_block <= 4096 else 8,
    }
