"""Residual sum and layer norm in one op; its gain and shift, where there are any, are frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, wide
from discovla.ops.dispatch import Impl, choose, kernel

Affine = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a block adds to the residual stream, ... w.

    u: ... w, of a dtype of its own.  bias: w, added to every row.
    added, slots: n w and r, integers: row i (of r, the leading axes of u flattened) also gets
        added[slots[i]], nothing where slots[i] is -1; each slot is named by one row at most.
    """

    u: Tensor
    bias: Tensor | None = None
    added: Tensor | None = None
    slots: Tensor | None = None


def layer_norm(
    x: Tensor,
    update: Update | None = None,
    *,
    affine: Affine | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """x' = x + u (+ bias + added), y = (x' - mean x') / sqrt(var x' + eps) (gain + shift) over the last axis.

    x' and the two numbers of a row are all that is kept for backward.

    Args:
        x: ... w, the residual stream; its dtype is that of x', whatever u has: float32 or the compute dtype.
        update: what is added first; None for nothing.
        affine: gain and shift, w each, frozen, computed with in float32 at least; None for 1 and 0, where
            `fold_affine` has put them into the matrix that y is multiplied with, or both train.
        eps: added to the variance.
        dtype: of y; that of u, or of x without one, unless given.
        impl: reference (plain torch), triton, or auto.

    Returns:
        x' (x itself without an update) and y, ... w.

    Raises:
        ValueError: shapes that do not fit, or a gain or shift that asks for a gradient.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    dtype = dtype or (x if update is None else update.u).dtype
    if update is not None:
        _check(x, update)
    gain, shift = checked_affine(affine, x)
    chosen = choose("layer_norm", impl, x.device.type, operands=(x, *_tensors(update), gain, shift))
    if chosen == "reference":
        return layer_norm_reference(x, update, affine, eps, dtype)
    u, bias, added, slots = _tensors(update)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    u = None if u is None else u.reshape(rows.shape).contiguous()
    added = None if u is None or added is None else added.to(u.dtype)
    total, y, _ = _layer_norm(rows, u, bias, added, slots, gain, shift, eps, dtype)
    return x if u is None else total.view(x.shape), y.view(x.shape)


def layer_norm_reference(
    x: Tensor, update: Update | None, affine: Affine | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The formula of `layer_norm`."""
    total = x
    if update is not None:
        work = wide(x)
        more = update.u.to(work)
        if update.bias is not None:
            more = more + update.bias.to(work)
        if update.added is not None and update.slots is not None:
            chosen = (update.slots >= 0).nonzero()[:, 0]
            values = update.added[update.slots[chosen].long()].to(work)
            more = more.flatten(0, -2).index_add(0, chosen, values).view(x.shape)
        total = (x.to(work) + more).to(x.dtype)
    gain, shift = (None, None) if affine is None else (part.to(wide(x)) for part in affine)
    y = F.layer_norm(total.to(wide(x)), x.shape[-1:], gain, shift, eps)
    return total, y.to(dtype)


def checked_affine(affine: Affine | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gain and shift as a kernel takes them; refused where they do not fit x (... w) or train."""
    if affine is None:
        return None, None
    for name, part in zip(("gain", "shift"), affine, strict=True):
        expect_shape(name, part, (x.shape[-1],))
        if part.requires_grad:
            raise ValueError(f"{name}: expected a frozen one, found one that asks for a gradient")
    return affine[0].contiguous(), affine[1].contiguous()


def fold_affine(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """W' = W diag(gain) and b' = b + W shift, so that W' y + b' = W (gain y + shift) + b.

    Args:
        weight: o w.  bias: o, or None for zeros.  gain, shift: w, of the layer norm that is folded in.
    """
    moved = weight @ shift
    return weight * gain, moved if bias is None else bias + moved


def _check(x: Tensor, update: Update) -> None:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    expect_shape("u", update.u, tuple(x.shape))
    expect_shape("bias", update.bias, (width,))
    if (update.added is None) != (update.slots is None):
        raise ValueError("added, slots: expected both or neither, found one")
    if update.added is not None:
        expect_shape("added", update.added, (len(update.added), width))
        expect_shape("slots", update.slots, (rows,))


def _tensors(update: Update | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    if update is None:
        return None, None, None, None
    return update.u, update.bias, update.added, update.slots


@torch.library.custom_op("discovla::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor,
    u: Tensor | None,
    bias: Tensor | None,
    added: Tensor | None,
    slots: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' (empty without u), y, and mean and 1 / deviation of every row, 2 r."""
    more = None if added is None or slots is None else (added.contiguous(), slots.contiguous())
    affine = None if gain is None or shift is None else (gain, shift)
    return kernel("layer_norm").forward(x, u, bias, more, affine, (eps, dtype))


@_layer_norm.register_fake
def _(x, u, bias, added, slots, gain, shift, eps, dtype):
    total = x.new_empty(0) if u is None else torch.empty_like(x)
    return total, torch.empty_like(x, dtype=dtype), x.new_empty(2, len(x), dtype=wide(x))


@torch.library.custom_op("discovla::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor,
    grad_of_sum: Tensor | None,
    x: Tensor,
    stats: Tensor,
    gain: Tensor | None,
    slots: Tensor | None,
    added: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by u (of `dtype`; empty where it is that by x) and by what was added, n w."""
    other = None if grad_of_sum is None else grad_of_sum.contiguous()
    values = x.new_zeros(added, x.shape[1], dtype=dtype)
    dx, du = kernel("layer_norm").backward((grad.contiguous(), other), x, stats, gain, slots, values)
    return dx, du, values


@_layer_norm_backward.register_fake
def _(grad, grad_of_sum, x, stats, gain, slots, added, dtype):
    du = x.new_empty(0) if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    return torch.empty_like(x), du, x.new_empty(added, x.shape[1], dtype=dtype)


def _keep(ctx, inputs, output) -> None:
    x, u, bias, added, slots, gain, _, _, _ = inputs
    total, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.has_u, ctx.u_dtype = u is not None, x.dtype if u is None else u.dtype
    ctx.added, ctx.bias_dtype = 0 if added is None else len(added), None if bias is None else bias.dtype
    ctx.save_for_backward(x if u is None else total, stats, gain, slots)


def _differentiate(ctx, grad_of_sum, grad, _):
    """The statistics are for backward alone: nobody differentiates them."""
    x, stats, gain, slots = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(x)
    if not ctx.has_u:
        grad_of_sum = None
    dx, du, added = _layer_norm_backward(grad, grad_of_sum, x, stats, gain, slots, ctx.added, ctx.u_dtype)
    du = (dx if ctx.u_dtype == x.dtype else du) if ctx.has_u else None
    dbias = dx.sum(0, dtype=wide(dx)).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return dx, du, dbias, added if ctx.added else None, None, None, None, None, None


_layer_norm.register_autograd(_differentiate, setup_context=_keep)
