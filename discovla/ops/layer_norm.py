"""Residual sum and layer norm in one op; a gain and a shift, if given, are frozen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel, run_reference

Affine = tuple[Tensor, Tensor]  # gain and shift


def layer_norm(
    x: Tensor,
    u: Tensor | None = None,
    *,
    affine: Affine | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """x' = x + u, y = (x' - mean x') / sqrt(var x' + eps) (gain + shift) over the last axis.

    The kernel keeps x' and two numbers a row for backward.

    Args:
        x: ... w, the residual stream; x' has its dtype, whatever the dtype of u.
        u: ... w, the update of a block, or None for x' = x.
        affine: gain and shift, w each, frozen, applied in float32 at least; None for 1 and 0.
        eps: added to the variance.
        dtype: of y; by default that of u, or of x without u.
        impl: reference (plain torch), compiled (it under torch.compile), triton, or auto.

    Returns:
        x' (x itself without u) and y, ... w.

    Raises:
        ValueError: shapes that do not fit, or a gain or shift that requires a gradient.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    dtype = dtype or (x if u is None else u).dtype
    expect_shape("u", u, tuple(x.shape))
    gain, shift = check_affine(affine, x)
    chosen = choose("layer_norm", impl, x.device.type, operands=(x, u, gain, shift))
    if chosen != "triton":
        return run_reference(chosen, layer_norm_reference, x, u, affine, eps, dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    u = None if u is None else u.reshape(rows.shape).contiguous()
    total, y, _ = _layer_norm(rows, u, gain, shift, eps, dtype)
    return x if u is None else total.view(x.shape), y.view(x.shape)


def layer_norm_reference(
    x: Tensor, u: Tensor | None, affine: Affine | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The formula of `layer_norm`."""
    total = x if u is None else (x.to(sum_dtype(x)) + u.to(sum_dtype(x))).to(x.dtype)
    gain, shift = (None, None) if affine is None else (part.to(sum_dtype(x)) for part in affine)
    y = F.layer_norm(total.to(sum_dtype(x)), x.shape[-1:], gain, shift, eps)
    return total, y.to(dtype)


def check_affine(affine: Affine | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return gain and shift, contiguous, or two Nones.

    Raises:
        ValueError: one does not fit x (... w), or requires a gradient.
    """
    if affine is None:
        return None, None
    for name, part in zip(("gain", "shift"), affine, strict=True):
        expect_shape(name, part, (x.shape[-1],))
        if part.requires_grad:
            raise ValueError(f"{name}: expected a frozen tensor, found one that requires a gradient")
    return affine[0].contiguous(), affine[1].contiguous()


@torch.library.custom_op("discovla::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, u: Tensor | None, gain: Tensor | None, shift: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x' (empty without u), y, and mean and 1 / deviation of every row, 2 r."""
    return kernel("layer_norm").forward(x, u, gain, shift, eps, dtype)


@_layer_norm.register_fake
def _(x, u, gain, shift, eps, dtype):
    total = x.new_empty(0) if u is None else torch.empty_like(x)
    return total, torch.empty_like(x, dtype=dtype), x.new_empty(2, len(x), dtype=sum_dtype(x))


@torch.library.custom_op("discovla::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    stats: Tensor,
    gain: Tensor | None,
    u_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients by x and by u (empty if the dtypes agree: it is the same tensor)."""
    grad_total = None if grad_total is None else grad_total.contiguous()
    du = x.new_empty(0) if x.dtype == u_dtype else torch.empty_like(x, dtype=u_dtype)
    return kernel("layer_norm").backward(grad_y.contiguous(), grad_total, x, stats, gain, du), du


@_layer_norm_backward.register_fake
def _(grad_y, grad_total, x, stats, gain, u_dtype):
    du = x.new_empty(0) if x.dtype == u_dtype else torch.empty_like(x, dtype=u_dtype)
    return torch.empty_like(x), du


def _setup_context(ctx, inputs, output) -> None:
    x, u, gain, *_ = inputs
    total, _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.u_dtype = None if u is None else u.dtype
    ctx.save_for_backward(x if u is None else total, stats, gain)


def _backward(ctx, grad_total, grad_y, _):
    x, stats, gain = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    if ctx.u_dtype is None:
        return _layer_norm_backward(grad_y, None, x, stats, gain, x.dtype)[0], *[None] * 5
    dx, du = _layer_norm_backward(grad_y, grad_total, x, stats, gain, ctx.u_dtype)
    return dx, dx if ctx.u_dtype == x.dtype else du, *[None] * 4


_layer_norm.register_autograd(_backward, setup_context=_setup_context)
