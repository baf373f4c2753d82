"""Frame-level similarity: best matches both ways and their softmax-weighted means, tile by tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.pairs import unsupported
from discovla_kernels.tiles import (
    LOWEST,
    Traffic,
    accumulator,
    capability,
    dense_matmul,
    mask_pointer,
    part_rows,
    precision,
)

__all__ = [
    "Maxima",
    "gradients",
    "match_gradient",
    "maxima",
    "pairs_per_block",
    "traffic",
    "traffic_backward",
    "unsupported",
]

BLOCK_BYTES = 3 << 25  # of one block of pairs
BLOCK_R, BLOCK_C = 16, 64  # products of parts that a tile of backward writes


@triton.jit
def _pool(top, total, first, second, value, real, scale, AXIS: tl.constexpr):
    """Add the real entries along an axis to softmax-weighted means of `value` and of its square."""
    logit = tl.where(real, scale * value, -float("inf"))
    new_top = tl.maximum(top, tl.max(logit, axis=AXIS))
    keep, add = tl.exp(top - new_top), tl.exp(logit - tl.expand_dims(new_top, AXIS))
    total = total * keep + tl.sum(add, axis=AXIS)
    first = first * keep + tl.sum(add * value, axis=AXIS)
    return new_top, total, first, second * keep + tl.sum(add * value * value, axis=AXIS)


@triton.jit
def _pool_end(top, total, first, second):
    """Return mean, variance and log-sum-exp of the weights; mean and variance are 0 if nothing was added."""
    none = total == 0
    total = tl.where(none, 1.0, total)
    mean = first / total
    return mean, tl.where(none, 0.0, second / total - mean * mean), top + tl.log(total)


@triton.jit
def _matches(r, real_i, real_j):
    """Return maxima of r, t i v j, over real j (t i v) and over real i (t v j), with their lowest indices.

    A maximum over nothing is -2, and its index -1.
    """
    p, p_index = tl.max(tl.where(real_j, r, -2.0), axis=3, return_indices=True)
    q, q_index = tl.max(tl.where(real_i, r, -2.0), axis=1, return_indices=True)
    return p, tl.where(p > -2.0, p_index, -1), q, tl.where(q > -2.0, q_index, -1)


@triton.jit
def _larger(x, x_index, y, y_index, OFFSET: tl.constexpr):
    """Return the larger of two maxima, x if they are equal, and its index; those of y count from OFFSET."""
    return tl.maximum(x, y), tl.where(y > x, y_index + OFFSET, x_index)


@triton.jit
def _load_parts(ptr, rows, exists, d, D):
    """Load some columns of parts, zeros where there is no part."""
    return tl.load(ptr + rows[:, None] * D + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _frame_similarity_forward(
    text_ptr, video_ptr, scale_ptr, text_mask_ptr, video_mask_ptr, out_ptr,
    text_best_ptr, text_index_ptr, video_best_ptr, video_index_ptr, pool_ptr, T, V, I_PARTS, J_PARTS, D,
    stride_pool, HAS_TEXT_MASK: tl.constexpr, HAS_VIDEO_MASK: tl.constexpr, KEEP: tl.constexpr,
    I_FIRST: tl.constexpr, I_SECOND: tl.constexpr, J_FIRST: tl.constexpr, J_SECOND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """G = (sum_i p_i softmax_i(s p_i) + sum_j q_j softmax_j(s q_j)) / 2, p_i = max_j R_ij, q_j = max_i R_ij.

    Tile: all products of BLOCK_T texts x BLOCK_V videos, in registers.  The parts of a text are I_FIRST +
    I_SECOND rows, powers of two, so that 12 need no padding; those of a video likewise: up to four products,
    for which the parts of both sides are loaded once.
    KEEP also writes what backward needs: p, q, their indices and five sums.
    Traffic: `traffic`.
    Backward: dR_ij = dG / 2 (w_i (1 + s (p_i - mean)) [j = argmax_i] + the same of q).
    """
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    v = (tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    scale = tl.load(scale_ptr).to(ACC)
    i1, i1_exists, i1_real = part_rows(t, I_FIRST, 0, text_mask_ptr, T, I_PARTS, HAS_TEXT_MASK)
    j1, j1_exists, j1_real = part_rows(v, J_FIRST, 0, video_mask_ptr, V, J_PARTS, HAS_VIDEO_MASK)
    r11 = tl.zeros((BLOCK_T * I_FIRST, BLOCK_V * J_FIRST), dtype=ACC)
    if I_SECOND > 0:
        i2, i2_exists, i2_real = part_rows(t, I_SECOND, I_FIRST, text_mask_ptr, T, I_PARTS, HAS_TEXT_MASK)
        r21 = tl.zeros((BLOCK_T * I_SECOND, BLOCK_V * J_FIRST), dtype=ACC)
    if J_SECOND > 0:
        j2, j2_exists, j2_real = part_rows(v, J_SECOND, J_FIRST, video_mask_ptr, V, J_PARTS, HAS_VIDEO_MASK)
        r12 = tl.zeros((BLOCK_T * I_FIRST, BLOCK_V * J_SECOND), dtype=ACC)
        if I_SECOND > 0:
            r22 = tl.zeros((BLOCK_T * I_SECOND, BLOCK_V * J_SECOND), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x1, y1 = _load_parts(text_ptr, i1, i1_exists, d, D), _load_parts(video_ptr, j1, j1_exists, d, D)
        r11 = tl.dot(x1, tl.trans(y1), r11, input_precision=PRECISION, out_dtype=ACC)
        if I_SECOND > 0:
            x2 = _load_parts(text_ptr, i2, i2_exists, d, D)
            r21 = tl.dot(x2, tl.trans(y1), r21, input_precision=PRECISION, out_dtype=ACC)
        if J_SECOND > 0:
            y2 = _load_parts(video_ptr, j2, j2_exists, d, D)
            r12 = tl.dot(x1, tl.trans(y2), r12, input_precision=PRECISION, out_dtype=ACC)
            if I_SECOND > 0:
                r22 = tl.dot(x2, tl.trans(y2), r22, input_precision=PRECISION, out_dtype=ACC)
    i1_real = tl.reshape(i1_real, (BLOCK_T, I_FIRST, 1, 1))
    j1_real = tl.reshape(j1_real, (1, 1, BLOCK_V, J_FIRST))
    p1, p1_index, q1, q1_index = _matches(
        tl.reshape(r11, (BLOCK_T, I_FIRST, BLOCK_V, J_FIRST)), i1_real, j1_real
    )
    if I_SECOND > 0:
        i2_real = tl.reshape(i2_real, (BLOCK_T, I_SECOND, 1, 1))
        p2, p2_index, q, q_index = _matches(
            tl.reshape(r21, (BLOCK_T, I_SECOND, BLOCK_V, J_FIRST)), i2_real, j1_real
        )
        q1, q1_index = _larger(q1, q1_index, q, q_index, I_FIRST)
    if J_SECOND > 0:
        j2_real = tl.reshape(j2_real, (1, 1, BLOCK_V, J_SECOND))
        p, p_index, q2, q2_index = _matches(
            tl.reshape(r12, (BLOCK_T, I_FIRST, BLOCK_V, J_SECOND)), i1_real, j2_real
        )
        p1, p1_index = _larger(p1, p1_index, p, p_index, J_FIRST)
        if I_SECOND > 0:
            p, p_index, q, q_index = _matches(
                tl.reshape(r22, (BLOCK_T, I_SECOND, BLOCK_V, J_SECOND)), i2_real, j2_real
            )
            p2, p2_index = _larger(p2, p2_index, p, p_index, J_FIRST)
            q2, q2_index = _larger(q2, q2_index, q, q_index, I_FIRST)
    low, zero = tl.full((BLOCK_T, BLOCK_V), LOWEST, dtype=ACC), tl.zeros((BLOCK_T, BLOCK_V), dtype=ACC)
    top, total, first, second = _pool(
        low, zero, zero, zero, p1, tl.reshape(i1_real, (BLOCK_T, I_FIRST, 1)), scale, 1
    )
    if I_SECOND > 0:
        top, total, first, second = _pool(
            top, total, first, second, p2, tl.reshape(i2_real, (BLOCK_T, I_SECOND, 1)), scale, 1
        )
    mean_t, variance_t, lse_t = _pool_end(top, total, first, second)
    top, total, first, second = _pool(
        low, zero, zero, zero, q1, tl.reshape(j1_real, (1, BLOCK_V, J_FIRST)), scale, 2
    )
    if J_SECOND > 0:
        top, total, first, second = _pool(
            top, total, first, second, q2, tl.reshape(j2_real, (1, BLOCK_V, J_SECOND)), scale, 2
        )
    mean_v, variance_v, lse_v = _pool_end(top, total, first, second)
    pair, pairs = t[:, None] * V + v[None, :], (t < T)[:, None] & (v < V)[None, :]
    tl.store(out_ptr + pair, (mean_t + mean_v) * 0.5, mask=pairs)
    if KEEP:
        _keep_text(text_best_ptr, text_index_ptr, t, v, T, V, I_PARTS, p1, p1_index, 0)
        _keep_video(video_best_ptr, video_index_ptr, pair, pairs, J_PARTS, q1, q1_index, 0)
        if I_SECOND > 0:
            _keep_text(text_best_ptr, text_index_ptr, t, v, T, V, I_PARTS, p2, p2_index, I_FIRST)
        if J_SECOND > 0:
            _keep_video(video_best_ptr, video_index_ptr, pair, pairs, J_PARTS, q2, q2_index, J_FIRST)
        tl.store(pool_ptr + pair, mean_t, mask=pairs)
        tl.store(pool_ptr + stride_pool + pair, lse_t, mask=pairs)
        tl.store(pool_ptr + 2 * stride_pool + pair, mean_v, mask=pairs)
        tl.store(pool_ptr + 3 * stride_pool + pair, lse_v, mask=pairs)
        tl.store(pool_ptr + 4 * stride_pool + pair, (variance_t + variance_v) * 0.5, mask=pairs)


@triton.jit
def _keep_text(best_ptr, index_ptr, t, v, T, V, I_PARTS, best, index, OFFSET: tl.constexpr):
    """Write maxima of a text's parts from OFFSET, t i v."""
    i = (OFFSET + tl.arange(0, best.shape[1]))[None, :, None]
    t, v = t[:, None, None], v[None, None, :]
    here = (t < T) & (i < I_PARTS) & (v < V)
    tl.store(best_ptr + (t * I_PARTS + i) * V + v, best, mask=here)
    tl.store(index_ptr + (t * I_PARTS + i) * V + v, index, mask=here)


