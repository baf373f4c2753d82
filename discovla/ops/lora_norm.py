"""LoRA on a frozen projection without a pass of its own: one product of [y | H] with [W | B]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel
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
    """x' = x + u and y as in `layer_norm`, and H = y aᵀ beside it: z = [y | H | 0].

    `lora_projection` gives W y + b H + bias.  Where a frozen gain g is folded into W instead of given here, a
    must be a diag(g), and where a shift s is, the projection's bias takes b a s.

    Args:
        x: ... w, the residual stream.
        a: k w, of LoRA, computed with in the dtype of z; or p k w, p times the same, each of which gets a
            part of the gradient (`lora_weights`).
        u: ... w, what is added to the stream first; None for nothing.
        affine: gain and shift of y, w each, frozen; None for 1 and 0.
        eps: added to the variance.
        dtype: of z; that of u, or of x without one, unless given.
        impl: reference (plain torch), triton, or auto.

    Returns:
        x' (x itself without u), in the dtype of x; z, ... (w + p): p is k rounded up to a power of two, 16 at
        least; and H once more, ... k, for the backward of `lora_projection`: it has no gradient.

    Raises:
        ValueError: shapes that do not fit, or a gain or shift that asks for a gradient.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: LoRA (arXiv 2106.09685).
    """
    expect_shape("u", u, tuple(x.shape))
    copies = a if a.ndim == 3 else a[None]
    rank = copies.shape[1]
    expect_shape("a", copies, (len(copies), rank, x.shape[-1]))
    dtype = dtype or (x if u is None else u).dtype
    gain, shift = check_affine(affine, x)
    like = torch.empty(0, dtype=dtype, device=x.device)
    if choose("lora_norm", impl, x.device.type, operands=(x, copies, like, u, gain, shift)) == "reference":
        return lora_norm_reference(x, copies[0], u, affine, eps, dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    more = None if u is None else u.reshape(rows.shape).contiguous()
    if a.ndim == 2:
        copies = a.contiguous().expand(kernel("lora_norm").programs(len(rows)), -1, -1)
    total, z, low, _ = _lora_norm(rows, copies, more, gain, shift, eps, dtype)
    z, low = (part.view(*x.shape[:-1], part.shape[1]) for part in (z, low))
    return x if u is None else total.view(x.shape), z, low


def lora_norm_reference(
    x: Tensor, a: Tensor, u: Tensor | None, affine: Affine | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of `lora_norm`."""
    total, y = layer_norm_reference(x, u, affine, eps, dtype)
    low = y @ a.to(dtype).T  # ... k
    return total, torch.cat([y, F.pad(low, (0, padding(len(a)) - len(a)))], dim=-1), low.detach()


@dataclass(frozen=True, kw_only=True)
class LoRAWeights:
    """What `lora_norm` and `lora_projection` take of one projection and its update.

    a: p k w, p times LoRA's a.  b: o k, LoRA's, and augmented: o (w + q) = [W | B | 0] without a gradient,
    both in the dtype that is computed in; bias: o, in that too.
    """

    a: Tensor
    b: Tensor
    augmented: Tensor
    bias: Tensor


def lora_weights(
    linears: Sequence[tuple[Tensor, Tensor]],
    factors: Sequence[tuple[Tensor, Tensor]],
    *,
    rows: int,
    dtype: torch.dtype,
    impl: Impl = "auto",
) -> list[LoRAWeights]:
    """The weights of several projections of one shape in as many launches as of one, forward and backward.

    Args:
        linears: of each W, o w, and bias, o; frozen.
        factors: of each LoRA's a, k w, and b, o k.
        rows: how many `lora_norm` will be given: it gives the gradient of a in so many parts as it has
            programs, and the parts of all are summed together.
        dtype: to compute in.
        impl: of `lora_norm`.

    Raises:
        ValueError: shapes that do not fit, or a weight or bias that asks for a gradient.
    """
    (outputs, width), rank = linears[0][0].shape, len(factors[0][0])
    for (weight, bias), (a, b) in zip(linears, factors, strict=True):
        expect_shape("weight", weight, (outputs, width))
        expect_shape("bias", bias, (outputs,))
        expect_shape("a", a, (rank, width))
        expect_shape("b", b, (outputs, rank))
        if weight.requires_grad or bias.requires_grad:
            raise ValueError("weight, bias: expected frozen ones, found one that asks for a gradient")
    chosen = choose("lora_norm", impl, linears[0][0].device.type)
    parts = kernel("lora_norm").programs(rows) if chosen == "triton" else 1
    n, tensors = len(linears), [x[0] for x in linears] + [x[0] for x in factors] + [x[1] for x in factors]
    found = _LoRAWeights.apply(parts, dtype, n, *tensors)
    return [
        LoRAWeights(a=found[i], b=found[n + i], augmented=found[2 * n + i], bias=linears[i][1].to(dtype))
        for i in range(n)
    ]


