"""Weighted sums of best matches, one way or both, over a pair's cosines that never leave registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.pairs import (
    Masks,
    pair_products,
    pair_settings,
    pairs_per_block,
    tile_sizes,
    unsupported,
)
from discovla_kernels.tiles import Traffic, dense_matmul, mask_pointer

__all__ = ["gradients", "pairs_per_block", "scores", "traffic", "unsupported"]


@triton.jit
def _best(match, mine, other, AXIS: tl.constexpr):
    """Largest entry along an axis among the real ones and its lowest index; 0 and -1 where there is none."""
    best, index = tl.max(tl.where(other, match, -2.0), axis=AXIS, return_indices=True)
    best, index = tl.expand_dims(best, AXIS), tl.expand_dims(index, AXIS)
    found = mine & (best > -2.0)
    return tl.where(found, best, 0.0), tl.where(found, index, -1)


@triton.jit
def _late_interaction_forward(
    text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, text_weight_ptr, video_weight_ptr, out_ptr, T, V,
    I_ROWS, J_ROWS, D, BOTH: tl.constexpr, HAS_TEXT_MASK: tl.constexpr, HAS_VIDEO_MASK: tl.constexpr,
    I_BLOCK: tl.constexpr, J_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum_i a_i max_j S_ij, with BOTH + sum_j b_j max_i S_ij; S the cosines of a pair.

    Tile: BLOCK_T texts x BLOCK_V videos, whole, their counts of rows padded to powers of two. Registers: S.
    Traffic: `traffic`. Backward: `_late_interaction_backward`.
    """
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    match, text, video = pair_products(
        text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, t, v, T, V, I_ROWS, J_ROWS, D, HAS_TEXT_MASK,
        HAS_VIDEO_MASK, I_BLOCK, J_BLOCK, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    best, _ = _best(match, text[2], video[2], 3)  # t i v 1
    a = tl.load(text_weight_ptr + text[0], mask=text[1], other=0.0).to(ACC)
    score = tl.sum(a * best, axis=1, keep_dims=True)
    if BOTH:
        best, _ = _best(match, video[2], text[2], 1)  # t 1 v j
        b = tl.load(video_weight_ptr + video[0], mask=video[1], other=0.0).to(ACC)
        score += tl.sum(b * best, axis=3, keep_dims=True)
    pairs = (t < T)[:, None] & (v < V)[None, :]
    tl.store(out_ptr + t[:, None] * V + v[None, :], tl.reshape(score, (BLOCK_T, BLOCK_V)), mask=pairs)


@triton.jit
def _late_interaction_backward(
    text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, text_weight_ptr, video_weight_ptr, grad_ptr, out_ptr,
    text_sum_ptr, video_sum_ptr, T, V, I_ROWS, J_ROWS, D, BOTH: tl.constexpr, HAS_TEXT_MASK: tl.constexpr,
    HAS_VIDEO_MASK: tl.constexpr, I_BLOCK: tl.constexpr, J_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dS of a block, dense, (t i) (v j), for two products, and a tile's sums for the weights.

    dS_ij = g (a_i [j = argmax_i] + b_j [i = argmax_j]); da_i = sum_v g max_j S, db_j = sum_t g max_i S.
    Tile and registers: as forward, the products again.
    Traffic: `traffic` with `backward`.
    """
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    match, text, video = pair_products(
        text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, t, v, T, V, I_ROWS, J_ROWS, D, HAS_TEXT_MASK,
        HAS_VIDEO_MASK, I_BLOCK, J_BLOCK, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    pairs = (t < T)[:, None] & (v < V)[None, :]
    grad = tl.load(grad_ptr + t[:, None] * V + v[None, :], mask=pairs, other=0.0)
    grad = tl.reshape(grad, (BLOCK_T, 1, BLOCK_V, 1))
    a = tl.load(text_weight_ptr + text[0], mask=text[1], other=0.0).to(ACC)
    best, index = _best(match, text[2], video[2], 3)
    slope = tl.where(index == tl.arange(0, J_BLOCK)[None, None, None, :], a, 0.0)
    sums = tl.sum(grad * best, axis=2, keep_dims=True)  # t i 1 1
    place = tl.program_id(1).to(tl.int64) * T * I_ROWS + text[0]
    tl.store(text_sum_ptr + place, sums, mask=text[1])
    if BOTH:
        b = tl.load(video_weight_ptr + video[0], mask=video[1], other=0.0).to(ACC)
        best, index = _best(match, video[2], text[2], 1)
        slope += tl.where(index == tl.arange(0, I_BLOCK)[None, :, None, None], b, 0.0)
        sums = tl.sum(grad * best, axis=0, keep_dims=True)  # 1 1 v j
        place = tl.program_id(0).to(tl.int64) * V * J_ROWS + video[0]
        tl.store(video_sum_ptr + place, sums, mask=video[1])
    tl.store(out_ptr + text[0] * V * J_ROWS + video[0], slope * grad, mask=text[1] & video[1])


def scores(
    text: Tensor, video: Tensor, text_weight: Tensor, video_weight: Tensor | None, masks: Masks
) -> Tensor:
    """t v of unit rows, t i d and v j d, with weights t i and v j; without the latter one way only."""
    out = text.new_empty(len(text), len(video), dtype=text_weight.dtype)
    _launch(_late_interaction_forward, text, video, (text_weight, video_weight), masks, (out,))
    return out


def gradients(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    text_weight: Tensor,
    video_weight: Tensor | None,
    masks: Masks,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `scores` by the rows, t i d and v j d, and by both weights, t i and v j."""
    (t, i, d), (v, j, _) = text.shape, video.shape
    dense, tiles = text.new_empty(t * i, v * j), tile_sizes(i, j)
    text_sums = grad.new_empty(triton.cdiv(v, tiles[1]), t, i)
    video_sums = grad.new_zeros(triton.cdiv(t, tiles[0]), v, j)
    last = (grad.contiguous(), dense, text_sums, video_sums)
    _launch(_late_interaction_backward, text, video, (text_weight, video_weight), masks, last)
    text_grad = dense_matmul(dense, video.reshape(v * j, d), grad.dtype).view(t, i, d)
    video_grad = dense_matmul(dense.T, text.reshape(t * i, d), grad.dtype).view(v, j, d)
    return text_grad, video_grad, text_sums.sum(0), video_sums.sum(0)


def traffic(shapes: tuple[int, int, int, int, int], *, both: bool, masked: bool, backward: bool) -> Traffic:
    """Of one block of t texts with i rows and v videos with j rows in d dimensions; shapes: t i v j d.

    Texts, their masks and weights are loaded once for each of the ceil(v / BLOCK_V) tiles they are in, videos
    ceil(t / BLOCK_T) times; a score is stored. With `backward` its gradient is loaded, and stored are i j of
    each pair and one sum for each time that a weight was loaded.
    """
    t, i, v, j, d = shapes
    block_t, block_v = tile_sizes(i, j)
    texts, videos = t * i * triton.cdiv(v, block_v), v * j * triton.cdiv(t, block_t)
    weights = texts + (videos if both else 0)
    loads = (texts + videos) * (d + int(masked)) + weights
    if not backward:
        return Traffic(loads=loads, stores=t * v)
    return Traffic(loads=loads + t * v, stores=t * v * i * j + weights)


def _launch(kernel, text: Tensor, video: Tensor, weights, masks: Masks, last) -> None:
    (t, i, d), (v, j, _) = text.shape, video.shape
    settings = pair_settings(text, video, masks)
    grid = (triton.cdiv(t, settings["BLOCK_T"]), triton.cdiv(v, settings["BLOCK_V"]))
    text_weight, video_weight = weights
    both = video_weight is not None
    kernel[grid](
        text.contiguous(), video.contiguous(), mask_pointer(masks[0], text), mask_pointer(masks[1], video),
        text_weight.contiguous(), video_weight.contiguous() if both else text_weight, *last, t, v, i, j, d,
        BOTH=both, **settings,
    )  # fmt: skip
