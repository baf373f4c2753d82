"""Late interaction: sums of best matches over the cosines of a pair, which never leave registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.pairs import pair_products, pair_settings, pairs_per_block, tile_sizes, unsupported
from discovla_kernels.tiles import Traffic, dense_matmul, mask_pointer

__all__ = ["gradients", "pairs_per_block", "scores", "traffic", "unsupported"]


@triton.jit
def _best(match, text_real, video_real):
    """Largest cosine with a real video row, and its lowest index, for every real text row; else 0 and -1."""
    best, index = tl.max(tl.where(video_real, match, -2.0), axis=3, return_indices=True)
    best, index = tl.expand_dims(best, 3), tl.expand_dims(index, 3)
    has_match = text_real & (best > -2.0)
    return tl.where(has_match, best, 0.0), tl.where(has_match, index, -1)


@triton.jit
def _late_interaction_forward(
    text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, out_ptr, T, V, I_ROWS, J_ROWS, D,
    HAS_TEXT_MASK: tl.constexpr, HAS_VIDEO_MASK: tl.constexpr, I_BLOCK: tl.constexpr, J_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """out_tv = sum_i max_j S_ij, S the cosines of a pair.

    Tile: BLOCK_T texts x BLOCK_V videos with all their rows, padded to powers of two.  Registers: S.
    Traffic: `traffic`.  Backward: `_late_interaction_backward`.
    """
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    match, text, video = pair_products(
        text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, t, v, T, V, I_ROWS, J_ROWS, D, HAS_TEXT_MASK,
        HAS_VIDEO_MASK, I_BLOCK, J_BLOCK, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    best, _ = _best(match, text[2], video[2])  # t i v 1
    score = tl.sum(best, axis=1, keep_dims=True)
    pairs = (t < T)[:, None] & (v < V)[None, :]
    tl.store(out_ptr + t[:, None] * V + v[None, :], tl.reshape(score, (BLOCK_T, BLOCK_V)), mask=pairs)


@triton.jit
def _late_interaction_backward(
    text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, grad_ptr, out_ptr, T, V, I_ROWS, J_ROWS, D,
    HAS_TEXT_MASK: tl.constexpr, HAS_VIDEO_MASK: tl.constexpr, I_BLOCK: tl.constexpr, J_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dS_ij = grad_tv [j = argmax_j S_ij], dense, (t i) (v j); two matrix products then give the gradients.

    Tile and registers: as forward, with the products computed again.  Traffic: `traffic` with `backward`.
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
    _, index = _best(match, text[2], video[2])
    slope = tl.where(index == tl.arange(0, J_BLOCK)[None, None, None, :], grad, 0.0)
    tl.store(out_ptr + text[0] * V * J_ROWS + video[0], slope, mask=text[1] & video[1])


def scores(text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None) -> Tensor:
    """Return sum_i max_j of the cosines, t v, of unit rows t i d and v j d."""
    out = text.new_empty(len(text), len(video), dtype=torch.promote_types(text.dtype, torch.float32))
    _launch(_late_interaction_forward, text, video, text_mask, video_mask, out)
    return out


def gradients(
    grad: Tensor, text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `scores` by the rows, t i d and v j d."""
    (t, i, d), (v, j, _) = text.shape, video.shape
    dmatch = text.new_empty(t * i, v * j)
    _launch(_late_interaction_backward, text, video, text_mask, video_mask, grad.contiguous(), dmatch)
    dtext = dense_matmul(dmatch, video.reshape(v * j, d), grad.dtype).view(t, i, d)
    return dtext, dense_matmul(dmatch.T, text.reshape(t * i, d), grad.dtype).view(v, j, d)


def traffic(shapes: tuple[int, int, int, int, int], *, masked: bool, backward: bool) -> Traffic:
    """Traffic of one block of t texts with i rows and v videos with j rows; shapes: t i v j d.

    Texts and their masks are loaded once for each of the ceil(v / BLOCK_V) tiles they are in, videos
    ceil(t / BLOCK_T) times; a score is stored.  Backward loads the gradient and stores i j numbers a pair.
    """
    t, i, v, j, d = shapes
    block_t, block_v = tile_sizes(i, j)
    loads = (t * i * triton.cdiv(v, block_v) + v * j * triton.cdiv(t, block_t)) * (d + int(masked))
    if not backward:
        return Traffic(loads=loads, stores=t * v)
    return Traffic(loads=loads + t * v, stores=t * v * i * j)


def _launch(
    kernel, text: Tensor, video: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, *last: Tensor
) -> None:
    (t, i, d), (v, j, _) = text.shape, video.shape
    settings = pair_settings(text, video, text_mask, video_mask)
    grid = (triton.cdiv(t, settings["BLOCK_T"]), triton.cdiv(v, settings["BLOCK_V"]))
    kernel[grid](
        text.contiguous(), video.contiguous(), mask_pointer(text_mask, text), mask_pointer(video_mask, video),
        *last, t, v, i, j, d, **settings,
    )  # fmt: skip