class _LoRAWeights(torch.autograd.Function):
    """n of W, a and b each to n of a, b and [W | B | 0]."""

    @staticmethod
    def forward(ctx, parts: int, dtype: torch.dtype, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, a, b = [x.to(dtype) for x in tensors[:n]], tensors[n : 2 * n], tensors[2 * n :]
        (outputs, width), rank = weights[0].shape, b[0].shape[1]
        ctx.set_materialize_grads(False)
        ctx.dtypes = a[0].dtype, b[0].dtype
        whole = weights[0].new_empty(n, outputs, width + padding(rank), dtype=dtype)
        low = whole[..., width : width + rank]
        torch.stack(weights, out=whole[..., :width])
        if low.shape[2] < whole.shape[2] - width:
            whole[..., width:].zero_()
        if b[0].dtype == dtype:
            torch.stack(b, out=low)
        else:
            low.copy_(torch.stack(b))
        augmented = whole.unbind()
        ctx.mark_non_differentiable(*augmented)
        return *(x.detach().expand(parts, -1, -1) for x in a), *low.unbind(), *augmented

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n = len(grads) // 3
        of_a, of_b = _stacked(grads[:n]), _stacked(grads[n : 2 * n])
        of_a = of_a if of_a is None else of_a.sum(1)
        found = [
            [None] * n if x is None else x.to(dtype).unbind()
            for x, dtype in zip((of_a, of_b), ctx.dtypes, strict=True)
        ]
        return None, None, None, *[None] * n, *found[0], *found[1]


def _stacked(grads: Sequence[Tensor | None]) -> Tensor | None:
    """Gradients of one shape side by side, zeros where there is none; None where all have none."""
    some = next((x for x in grads if x is not None), None)
    return None if some is None else torch.stack([torch.zeros_like(some) if x is None else x for x in grads])


def lora_projection(z: Tensor, low: Tensor, weights: LoRAWeights) -> Tensor:
    """W y + b H + bias in one product, z = [y | H | 0] and low = H of `lora_norm`.

    Backward is one product for z and a thin one for b, which needs H alone; there is none for W, a constant.

    Args:
        z: ... (w + p).  low: ... k.

    Returns:
        ... o.

    Raises:
        ValueError: shapes that do not fit.
    """
    expect_rows(z, low, weights)
    out = _LoRAProjection.apply(
        z.flatten(0, -2), low.flatten(0, -2), weights.augmented, weights.bias, weights.b
    )
    return out.view(*z.shape[:-1], len(weights.b))


def expect_rows(z: Tensor, low: Tensor, weights: LoRAWeights) -> None:
    """Refuse rows of `lora_norm` that do not fit the weights."""
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


def _affine(gain: Tensor | None, shift: Tensor | None) -> Affine | None:
    return None if gain is None or shift is None else (gain, shift)


def padding(rank: int) -> int:
    """Columns of z after y: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


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
    return kernel("lora_norm").forward(x, u, a[0], _affine(gain, shift), (eps, dtype))


@_lora_norm.register_fake
def _(x, a, u, gain, shift, eps, dtype):
    total, rank = x.new_empty(0) if u is None else torch.empty_like(x), a.shape[1]
    z = x.new_empty(len(x), x.shape[1] + padding(rank), dtype=dtype)
    return total, z, x.new_empty(len(x), rank, dtype=dtype), x.new_empty(2, len(x), dtype=sum_dtype(x))


@torch.library.custom_op("discovla::lora_norm_backward", mutates_args=())
def _lora_norm_backward(
    grad: Tensor,
    grad_of_sum: Tensor | None,
    x: Tensor,
    stats: Tensor,
    a: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by u (empty where it is that by x) and by a, p k w."""
    other = None if grad_of_sum is None else grad_of_sum.contiguous()
    grads = grad.contiguous(), other
    dx, du, parts = kernel("lora_norm").backward(grads, x, stats, a, _affine(gain, shift))
    return dx, du, parts.to(a.dtype)


@_lora_norm_backward.register_fake
def _(grad, grad_of_sum, x, stats, a, gain, shift):
    du = x.new_empty(0) if grad.dtype == x.dtype else torch.empty_like(x, dtype=grad.dtype)
    return torch.empty_like(x), du, a.new_empty(a.shape)


def _keep(ctx, inputs, output) -> None:
    x, a, u, gain, shift, _, ctx.dtype = inputs
    total, _, low, stats = output
    ctx.mark_non_differentiable(low, stats)
    ctx.set_materialize_grads(False)
    ctx.has_u, ctx.u_dtype = u is not None, None if u is None else u.dtype
    ctx.save_for_backward(x if u is None else total, stats, a, gain, shift)


def _differentiate(ctx, grad_of_sum, grad, *_):
    """H once more and the statistics are for backward alone: nobody differentiates them."""
    x, stats, a, gain, shift = ctx.saved_tensors
    if grad is None:
        grad = x.new_zeros(len(x), x.shape[1] + padding(a.shape[1]), dtype=ctx.dtype)
    more = grad_of_sum if ctx.has_u else None
    dx, du, da = _lora_norm_backward(grad, more, x, stats, a, gain, shift)
    if not ctx.has_u:
        return dx, da, *[None] * 5
    return dx, da, (dx if ctx.dtype == x.dtype else du).to(ctx.u_dtype), *[None] * 4


_lora_norm.register_autograd(_differentiate, setup_context=_keep)
