"""Pooling of tokens by soft assignment to centres, one program a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import Traffic, accumulator, mask_pointer, precision, unsupported_tensors

MAX_SHARES = 1 << 13  # tokens x centres of a sample, padded; a few arrays of that size live in registers
BLOCK_ELEMENTS = 1 << 24  # numbers in the tokens of samples that are pooled at once


def unsupported(tokens: Tensor, mask: Tensor, assignment: Tensor) -> str:
    """Return why the kernels cannot take n l d tokens and k d centres, or ""."""
    length, centres = padded(tokens.shape[1]), padded(len(assignment))
    if length * centres > MAX_SHARES:
        return (
            f"expected at most {MAX_SHARES} tokens x centres, counts rounded up to powers of two, "
            f"found {length} x {centres}"
        )
    return unsupported_tensors(tokens, mask)


@triton.jit
def _table(table_ptr, k, d, K, D):
    """Load some columns of a table of centres, k d."""
    return tl.load(
        table_ptr + k[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit
def _tokens(token_ptr, row, real, d, D, ACC: tl.constexpr):
    """Load some columns of a sample's tokens, l d; 0 for padding."""
    return tl.load(
        token_ptr + row[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
    ).to(ACC)


@triton.jit
def _shares(
    token_ptr, assignment_ptr, row, real, k, K, D, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return a of a sample, l k: the softmax over centres, 0 for padding."""
    z = tl.zeros((row.shape[0], k.shape[0]), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x, c = _tokens(token_ptr, row, real, d, D, ACC), _table(assignment_ptr, k, d, K, D)
        z = tl.dot(x, tl.trans(c), z, input_precision=PRECISION, out_dtype=ACC)
    z = tl.where((k < K)[None, :], z, -float("inf"))
    weight = tl.exp(z - tl.max(z, axis=1)[:, None])
    return tl.where(real[:, None], weight / tl.sum(weight, axis=1)[:, None], 0.0)


@triton.jit
def _residuals(token_ptr, centre_ptr, a, row, real, k, d, K, D, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Return some columns of V, k d, of x and of the centres."""
    x, e = _tokens(token_ptr, row, real, d, D, ACC), _table(centre_ptr, k, d, K, D)
    total = tl.dot(tl.trans(a), x, input_precision=PRECISION, out_dtype=ACC)
    return total - tl.sum(a, axis=0)[:, None] * e, x, e


@triton.jit
def _norms(
    token_ptr, centre_ptr, a, row, real, k, K, D, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Return ‖V_k‖, and 1 for padding."""
    squares = tl.zeros((k.shape[0],), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v, _, _ = _residuals(token_ptr, centre_ptr, a, row, real, k, d, K, D, PRECISION, ACC)
        squares += tl.sum(v * v, axis=1)
    return tl.where(k < K, tl.sqrt(squares), 1.0)


@triton.jit
def _soft_vlad_forward(
    token_ptr, mask_ptr, assignment_ptr, centre_ptr, out_ptr, L, K, D, L_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = n(sum_k n(V_k)), V_k = sum_l a_lk (x_l - e_k), a_l = softmax_k(x_l · c_k), n(x) = x / ‖x‖.

    Tile: one sample, BLOCK_D columns at a time, in four passes: for a, ‖V‖, the length of the mean, the mean.
    Registers: a of all tokens, l k.  Traffic: `traffic`.  Backward: `_soft_vlad_backward`.
    """
    n = tl.program_id(0).to(tl.int64)
    l, k = tl.arange(0, L_BLOCK), tl.arange(0, K_BLOCK)  # noqa: E741
    row = n * L + l
    real = tl.load(mask_ptr + row, mask=l < L, other=0) != 0
    a = _shares(token_ptr, assignment_ptr, row, real, k, K, D, BLOCK_D, PRECISION, ACC)
    norm = _norms(token_ptr, centre_ptr, a, row, real, k, K, D, BLOCK_D, PRECISION, ACC)
    square = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v, _, _ = _residuals(token_ptr, centre_ptr, a, row, real, k, d, K, D, PRECISION, ACC)
        mean = tl.sum(v / norm[:, None], axis=0)
        square += mean * mean
    length = tl.sqrt(tl.sum(square, axis=0))
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v, _, _ = _residuals(token_ptr, centre_ptr, a, row, real, k, d, K, D, PRECISION, ACC)
        tl.store(out_ptr + n * D + d, tl.sum(v / norm[:, None], axis=0) / length, mask=d < D)


@triton.jit
def _slopes(v, norm, grad, along, project, length):
    """Return some columns of dV, k d, and of dm, where m = sum_k n(V_k)."""
    unit = v / norm[:, None]
    dm = (grad - tl.sum(unit, axis=0) * along) / length
    return (dm[None, :] - unit * project[:, None]) / norm[:, None], dm


@triton.jit
def _soft_vlad_backward(
    token_ptr, mask_ptr, assignment_ptr, centre_ptr, grad_ptr, out_ptr, slope_ptr, mean_ptr, share_ptr, L, K,
    D, stride_share, L_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Derivative by the tokens, and the operands of two matrix products that give those by the centres.

    v = n(V), m = sum_k v: dm = (g - m (m·g) / ‖m‖²) / ‖m‖, dV = (dm - v (v·dm)) / ‖V‖;
    dz = a (dA - sum_k a dA) with dA_lk = dV_k · (x_l - e_k), dx = a dV + dz c, dc = dzᵀ x;
    de_k = -sum_n A dV = -sum_n (A / ‖V‖) dm + sum_n w V with A = sum_l a, w = A (v·dm) / ‖V‖²,
    and w V = sum_l (w a) x - (w A) e.
    Writes dx, dz and w a (n l 2k), dm (n d), A / ‖V‖ and w A (2 n k).
    Tile: one sample, BLOCK_D columns at a time, in five passes: for a, ‖V‖, the products with g and m, dA and
    dx.  Registers: a and dz, l k.  Traffic: `traffic` with `backward`.
    """
    n = tl.program_id(0).to(tl.int64)
    l, k = tl.arange(0, L_BLOCK), tl.arange(0, K_BLOCK)  # noqa: E741
    row = n * L + l
    real = tl.load(mask_ptr + row, mask=l < L, other=0) != 0
    a = _shares(token_ptr, assignment_ptr, row, real, k, K, D, BLOCK_D, PRECISION, ACC)
    norm = _norms(token_ptr, centre_ptr, a, row, real, k, K, D, BLOCK_D, PRECISION, ACC)
    square, with_grad = tl.zeros((BLOCK_D,), dtype=ACC), tl.zeros((BLOCK_D,), dtype=ACC)
    unit_grad, unit_mean = tl.zeros((K_BLOCK,), dtype=ACC), tl.zeros((K_BLOCK,), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v, _, _ = _residuals(token_ptr, centre_ptr, a, row, real, k, d, K, D, PRECISION, ACC)
        unit, grad = v / norm[:, None], tl.load(grad_ptr + n * D + d, mask=d < D, other=0.0)
        mean = tl.sum(unit, axis=0)
        square += mean * mean
        with_grad += mean * grad
        unit_grad += tl.sum(unit * grad[None, :], axis=1)
        unit_mean += tl.sum(unit * mean[None, :], axis=1)
    length = tl.sqrt(tl.sum(square, axis=0))
    along = tl.sum(with_grad, axis=0) / (length * length)  # m·g / ‖m‖²
    project = (unit_grad - unit_mean * along) / length  # v·dm
    da, of_centre = tl.zeros_like(a), tl.zeros((K_BLOCK,), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v, x, e = _residuals(token_ptr, centre_ptr, a, row, real, k, d, K, D, PRECISION, ACC)
        grad = tl.load(grad_ptr + n * D + d, mask=d < D, other=0.0)
        slope, dm = _slopes(v, norm, grad, along, project, length)
        tl.store(mean_ptr + n * D + d, dm, mask=d < D)
        da = tl.dot(x, tl.trans(slope), da, input_precision=PRECISION, out_dtype=ACC)
        of_centre += tl.sum(slope * e, axis=1)
    da -= of_centre[None, :]
    dz = a * (da - tl.sum(a * da, axis=1)[:, None])
    share = tl.sum(a, axis=0)
    weight = share * project / (norm * norm)
    place, here = row[:, None] * 2 * K + k[None, :], (l < L)[:, None] & (k < K)[None, :]
    tl.store(slope_ptr + place, dz, mask=here)
    tl.store(slope_ptr + K + place, a * weight[None, :], mask=here)
    tl.store(share_ptr + n * K + k, share / norm, mask=k < K)
    tl.store(share_ptr + stride_share + n * K + k, share * weight, mask=k < K)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v, _, _ = _residuals(token_ptr, centre_ptr, a, row, real, k, d, K, D, PRECISION, ACC)
        grad = tl.load(grad_ptr + n * D + d, mask=d < D, other=0.0)
        slope, _ = _slopes(v, norm, grad, along, project, length)
        dx = tl.dot(a, slope, input_precision=PRECISION, out_dtype=ACC)
        c = _table(assignment_ptr, k, d, K, D)
        dx = tl.dot(dz, c, dx, input_precision=PRECISION, out_dtype=ACC)
        tl.store(out_ptr + row[:, None] * D + d[None, :], dx, mask=(l < L)[:, None] & (d < D)[None, :])


def forward(tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor) -> Tensor:
    """Pool tokens n l d with mask n l to n d; assignment and centres k d, in float32 at least."""
    out = tokens.new_empty(len(tokens), tokens.shape[2], dtype=assignment.dtype)
    _soft_vlad_forward[(len(tokens),)](
        tokens.contiguous(), mask_pointer(mask, tokens), assignment.contiguous(), centres.contiguous(), out,
        tokens.shape[1], *assignment.shape, **_settings(tokens, assignment),
    )  # fmt: skip
    return out


def gradients(
    grad: Tensor, tokens: Tensor, mask: Tensor, assignment: Tensor, centres: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` by tokens (in their dtype), assignment and centres."""
    (n, length, d), k = tokens.shape, len(assignment)
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    slopes, means = assignment.new_empty(n, length, 2 * k), assignment.new_empty(n, d)
    shares = assignment.new_empty(2, n, k)
    _soft_vlad_backward[(n,)](
        tokens.contiguous(), mask_pointer(mask, tokens), assignment.contiguous(), centres.contiguous(),
        grad.contiguous(), out, slopes, means, shares, length, k, d, n * k, **_settings(tokens, assignment),
    )  # fmt: skip
    real = tokens.masked_fill(~mask[..., None], 0).to(assignment.dtype).view(n * length, d)
    tables = slopes.view(n * length, 2 * k).T @ real  # dz x and w a x, 2k d
    centre_grad = tables[k:] - shares[0].T @ means - shares[1].sum(0)[:, None] * centres
    return out, tables[:k], centre_grad


def samples_per_block(tokens: Tensor, assignment: Tensor) -> int:
    """Return how many samples are pooled at once."""
    return max(1, BLOCK_ELEMENTS // (tokens.shape[1] * tokens.shape[2]))


def traffic(n: int, tokens: tuple[int, int], k: int, d: int, *, backward: bool) -> Traffic:
    """Traffic of n samples; tokens: l of a sample, and the number of real ones in all.

    A sample loads its mask once, and in each of four passes its real tokens and a table of centres (from a
    cache after the first), and stores one vector.  Backward has five passes, loads the assignment once more
    and the gradient three times; it stores the gradient by the tokens, and 2 l k + d + 2 k.
    """
    l, real = tokens  # noqa: E741
    if not backward:
        return Traffic(loads=n * l + 4 * (real * d + n * k * d), stores=n * d)
    loads = n * l + 5 * real * d + 6 * n * k * d + 3 * n * d
    return Traffic(loads=loads, stores=n * (l * d + 2 * l * k + d + 2 * k))


def padded(count: int) -> int:
    """Return the tokens or centres of a tile: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(count))


def _settings(tokens: Tensor, assignment: Tensor) -> dict[str, object]:
    length, centres = padded(tokens.shape[1]), padded(len(assignment))
    return {
        "L_BLOCK": length,
        "K_BLOCK": centres,
        "BLOCK_D": 32,  # more would spill
        "PRECISION": precision(assignment),
        "ACC": accumulator(assignment),
        "num_warps": 4 if length <= 64 else 8,
    }
