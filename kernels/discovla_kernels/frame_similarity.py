"""Frame-level similarity: best matches both ways and their softmax-weighted means, tile by tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import (
    LOWEST,
    Traffic,
    accumulator,
    dense_matmul,
    mask_pointer,
    part_rows,
    precision,
    product_tile,
    unsupported_tensors,
)

MAX_PARTS = 256  # of a text; their maxima live in registers
BLOCK_BYTES = 3 << 25  # of one block of pairs
BLOCK_R, BLOCK_C = 16, 64  # products of parts that a tile of backward writes


def unsupported(text: Tensor, video: Tensor, *masks: Tensor | None) -> str:
    """Return why the kernel cannot take t i d texts and v j d videos, or ""."""
    if text.shape[1] > MAX_PARTS:
        return f"expected at most {MAX_PARTS} parts of a text, found {text.shape[1]}"
    return unsupported_tensors(text, video, *masks)


@triton.jit
def _pool_add(top, total, first, second, value, logit):
    """Add one entry to an online softmax-weighted mean of `value` and of its square."""
    new_top = tl.maximum(top, logit)
    keep, add = tl.exp(top - new_top), tl.exp(logit - new_top)
    return new_top, total * keep + add, first * keep + add * value, second * keep + add * value * value


@triton.jit
def _pool_axis(top, total, first, second, value, logit):
    """Add all entries along the middle axis of t i v at once."""
    new_top = tl.maximum(top, tl.max(logit, axis=1))
    keep, add = tl.exp(top - new_top), tl.exp(logit - new_top[:, None, :])
    total = total * keep + tl.sum(add, axis=1)
    first = first * keep + tl.sum(add * value, axis=1)
    return new_top, total, first, second * keep + tl.sum(add * value * value, axis=1)


@triton.jit
def _pool_end(top, total, first, second):
    """Return mean, variance and log-sum-exp of the weights; mean and variance are 0 if nothing was added."""
    none = total == 0
    total = tl.where(none, 1.0, total)
    mean = first / total
    return mean, tl.where(none, 0.0, second / total - mean * mean), top + tl.log(total)


@triton.jit
def _frame_similarity_forward(
    text_ptr, video_ptr, scale_ptr, text_mask_ptr, video_mask_ptr, out_ptr,
    text_best_ptr, text_index_ptr, video_best_ptr, video_index_ptr, pool_ptr, T, V, I_PARTS, J_PARTS, D,
    stride_pool, HAS_TEXT_MASK: tl.constexpr, HAS_VIDEO_MASK: tl.constexpr, KEEP: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """G = (sum_i p_i softmax_i(s p_i) + sum_j q_j softmax_j(s q_j)) / 2, p_i = max_j R_ij, q_j = max_i R_ij.

    Tile: BLOCK_T texts x BLOCK_V videos.  The parts of a text are FIRST + SECOND rows, powers of two, so that
    12 need no padding: for one j after another, (BLOCK_T FIRST) x BLOCK_V and (BLOCK_T SECOND) x BLOCK_V
    products.
    Registers: p of every part and its j; of q only the sums of an online softmax over j.
    KEEP also writes what backward needs: p, q, their indices and five sums.
    Traffic: `traffic`.
    Backward: dR_ij = dG / 2 (w_i (1 + s (p_i - mean)) [j = argmax_i] + the same of q).
    """
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    scale = tl.load(scale_ptr).to(ACC)
    rows1, exists1, real1 = part_rows(t, FIRST, 0, text_mask_ptr, T, I_PARTS, HAS_TEXT_MASK)
    best1 = tl.full((BLOCK_T * FIRST, BLOCK_V), -2.0, dtype=ACC)
    index1 = tl.full((BLOCK_T * FIRST, BLOCK_V), -1, dtype=tl.int32)
    if SECOND > 0:
        rows2, exists2, real2 = part_rows(t, SECOND, FIRST, text_mask_ptr, T, I_PARTS, HAS_TEXT_MASK)
        best2 = tl.full((BLOCK_T * SECOND, BLOCK_V), -2.0, dtype=ACC)
        index2 = tl.full((BLOCK_T * SECOND, BLOCK_V), -1, dtype=tl.int32)
    top = tl.full((BLOCK_T, BLOCK_V), LOWEST, dtype=ACC)
    total = tl.zeros((BLOCK_T, BLOCK_V), dtype=ACC)
    first, second = total, total
    pairs = (t < T)[:, None] & (v < V)[None, :]
    pair = t[:, None] * V + v[None, :]
    for j in range(J_PARTS):
        columns = v * J_PARTS + j
        real_v = v < V
        if HAS_VIDEO_MASK:
            real_v = real_v & (tl.load(video_mask_ptr + columns, mask=real_v, other=0) != 0)
        r = product_tile(text_ptr, video_ptr, rows1, columns, exists1, v < V, D, BLOCK_D, PRECISION, ACC)
        better = real_v[None, :] & (r > best1)
        best1, index1 = tl.where(better, r, best1), tl.where(better, j, index1)
        r = tl.reshape(tl.where(real1[:, None], r, -2.0), (BLOCK_T, FIRST, BLOCK_V))
        q, q_index = tl.max(r, axis=1, return_indices=True)
        if SECOND > 0:
            r = product_tile(text_ptr, video_ptr, rows2, columns, exists2, v < V, D, BLOCK_D, PRECISION, ACC)
            better = real_v[None, :] & (r > best2)
            best2, index2 = tl.where(better, r, best2), tl.where(better, j, index2)
            r = tl.reshape(tl.where(real2[:, None], r, -2.0), (BLOCK_T, SECOND, BLOCK_V))
            q2, q2_index = tl.max(r, axis=1, return_indices=True)
            q_index = tl.where(q2 > q, q2_index + FIRST, q_index)
            q = tl.maximum(q, q2)
        logit = tl.where(real_v[None, :], scale * q, -float("inf"))
        top, total, first, second = _pool_add(top, total, first, second, q, logit)
        if KEEP:
            tl.store(video_best_ptr + pair * J_PARTS + j, q, mask=pairs)
            tl.store(video_index_ptr + pair * J_PARTS + j, tl.where(q > -2.0, q_index, -1), mask=pairs)
    mean_v, variance_v, lse_v = _pool_end(top, total, first, second)
    top = tl.full((BLOCK_T, BLOCK_V), LOWEST, dtype=ACC)
    total = tl.zeros((BLOCK_T, BLOCK_V), dtype=ACC)
    p = tl.reshape(best1, (BLOCK_T, FIRST, BLOCK_V))
    logit = tl.reshape(tl.where(real1[:, None], scale * best1, -float("inf")), (BLOCK_T, FIRST, BLOCK_V))
    top, total, first, second = _pool_axis(top, total, total, total, p, logit)
    if SECOND > 0:
        p = tl.reshape(best2, (BLOCK_T, SECOND, BLOCK_V))
        logit = tl.reshape(tl.where(real2[:, None], scale * best2, -float("inf")), (BLOCK_T, SECOND, BLOCK_V))
        top, total, first, second = _pool_axis(top, total, first, second, p, logit)
    mean_t, variance_t, lse_t = _pool_end(top, total, first, second)
    tl.store(out_ptr + pair, (mean_t + mean_v) * 0.5, mask=pairs)
    if KEEP:
        _keep(text_best_ptr, text_index_ptr, rows1, exists1, v, V, best1, index1)
        if SECOND > 0:
            _keep(text_best_ptr, text_index_ptr, rows2, exists2, v, V, best2, index2)
        tl.store(pool_ptr + pair, mean_t, mask=pairs)
        tl.store(pool_ptr + stride_pool + pair, lse_t, mask=pairs)
        tl.store(pool_ptr + 2 * stride_pool + pair, mean_v, mask=pairs)
        tl.store(pool_ptr + 3 * stride_pool + pair, lse_v, mask=pairs)
        tl.store(pool_ptr + 4 * stride_pool + pair, (variance_t + variance_v) * 0.5, mask=pairs)


@triton.jit
def _keep(best_ptr, index_ptr, rows, exists, v, V, best, index):
    """Write maxima of parts and their indices to (t i) v."""
    place, here = rows[:, None] * V + v[None, :], exists[:, None] & (v < V)[None, :]
    tl.store(best_ptr + place, best, mask=here)
    tl.store(index_ptr + place, index, mask=here)


@triton.jit
def _frame_similarity_backward(
    grad_ptr, scale_ptr, text_mask_ptr, video_mask_ptr, text_best_ptr, text_index_ptr, video_best_ptr,
    video_index_ptr, pool_ptr, out_ptr, T, V, I_PARTS, J_PARTS, stride_pool,
    HAS_TEXT_MASK: tl.constexpr, HAS_VIDEO_MASK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dR of a block, dense, (t i) (v j); two products then give dtext = dR video and dvideo = dRᵀ text.

    dR_ij = dG / 2 (w_i (1 + s (p_i - mean p)) [j = argmax_i] + u_j (1 + s (q_j - mean q)) [i = argmax_j]).
    Tile: BLOCK_R rows (t i) x BLOCK_C columns (v j); elements are independent.  Traffic: `traffic_backward`.
    """
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    here = (row < T * I_PARTS) & (column < V * J_PARTS)
    t, i, v, j = row // I_PARTS, row % I_PARTS, column // J_PARTS, column % J_PARTS
    pair = t * V + v
    scale = tl.load(scale_ptr)
    grad = tl.load(grad_ptr + pair, mask=here, other=0.0) * 0.5
    chosen = tl.load(text_index_ptr + row * V + v, mask=here, other=-1) == j
    if HAS_TEXT_MASK:
        chosen = chosen & (tl.load(text_mask_ptr + row, mask=row < T * I_PARTS, other=0) != 0)
    best = tl.load(text_best_ptr + row * V + v, mask=here & chosen, other=0.0)
    mean = tl.load(pool_ptr + pair, mask=here & chosen, other=0.0)
    lse = tl.load(pool_ptr + stride_pool + pair, mask=here & chosen, other=0.0)
    weight = tl.exp(scale * best - lse) * (1 + scale * (best - mean))
    out = tl.where(chosen, weight, 0.0)
    chosen = tl.load(video_index_ptr + pair * J_PARTS + j, mask=here, other=-1) == i
    if HAS_VIDEO_MASK:
        chosen = chosen & (tl.load(video_mask_ptr + column, mask=column < V * J_PARTS, other=0) != 0)
    best = tl.load(video_best_ptr + pair * J_PARTS + j, mask=here & chosen, other=0.0)
    mean = tl.load(pool_ptr + 2 * stride_pool + pair, mask=here & chosen, other=0.0)
    lse = tl.load(pool_ptr + 3 * stride_pool + pair, mask=here & chosen, other=0.0)
    weight = tl.exp(scale * best - lse) * (1 + scale * (best - mean))
    out = (out + tl.where(chosen, weight, 0.0)) * grad
    tl.store(out_ptr + row * V * J_PARTS + column, out, mask=here)


