"""Layer norm and LoRA in one pass: the projection is one product of [y | H] with [W | B]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel, run_reference
from discovla.ops.layer_norm import Affine, check_affine, layer_norm_reference


def lora_norm(
    x: Tensor,
    a: Tensor,
    u: Tensor | None = None,
    *,
    affine: Affine | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """x' = x + u and y as in `layer_norm`, H = y aᵀ, and z = [y | H | 0].

    `lora_projection` computes W y + b H + bias from z.

    Args:
        x: ... w, the residual stream.
        a: k w, of LoRA, used in the dtype of z; or p k w, p copies of it, each of which receives a partial
            sum of the gradient (`lora_weights`).
        u: ... w, the update of a block, or None for x' = x.
        affine: gain and shift of y, w each, frozen; None for 1 and 0.
        eps: added to the variance.
        dtype: of z; by default that of u, or of x without u.
        impl: reference (plain torch), compiled (it under torch.compile), triton, or auto.

    Returns:
        x' (x itself without u), in the dtype of x; z, ... (w + p), where p is k rounded up to a power of
        two, at least 16; and a copy of H, ... k, without gradient, for the backward of `lora_projection`.

    Raises:
        ValueError: shapes that do not fit, or a gain or shift that requires a gradient.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: LoRA (arXiv 2106.09685).
    """
    expect_shape("u", u, tuple(x.shape))
    copies = a if a.ndim == 3 else a[None]
    expect_shape("a", copies, (*copies.shape[:2], x.shape[-1]))
    dtype = dtype or (x if u is None else u).dtype
    gain, shift = check_affine(affine, x)
    like_z = torch.empty(0, dtype=dtype, device=x.device)
    chosen = choose("lora_norm", impl, x.device.type, operands=(x, copies, like_z, u, gain, shift))
    if chosen != "triton":
        return run_reference(chosen, lora_norm_reference, x, copies[0], u, affine, eps, dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    update = None if u is None else u.reshape(rows.shape).contiguous()
    if a.ndim == 2:
        copies = a.contiguous().expand(kernel("lora_norm").programs(len(rows)), -1, -1)
    total, z, low, _ = _lora_norm(rows, copies, update, gain, shift, eps, dtype)
    z, low = (part.view(*x.shape[:-1], part.shape[1]) for part in (z, low))
    return x if u is None else total.view(x.shape), z, low


def lora_norm_reference(
    x: Tensor, a: Tensor, u: Tensor | None, affine: Affine | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of `lora_norm`."""
    total, y = layer_norm_reference(x, u, affine, eps, dtype)
    low = y @ a.to(dtype).T  # ... k
    return total, torch.cat([y, F.pad(low, (0, padded_rank(len(a)) - len(a)))], dim=-1), low.detach()


def padded_rank(rank: int) -> int:
    """Return the number of columns of z after y: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class LoRAWeights:
    """Weights of one projection and its update, as `lora_norm` and `lora_projection` take them.

    a: p k w, p copies of LoRA's a.  b: o k, LoRA's.  augmented: o (w + q) = [W | B | 0], without gradient.
    bias: o.  All but `a` are in the compute dtype.
    """

    a: Tensor
    b: Tensor
    augmented: Tensor
    bias: Tensor


def lora_weights(
    linears: Sequence[tuple[Tensor, Tensor]],
    factors: Sequence[tuple[Tensor, Tensor]],
    *,
    x: Tensor,
    dtype: torch.dtype,
    impl: Impl = "auto",
) -> list[LoRAWeights]:
    """Assemble the weights of several projections of one shape, in as many launches as those of one.

    Args:
        linears: weight o w and bias o of each, frozen.
        factors: LoRA's a, k w, and b, o k, of each.
        x: rows like those that `lora_norm` will get: it returns one partial gradient of a per program, and
            backward sums those of all projections together.
        dtype: compute dtype.
        impl: of `lora_norm`.

    Raises:
        ValueError: shapes that do not fit, or a weight or bias that requires a gradient.
    """
    (outputs, width), rank = linears[0][0].shape, len(factors[0][0])
    for (weight, bias), (a, b) in zip(linears, factors, strict=True):
        expect_shape("weight", weight, (outputs, width))
        expect_shape("bias", bias, (outputs,))
        expect_shape("a", a, (rank, width))
        expect_shape("b", b, (outputs, rank))
        if weight.requires_grad or bias.requires_grad:
            raise ValueError("weight, bias: expected frozen tensors, found one that requires a gradient")
    operands = (x, factors[0][0][None], torch.empty(0, dtype=dtype, device=x.device))
    chosen = choose("lora_norm", impl, x.device.type, operands=operands)
    parts, n = kernel("lora_norm").programs(x[..., 0].numel()) if chosen == "triton" else 1, len(linears)
    weights, a, b = [w for w, _ in linears], [a for a, _ in factors], [b for _, b in factors]
    outs = _LoRAWeights.apply(parts, dtype, n, *weights, *a, *b)
    return [
        LoRAWeights(a=outs[i], b=outs[n + i], augmented=outs[2 * n + i], bias=linears[i][1].to(dtype))
        for i in range(n)
    ]


class _LoRAWeights(torch.autograd.Function):
    """n weights, n a and n b to n copies of a, n b and n [W | B | 0]."""

    @staticmethod
    def forward(ctx, parts: int, dtype: torch.dtype, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, a, b = [x.to(dtype) for x in tensors[:n]], tensors[n : 2 * n], tensors[2 * n :]
        (outputs, width), rank = weights[0].shape, b[0].shape[1]
        ctx.set_materialize_grads(False)
        ctx.dtypes = a[0].dtype, b[0].dtype
        stacked = weights[0].new_empty(n, outputs, width + padded_rank(rank), dtype=dtype)
        low = stacked[..., width : width + rank]
        torch.stack(weights, out=stacked[..., :width])
        if low.shape[2] < stacked.shape[2] - width:
            stacked[..., width:].zero_()
        if b[0].dtype == dtype:
            torch.stack(b, out=low)
        else:
            low.copy_(torch.stack(b))
        augmented = stacked.unbind()
        ctx.mark_non_differentiable(*augmented)
        return *(x.detach().expand(parts, -1, -1) for x in a), *low.unbind(), *augmented

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n = len(grads) // 3
        da, db = _stack_gradients(grads[:n]), _stack_gradients(grads[n : 2 * n])
        da = da if da is None else da.sum(1)
        factors = [
            [None] * n if x is None else x.to(dtype).unbind()
            for x, dtype in zip((da, db), ctx.dtypes, strict=True)
        ]
        return None, None, None, *[None] * n, *factors[0], *factors[1]


def _stack_gradients(grads: Sequence[Tensor | None]) -> Tensor | None:
    """Stack gradients of one shape, zeros for those that are None; None if all are."""
    like = next((x for x in grads if x is not None), None)
    return None if like is None else torch.stack([torch.zeros_like(like) if x is None else x for x in grads])


def lora_projection(z: Tensor, low: Tensor, weights: LoRAWeights) -> Tensor:
    """W y + b H + bias in one product, z = [y | H | 0] and low = H of `lora_norm`.

    Backward is one product for z and a thin one for b, which needs H only; W is a constant.

    Args:
        z: ... (w + p).  low: ... k.

    Returns:
        ... o.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_projection(z, low, weights)
    out = _LoRAProjection.apply(
        z.flatten(0, -2), low.flatten(0, -2), weights.augmented, weights.bias, weights.b
    )
    return out.view(*z.shape[:-1], len(weights.b))