@triton.jit
def _keep_video(best_ptr, index_ptr, pair, pairs, J_PARTS, best, index, OFFSET: tl.constexpr):
    """Write maxima of a video's parts from OFFSET, t v j."""
    j = (OFFSET + tl.arange(0, best.shape[2]))[None, None, :]
    here = pairs[:, :, None] & (j < J_PARTS)
    tl.store(best_ptr + pair[:, :, None] * J_PARTS + j, best, mask=here)
    tl.store(index_ptr + pair[:, :, None] * J_PARTS + j, index, mask=here)


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
    tile = _tile(t, v, i, j)
    small = tile["num_warps"] == 4
    if text.element_size() == 4 and capability(text) >= (100 if small else 120):  # larger tiles would spill
        tile["BLOCK_V"] = max(1, tile["BLOCK_V"] // 2)
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
    _frame_similarity_forward[(triton.cdiv(t, tile["BLOCK_T"]), triton.cdiv(v, tile["BLOCK_V"]))](
        text, video, scale, mask_pointer(text_mask, text), mask_pointer(video_mask, video), out.similarity,
        out.text_best, out.text_index, out.video_best, out.video_index, out.pools, t, v, i, j, d, t * v,
        HAS_TEXT_MASK=text_mask is not None, HAS_VIDEO_MASK=video_mask is not None, KEEP=keep,
        BLOCK_D=64 if text.element_size() == 2 else 32, PRECISION=precision(text), ACC=accumulator(text),
        **tile,
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


def _split(parts: int, rows: int) -> tuple[int, int, int]:
    """Return how many samples a tile of about `rows` parts has, and two powers of two that cover a sample's.

    The second is 0 unless both together have less padding, and enough rows for tensor cores.
    """
    whole = triton.next_power_of_2(parts)
    half = whole // 2
    second = triton.next_power_of_2(parts - half) if half else 0
    samples = rows // half if half else 0
    if half + second < whole and samples and samples * second >= 16:
        return samples, half, second
    return max(1, rows // whole), whole, 0


def _tile(t: int, v: int, i: int, j: int) -> dict[str, int]:
    """Return tiles of t texts with i parts and v videos with j; small if large ones would idle processors."""
    large = t * v >= 1 << 16
    block_t, i_first, i_second = _split(i, 128 if large else 32)
    block_v, j_first, j_second = _split(j, 32)
    return {
        "BLOCK_T": block_t,
        "BLOCK_V": block_v,
        "I_FIRST": i_first,
        "I_SECOND": i_second,
        "J_FIRST": j_first,
        "J_SECOND": j_second,
        "num_warps": 8 if large else 4,
        "num_stages": 2,
    }


def traffic(shapes: tuple[int, int, int, int, int], *, masked: bool, keep: bool) -> Traffic:
    """Traffic of `maxima` of t texts with i parts and v videos with j parts; shapes: t i v j d.

    Texts and their masks are loaded once for each of the ceil(v / BLOCK_V) tiles they are in, videos
    ceil(t / BLOCK_T) times, mostly from L2.  A similarity is stored, with `keep` also 2 i + 2 j maxima and
    indices of each pair, and five sums.
    """
    t, i, v, j, d = shapes
    tile = _tile(t, v, i, j)
    tiles = triton.cdiv(t, tile["BLOCK_T"]), triton.cdiv(v, tile["BLOCK_V"])
    loads = (t * i * tiles[1] + v * j * tiles[0]) * (d + int(masked)) + tiles[0] * tiles[1]
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
