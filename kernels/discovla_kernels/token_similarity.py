"""Token-wise similarities by softmaxes over a pair's cosines, which never leave registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.pairs import (
    pair_products,
    pair_settings,
    pairs_per_block,
    tile_sizes,
    unsupported,
)
from discovla_kernels.tiles import Traffic, dense_matmul, mask_pointer

__all__ = ["gradients", "pairs_per_block", "scores", "traffic", "unsupported"]


@triton.jit
def _softmax(logits, real, AXIS: tl.constexpr):
    """Softmax along an axis over real entries; 0 if there is none."""
    logits = tl.where(real, logits, -float("inf"))
    top = tl.max(logits, axis=AXIS, keep_dims=True)
    weight = tl.exp(logits - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(weight, axis=AXIS, keep_dims=True)
    return weight / tl.where(total == 0, 1.0, total)


@triton.jit
def _weights(match, kappa, text, video, OFFICIAL: tl.constexpr):
    """Return P, r, w of the text's rows, R, q, u of the video's, and k of each text row in P."""
    i_seen, k_row = text[2], kappa
    if OFFICIAL:
        i_seen, k_row = text[1], tl.where(text[2], kappa, 0.0)
    p = _softmax(k_row * match, video[2], 3)
    r = tl.sum(p * match, axis=3, keep_dims=True)
    w = _softmax(kappa * r, i_seen, 1)
    p_video = _softmax(kappa * match, text[2], 1)
    q = tl.sum(p_video * match, axis=1, keep_dims=True)
    return p, r, w, p_video, q, _softmax(kappa * q, video[2], 3), k_row


@triton.jit
def _token_similarity_forward(
    text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, kappa_ptr, out_ptr, T, V, I_ROWS, J_ROWS, D,
    TRAINING: tl.constexpr, OFFICIAL: tl.constexpr, HAS_TEXT_MASK: tl.constexpr, HAS_VIDEO_MASK: tl.constexpr,
    I_BLOCK: tl.constexpr, J_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out_tv = (sum_i w_i r_i + sum_j u_j q_j) / 2, or with TRAINING sum_ij w_i S_ij u_j.

    S the cosines of a pair; P = softmax_j(k S), r = sum_j P S, w = softmax_i(k r);
    R = softmax_i(k S), q = sum_i R S, u = softmax_j(k q).
    OFFICIAL: masked text rows attend to the video evenly (their k is 0 in P) and take part in w.
    Tile: BLOCK_T texts x BLOCK_V videos with all their rows, padded to powers of two.
    Registers: S, P and R, t i v j.  Traffic: `traffic`.  Backward: `_token_similarity_backward`.
    """
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    match, text, video = pair_products(
        text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, t, v, T, V, I_ROWS, J_ROWS, D, HAS_TEXT_MASK,
        HAS_VIDEO_MASK, I_BLOCK, J_BLOCK, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    _, r, w, _, q, u, _ = _weights(match, tl.load(kappa_ptr).to(ACC), text, video, OFFICIAL)
    if TRAINING:
        score = tl.sum(tl.sum(w * match, axis=1, keep_dims=True) * u, axis=3, keep_dims=True)
    else:
        text_side = tl.sum(w * r, axis=1, keep_dims=True)
        score = (text_side + tl.sum(u * q, axis=3, keep_dims=True)) * 0.5
    pairs = (t < T)[:, None] & (v < V)[None, :]
    tl.store(out_ptr + t[:, None] * V + v[None, :], tl.reshape(score, (BLOCK_T, BLOCK_V)), mask=pairs)


@triton.jit
def _token_similarity_backward(
    text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, kappa_ptr, grad_ptr, out_ptr, T, V, I_ROWS, J_ROWS, D,
    TRAINING: tl.constexpr, OFFICIAL: tl.constexpr, HAS_TEXT_MASK: tl.constexpr, HAS_VIDEO_MASK: tl.constexpr,
    I_BLOCK: tl.constexpr, J_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dS of a block, dense, (t i) (v j); two products then give dtext = dS video and dvideo = dSᵀ text.

    dS = g (a_i P (1 + k (S - r)) + b_j R (1 + k (S - q)) [+ w_i u_j with TRAINING]), where
    a = w (1 + k (r - sum w r)) / 2 and b alike; with TRAINING, of score s,
    a = k w (sum_j S u - s), b = k u (sum_i w S - s).
    Tile and registers: as forward, with the products computed again.  Traffic: `traffic` with `backward`.
    """
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    kappa = tl.load(kappa_ptr).to(ACC)
    match, text, video = pair_products(
        text_ptr, video_ptr, text_mask_ptr, video_mask_ptr, t, v, T, V, I_ROWS, J_ROWS, D, HAS_TEXT_MASK,
        HAS_VIDEO_MASK, I_BLOCK, J_BLOCK, BLOCK_D, PRECISION, ACC,
    )  # fmt: skip
    p, r, w, p_video, q, u, k_row = _weights(match, kappa, text, video, OFFICIAL)
    if TRAINING:
        video_scores = tl.sum(w * match, axis=1, keep_dims=True)
        score = tl.sum(video_scores * u, axis=3, keep_dims=True)
        a = kappa * w * (tl.sum(match * u, axis=3, keep_dims=True) - score)
        b = kappa * u * (video_scores - score)
        slope = w * u
    else:
        a = 0.5 * w * (1 + kappa * (r - tl.sum(w * r, axis=1, keep_dims=True)))
        b = 0.5 * u * (1 + kappa * (q - tl.sum(u * q, axis=3, keep_dims=True)))
        slope = tl.zeros_like(match)
    slope += a * p * (1 + k_row * (match - r)) + b * p_video * (1 + kappa * (match - q))
    pairs = (t < T)[:, None] & (v < V)[None, :]
    grad = tl.load(grad_ptr + t[:, None] * V + v[None, :], mask=pairs, other=0.0)
    slope = slope * tl.reshape(grad, (BLOCK_T, 1, BLOCK_V, 1))
    tl.store(out_ptr + text[0] * V * J_ROWS + video[0], slope, mask=text[1] & video[1])


def scores(
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    kappa: float,
    mode: str,
) -> Tensor:
    """Return similarities t v of unit rows, t i d and v j d; mode: ranking, training, or official padding."""
    out = text.new_empty(len(text), len(video), dtype=torch.promote_types(text.dtype, torch.float32))
    _launch(_token_similarity_forward, text, video, text_mask, video_mask, kappa, mode, out)
    return out


def gradients(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    kappa: float,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of `scores` by text and video, t i d and v j d, float32 at least."""
    (t, i, d), (v, j, _) = text.shape, video.shape
    dmatch, masks = text.new_empty(t * i, v * j), (text_mask, video_mask)
    _launch(_token_similarity_backward, text, video, *masks, kappa, mode, grad.contiguous(), dmatch)
    dtext = dense_matmul(dmatch, video.reshape(v * j, d), grad.dtype).view(t, i, d)
    return dtext, dense_matmul(dmatch.T, text.reshape(t * i, d), grad.dtype).view(v, j, d)


def traffic(shapes: tuple[int, int, int, int, int], *, masked: bool, backward: bool) -> Traffic:
    """Traffic of one block of t texts with i rows and v videos with j rows; shapes: t i v j d.

    Texts, and their masks, are loaded once for each of the ceil(v / BLOCK_V) tiles they are in, videos
    ceil(t / BLOCK_T) times; a score is stored, or with `backward` its gradient loaded and i j stored.
    """
    t, i, v, j, d = shapes
    block_t, block_v = tile_sizes(i, j)
    tiles = triton.cdiv(t, block_t), triton.cdiv(v, block_v)
    rows = t * i * tiles[1] + v * j * tiles[0]
    loads = rows * (d + int(masked)) + tiles[0] * tiles[1] + (t * v if backward else 0)
    return Traffic(loads=loads, stores=t * v * (i * j if backward else 1))


def _launch(
    kernel,
    text: Tensor,
    video: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    kappa: float,
    mode: str,
    *last: Tensor,
) -> None:
    (t, i, d), (v, j, _) = text.shape, video.shape
    settings = pair_settings(text, video, text_mask, video_mask)
    acc = torch.promote_types(text.dtype, torch.float32)
    grid = (triton.cdiv(t, settings["BLOCK_T"]), triton.cdiv(v, settings["BLOCK_V"]))
    kernel[grid](
        text.contiguous(), video.contiguous(), mask_pointer(text_mask, text), mask_pointer(video_mask, video),
        torch.full((), kappa, dtype=acc, device=text.device), *last, t, v, i, j, d,
        TRAINING=mode != "ranking", OFFICIAL=mode == "official", **settings,
    )  # fmt: skip