@dataclass(frozen=True, kw_only=True)
class Maxima:
    """Similarities of a block, t v, and what backward needs.

    text_best, text_index: t i v, best matches and their indices.  video_best, video_index: t v j, likewise.
    pools: 5 t v, mean and log-sum-exp of the text's side and of the video's, and dG / ds, which is the mean
    of both variances.
    """

    similarity: Tensor
    text_best: Tensor
    text_index: Tensor
    video_best: Tensor
    video_index: Tensor
    pools: Tensor


def maxima(
    text: Tensor,
    video: Tensor,
    scale: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    keep: bool,
) -> Maxima:
    """Similarities of unit rows, t i d and v j d, and with `keep` what `gradients` needs."""
    text, video = text.contiguous(), video.contiguous()
    (t, i, d), (v, j, _) = text.shape, video.shape
    first, second = _split(i)
    block_t, block_v = _tile(t, v, first, small=keep and text.element_size() > 2)
    acc = torch.promote_types(text.dtype, torch.float32)
    kept = (t, v) if keep else (1, 1)
    out = Maxima(
        similarity=text.new_empty(t, v, dtype=acc),
        text_best=text.new_empty(kept[0], i, kept[1], dtype=acc),
        text_index=text.new_empty(kept[0], i, kept[1], dtype=torch.int16),
        video_best=text.new_empty(*kept, j, dtype=acc),
        video_index=text.new_empty(*kept, j, dtype=torch.int16),
        pools=text.new_empty(5, *kept, dtype=acc),
    )
    _frame_similarity_forward[(triton.cdiv(t, block_t), triton.cdiv(v, block_v))](
        text, video, scale, mask_pointer(text_mask, text), mask_pointer(video_mask, video), out.similarity,
        out.text_best, out.text_index, out.video_best, out.video_index, out.pools, t, v, i, j, d, t * v,
        HAS_TEXT_MASK=text_mask is not None, HAS_VIDEO_MASK=video_mask is not None, KEEP=keep, FIRST=first,
        SECOND=second, BLOCK_T=block_t, BLOCK_V=block_v, BLOCK_D=64 if text.element_size() == 2 else 32,
        PRECISION=precision(text), ACC=accumulator(text), num_warps=8 if block_t * first >= 128 else 4,
    )  # fmt: skip
    return out


