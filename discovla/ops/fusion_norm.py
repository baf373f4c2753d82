"""Residual sum and layer norm after temporal fusion, whose readout rows also pass an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.adapter import AdapterWeights, adapter_reference
from discovla.ops.blocks import expect_shape, wide
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.layer_norm import Affine, Update, checked_affine, layer_norm_reference


def fusion_norm(
    x: Tensor,
    u: Tensor,
    adapter: AdapterWeights,
    slots: Tensor,
    *,
    first: int = 0,
    affine: Affine | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of x + u[:r] + adapter(u[r:]): u is what the output projection makes of all of
    `temporal_fusion_rows`, so that neither part of it is copied, nor is its gradient.

    Args:
        x: ... w, r rows, the residual stream.
        u: (r + n) w, of a dtype of its own.
        adapter: of rows r and after, computed with in the dtype of u.
        slots: r, int32: row i also gets what the adapter makes of u[r + slots[i] - first], nothing where
            slots[i] is less than `first`; each of the n that are not is named by one row.
        affine, eps, dtype, impl: as in `layer_norm`.

    Returns:
        x' and y, ... w.

    Raises:
        ValueError: shapes that do not fit, or a gain or shift that asks for a gradient.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    dtype, width, rows = dtype or u.dtype, x.shape[-1], x.numel() // x.shape[-1]
    if u.ndim != 2 or u.shape[1] != width or len(u) < rows:
        raise ValueError(f"u: expected at least {rows} rows {width} wide, found {tuple(u.shape)}")
    expect_shape("slots", slots, (rows,))
    adapter.check(width)
    gain, shift = checked_affine(affine, x)
    # the adapter's kernel takes weights of any dtype, that of the norm all of them
    choose("adapter", impl, x.device.type, operands=(u, *adapter.tensors()))
    if choose("fusion_norm", impl, x.device.type, operands=(x, u, slots, gain, shift)) == "reference":
        added = adapter_reference(u[rows:], *adapter.tensors())
        update = Update(u=u[:rows].view(x.shape), added=added, slots=slots - first)
        return layer_norm_reference(x, update, affine, eps, dtype)
    flat = x.reshape(rows, width).contiguous()
    total, y, _, _ = _fusion_norm(
        flat, u.contiguous(), *adapter.tensors(), slots, gain, shift, first, eps, dtype
    )
    return total.view(x.shape), y.view(x.shape)


@torch.library.custom_op("discovla::fusion_norm", mutates_args=())
def _fusion_norm(
    x: Tensor,
    u: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    slots: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    first: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', y, mean and 1 / deviation of every row, 2 r, and the adapter's input, n w, which outlives u."""
    rows, own = len(x), torch.empty_like(u[len(x) :])
    added = kernel("adapter").forward(u[rows:], (down, down_bias, up, up_bias), own)
    affine = None if gain is None or shift is None else (gain, shift)
    more, how = (added, slots), (eps, dtype)
    return *kernel("layer_norm").forward(x, u[:rows], None, more, affine, how, first), own


@_fusion_norm.register_fake
def _(x, u, down, down_bias, up, up_bias, slots, gain, shift, first, eps, dtype):
    stats = x.new_empty(2, len(x), dtype=wide(x))
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype), stats, torch.empty_like(u[len(x) :])


@torch.library.custom_op("discovla::fusion_norm_backward", mutates_args=())
def _fusion_norm_backward(
    grad: Tensor,
    grad_of_sum: Tensor | None,
    x: Tensor,
    stats: Tensor,
    own: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    slots: Tensor,
    gain: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by u, and by the adapter's weights, one after the other in one flat tensor."""
    other = None if grad_of_sum is None else grad_of_sum.contiguous()
    rows, (n, width) = len(x), own.shape
    du, added = own.new_empty(rows + n, width), torch.empty_like(own)
    grads = grad.contiguous(), other
    dx, _ = kernel("layer_norm").backward(grads, x, stats, gain, slots, added, du[:rows], first)
    parts = kernel("adapter").backward(added, own, (down, down_bias, up), du[rows:])
    return dx, du, parts.sum(0)


@_fusion_norm_backward.register_fake
def _(grad, grad_of_sum, x, stats, own, down, down_bias, up, slots, gain, first):
    n, width = own.shape
    size = 2 * down.numel() + len(down) + width
    du = own.new_empty(len(x) + n, width)
    return torch.empty_like(x), du, own.new_empty(size, dtype=wide(own))


def _keep(ctx, inputs, output) -> None:
    _, _, down, down_bias, up, up_bias, slots, gain, _, ctx.first, *_ = inputs
    total, _, stats, own = output
    ctx.mark_non_differentiable(stats, own)
    ctx.set_materialize_grads(False)
    ctx.shapes = [(x.shape, x.dtype) for x in (down, down_bias, up, up_bias)]
    ctx.save_for_backward(total, stats, own, down, down_bias, up, slots, gain)


def _differentiate(ctx, grad_of_sum, grad, *_):
    """The statistics and the adapter's input are for backward alone: nobody differentiates them."""
    saved = ctx.saved_tensors  # once: a checkpoint refuses to unpack them a second time
    if grad is None:
        grad = torch.zeros_like(saved[0])
    dx, du, flat = _fusion_norm_backward(grad, grad_of_sum, *saved, ctx.first)
    sizes = [shape.numel() for shape, _ in ctx.shapes]
    weights = [
        part.view(shape).to(dtype) for part, (shape, dtype) in zip(flat.split(sizes), ctx.shapes, strict=True)
    ]
    return dx, du, *weights, *[None] * 6


_fusion_norm.register_autograd(_differentiate, setup_context=_keep)
