"""LoRA on a frozen projection without a pass of its own: one product of [y | H] with [W | B]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, wide
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.layer_norm import Affine, Update, checked_affine, layer_norm_reference


def lora_norm(
    x: Tensor,
    a: Tensor,
    u: Tensor | None = None,
    *,
    affine: Affine | None = None,
    eps: float = 1e-5,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """x' = x + u and y as in `layer_norm`, and H = y aᵀ beside it: z = [y | H | 0].

    `lora_projection` gives W y + b H + bias.  Where a frozen gain g is folded into W instead of given here, a
    must be a diag(g), and where a shift s is, the projection's bias takes b a s.

    Args:
        x: ... w, the residual stream.
        a: k w, of LoRA, computed with in the dtype of z.
        u: ... w, what is added to the stream first; None for nothing.
        affine: gain and shift of y, w each, frozen; None for 1 and 0.
        eps: added to the variance.
        impl: reference (plain torch), triton, or auto.

    Returns:
        x' (x itself without u), in the dtype of x, and z, ... (w + p), in that of u (or of x): p is k
        rounded up to a power of two, 16 at least.

    Raises:
        ValueError: shapes that do not fit, or a gain or shift that asks for a gradient.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: LoRA (arXiv 2106.09685).
    """
    expect_shape("u", u, tuple(x.shape))
    expect_shape("a", a, (len(a), x.shape[-1]))
    dtype = (x if u is None else u).dtype
    a = a.to(dtype).contiguous()
    gain, shift = checked_affine(affine, x)
    if choose("lora_norm", impl, x.device.type, operands=(x, a, u, gain, shift)) == "reference":
        return lora_norm_reference(x, a, u, affine, eps)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    more = None if u is None else u.reshape(rows.shape).contiguous()
    total, z, _ = _lora_norm(rows, a, more, gain, shift, eps)
    return x if u is None else total.view(x.shape), z.view(*x.shape[:-1], z.shape[1])


def lora_norm_reference(
    x: Tensor, a: Tensor, u: Tensor | None, affine: Affine | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The formula of `lora_norm`."""
    update = None if u is None else Update(u=u)
    total, y = layer_norm_reference(x, update, affine, eps, a.dtype)
    low = y @ a.T  # ... k
    return total, torch.cat([y, F.pad(low, (0, _padding(len(a)) - len(a)))], dim=-1)


def lora_projection(z: Tensor, weight: Tensor, bias: Tensor, b: Tensor) -> Tensor:
    """W y + b H + bias in one product, z = [y | H | 0] of `lora_norm`.

    Backward is one product for z and a thin one for b, which needs H alone; there is none for W, a constant.

    Args:
        z: ... (w + p).
        weight: o w, frozen.  bias: o, frozen.  Computed with in the dtype of z.
        b: o k, of LoRA.

    Returns:
        ... o.

    Raises:
        ValueError: shapes that do not fit, or a weight or bias that asks for a gradient.
    """
    outputs, width = weight.shape
    expect_shape("z", z, (*z.shape[:-1], width + _padding(b.shape[1])))
    expect_shape("bias", bias, (outputs,))
    expect_shape("b", b, (outputs, b.shape[1]))
    if weight.requires_grad or bias.requires_grad:
        raise ValueError("weight, bias: expected frozen ones, found one that asks for a gradient")
    out = _LoRAProjection.apply(z.flatten(0, -2), weight.to(z.dtype), bias.to(z.dtype), b.to(z.dtype))
    return out.view(*z.shape[:-1], outputs)


class _LoRAProjection(torch.autograd.Function):
    """r (w + p) to r o."""

    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor, bias: Tensor, b: Tensor) -> Tensor:
        (_, width), rank = weight.shape, b.shape[1]
        ctx.save_for_backward(weight, b, z[:, width : width + rank].clone())
        return F.linear(z, _augmented(weight, b), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, Tensor]:
        weight, b, low = ctx.saved_tensors
        return grad @ _augmented(weight, b), None, None, grad.T @ low


def _augmented(weight: Tensor, b: Tensor) -> Tensor:
    """[W | B | -], o (w + p), in one launch: where z is 0, and its gradient not read, any numbers do."""
    columns = _padding(b.shape[1]) - b.shape[1]
    rest = weight[:, :columns] if columns <= weight.shape[1] else weight.new_zeros(len(b), columns)
    return torch.cat([weight, b, rest], dim=1)


def _affine(gain: Tensor | None, shift: Tensor | None) -> Affine | None:
    return None if gain is None or shift is None else (gain, shift)


def _padding(rank: int) -> int:
    """Columns of z after y: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


@torch.library.custom_op("discovla::lora_norm", mutates_args=())
def _lora_norm(
    x: Tensor, a: Tensor, u: Tensor | None, gain: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x' (empty without u), z, and mean and 1 / deviation of every row, 2 r."""
    return kernel("lora_norm").forward(x, u, a, _affine(gain, shift), eps)


@_lora_norm.register_fake
def _(x, a, u, gain, shift, eps):
    total = x.new_empty(0) if u is None else torch.empty_like(x)
    z = x.new_empty(len(x), x.shape[1] + _padding(len(a)), dtype=a.dtype)
    return total, z, x.new_empty(2, len(x), dtype=wide(x))


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
    """Gradients by x, by u (empty where it is that by x) and by a, k w."""
    other = None if grad_of_sum is None else grad_of_sum.contiguous()
    grads = grad.contiguous(), other
    dx, du, parts = kernel("lora_norm").backward(grads, x, stats, a, _affine(gain, shift))
    return dx, du, parts.sum(0).to(a.dtype)


@_lora_norm_backward.register_fake
def _(grad, grad_of_sum, x, stats, a, gain, shift):
    du = x.new_empty(0) if a.dtype == x.dtype else torch.empty_like(x, dtype=a.dtype)
    return torch.empty_like(x), du, torch.empty_like(a)


def _keep(ctx, inputs, output) -> None:
    x, a, u, gain, shift, _ = inputs
    total, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.has_u = u is not None
    ctx.save_for_backward(x if u is None else total, stats, a, gain, shift)


def _differentiate(ctx, grad_of_sum, grad, _):
    """The statistics are for backward alone: nobody differentiates them."""
    x, stats, a, gain, shift = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros(len(x), x.shape[1] + _padding(len(a)), dtype=a.dtype, device=a.device)
    more = grad_of_sum if ctx.has_u else None
    dx, du, da = _lora_norm_backward(grad, more, x, stats, a, gain, shift)
    du = (dx if a.dtype == x.dtype else du) if ctx.has_u else None
    return dx, da, du, None, None, None


_lora_norm.register_autograd(_differentiate, setup_context=_keep)