def gradients(
    grad: Tensor,
    maxima: Maxima,
    text: Tensor,
    video: Tensor,
    scale: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the similarity by text, video and scale: t i d, v j d and a scalar, float32 at least."""
    (t, i, d), (v, j, _) = text.shape, video.shape
    dmatch = match_gradient(grad, maxima, scale, text_mask, video_mask, text.dtype)
    dtext = dense_matmul(dmatch, video.view(v * j, d), grad.dtype).view(t, i, d)
    dvideo = dense_matmul(dmatch.T, text.view(t * i, d), grad.dtype).view(v, j, d)
    return dtext, dvideo, (grad * maxima.pools[4]).sum()


def match_gradient(
    grad: Tensor,
    maxima: Maxima,
    scale: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient by the products of all parts, (t i) (v j), in `dtype`."""
    (t, i, v), j = maxima.text_best.shape, maxima.video_best.shape[2]
    dmatch = grad.new_empty(t * i, v * j, dtype=dtype)
    _frame_similarity_backward[(triton.cdiv(t * i, BLOCK_R), triton.cdiv(v * j, BLOCK_C))](
        grad.contiguous(), scale, mask_pointer(text_mask, grad), mask_pointer(video_mask, grad),
        maxima.text_best, maxima.text_index, maxima.video_best, maxima.video_index, maxima.pools, dmatch, t,
        v, i, j, t * v,
        HAS_TEXT_MASK=text_mask is not None, HAS_VIDEO_MASK=video_mask is not None, BLOCK_R=BLOCK_R,
        BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return dmatch


def pairs_per_block(text: Tensor, video: Tensor, keep: bool) -> int:
    """Return how many pairs a block may have, so that all it writes stays within BLOCK_BYTES."""
    i, j = text.shape[1], video.shape[1]
    per_pair = i * j * text.element_size() + 6 * (i + j) + 24 if keep else 4
    return max(1, BLOCK_BYTES // per_pair)


def _split(parts: int) -> tuple[int, int]:
    """Return two powers of two, the second possibly 0, that cover `parts` with the least padding.

    The second is at least an eighth of the first, or tensor cores would stand idle in it.
    """
    whole = triton.next_power_of_2(parts)
    half = whole // 2
    second = max(triton.next_power_of_2(parts - half), half // 8, 1) if half else 0
    return (half, second) if half and half + second < whole else (whole, 0)


def _tile(t: int, v: int, first: int, small: bool) -> tuple[int, int]:
    """Return texts and videos of a tile; small if large ones would leave processors idle.

    small: also where they would spill, as they do if maxima of float32 products are kept.
    """
    large = t * v >= 1 << 16 and not small
    return max(1, (128 if large else 32) // first), 32


def traffic(shapes: tuple[int, int, int, int, int], *, masked: bool, keep: bool) -> Traffic:
    """Traffic of `maxima` of t texts with i parts and v videos with j parts, in float32; shapes: t i v j d.

    Texts are loaded j times for each of the ceil(v / BLOCK_V) tiles they are in, videos ceil(t / BLOCK_T)
    times for each run of a text's parts, mostly from L2; masks once a tile. A similarity is stored, with
    `keep` also 2 i + 2 j maxima and indices of each pair, and five sums.
    """
    t, i, v, j, d = shapes
    first, second = _split(i)
    block_t, block_v = _tile(t, v, first, small=keep)
    tiles = triton.cdiv(t, block_t), triton.cdiv(v, block_v)
    loads = t * i * j * d * tiles[1] + v * j * d * tiles[0] * (2 if second else 1) + tiles[0] * tiles[1]
    if masked:
        loads += t * i * tiles[1] + v * j * tiles[0]
    return Traffic(loads=loads, stores=t * v * (1 + (2 * (i + j) + 5 if keep else 0)))


def traffic_backward(shapes: tuple[int, int, int, int, int], *, masked: bool) -> Traffic:
    """Traffic of the dense derivative that `gradients` writes; shapes: t i v j d.

    Each loads its pair's gradient and two indices, from L1 where a neighbour has; each maximum, where it was
    found, itself and two sums; a tile its masks, of rows and of columns.
    """
    t, i, v, j, _ = shapes
    tiles = triton.cdiv(t * i, BLOCK_R), triton.cdiv(v * j, BLOCK_C)
    loads = 3 * t * i * v * j + 3 * t * v * (i + j) + tiles[0] * tiles[1]
    if masked:
        loads += t * i * tiles[1] + v * j * tiles[0]
    return Traffic(loads=loads, stores=t * i * v * j)