def check_projection(z: Tensor, low: Tensor, weights: LoRAWeights) -> None:
    """Raise ValueError if rows of `lora_norm` do not fit the weights."""
    expect_shape("z", z, (*z.shape[:-1], weights.augmented.shape[1]))
    expect_shape("low", low, (*z.shape[:-1], weights.b.shape[1]))


class _LoRAProjection(torch.autograd.Function):
    """r (w + p) to r o."""

    @staticmethod
    def forward(ctx, z: Tensor, low: Tensor, augmented: Tensor, bias: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(augmented, low)
        return F.linear(z, augmented, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        augmented, low = ctx.saved_tensors
        return grad @ augmented, None, None, None, grad.T @ low


@torch.library.custom_op("discovla::lora_norm", mutates_args=())
def _lora_norm(
    x: Tensor,
    a: Tensor,
    u: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' (empty without u), z, H, and mean and 1 / deviation of every row, 2 r; a: p k w."""
    return kernel("lora_norm").forward(x, u, a[0], gain, shift, eps, dtype)


@_lora_norm.register_fake
def _(x, a, u, gain, shift, eps, dtype):
    total, rank = x.new_empty(0) if u is None else torch.empty_like(x), a.shape[1]
    z = x.new_empty(len(x), x.shape[1] + padded_rank(rank), dtype=dtype)
    return total, z, x.new_empty(len(x), rank, dtype=dtype), x.new_empty(2, len(x), dtype=sum_dtype(x))


@torch.library.custom_op("discovla::lora_norm_backward", mutates_args=())
def _lora_norm_backward(
    grad_z: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    stats: Tensor,
    a: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by u (empty if it equals that by x) and by a, p k w."""
    grad_total = None if grad_total is None else grad_total.contiguous()
    dx, du, parts = kernel("lora_norm").backward(grad_z.contiguous(), grad_total, x, stats, a, gain, shift)
    return dx, du, parts.to(a.dtype)


@_lora_norm_backward.register_fake
def _(grad_z, grad_total, x, stats, a, gain, shift):
    du = x.new_empty(0) if grad_z.dtype == x.dtype else torch.empty_like(x, dtype=grad_z.dtype)
    return torch.empty_like(x), du, a.new_empty(a.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, a, u, gain, shift, _, ctx.dtype = inputs
    total, _, low, stats = output
    ctx.mark_non_differentiable(low, stats)
    ctx.set_materialize_grads(False)
    ctx.u_dtype = None if u is None else u.dtype
    ctx.save_for_backward(x if u is None else total, stats, a, gain, shift)


def _backward(ctx, grad_total, grad_z, *_):
    x, stats, a, gain, shift = ctx.saved_tensors
    if grad_z is None:
        grad_z = x.new_zeros(len(x), x.shape[1] + padded_rank(a.shape[1]), dtype=ctx.dtype)
    if ctx.u_dtype is None:
        grad_total = None
    dx, du, da = _lora_norm_backward(grad_z, grad_total, x, stats, a, gain, shift)
    if ctx.u_dtype is None:
        return dx, da, *[None] * 5
    return dx, da, (dx if ctx.dtype == x.dtype else du).to(ctx.u_dtype), *[None] * 4


_lora_norm.register_autograd(_backward, setup_context=_setup_context)
