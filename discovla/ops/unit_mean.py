"""Mean of unit rows, which pools the features of a video's frames."""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.blocks import expect_mask
from discovla.ops.dispatch import Impl, choose, kernel, run_reference


def unit_mean(x: Tensor, mask: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """sum_k m_k x_k / ‖x_k‖ / max(1, sum_k m_k); 0 if no row counts.

    Args:
        x: n k d.  There is no epsilon: a row of zeros that counts gives NaN.
        mask: n k, bool, m, the rows that count; None for all.
        impl: reference (plain torch), triton, or auto.

    Returns:
        n d, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    if x.ndim != 3:
        raise ValueError(f"x: expected n k d, found {tuple(x.shape)}")
    expect_mask("mask", mask, tuple(x.shape[:2]))
    chosen = choose("unit_mean", impl, x.device.type, operands=(x, mask))
    if chosen != "triton":
        return run_reference(chosen, unit_mean_reference, x, mask)
    return _unit_mean(x.contiguous(), mask)


def unit_mean_reference(x: Tensor, mask: Tensor | None) -> Tensor:
    """The formula of `unit_mean`."""
    unit = x / x.norm(dim=-1, keepdim=True)
    if mask is None:
        return unit.mean(1)
    weight = mask.to(x.dtype)[..., None]
    return (unit * weight).sum(1) / weight.sum(1).clamp(min=1)


@torch.library.custom_op("discovla::unit_mean", mutates_args=())
def _unit_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    return kernel("unit_mean").forward(x, mask)


@_unit_mean.register_fake
def _(x, mask):
    return x.new_empty(len(x), x.shape[2])


@torch.library.custom_op("discovla::unit_mean_backward", mutates_args=())
def _unit_mean_backward(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    return kernel("unit_mean").backward(grad.contiguous(), x, mask)


@_unit_mean_backward.register_fake
def _(grad, x, mask):
    return torch.empty_like(x)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _unit_mean_backward(grad, *ctx.saved_tensors), None


_unit_mean.register_autograd(_backward, setup_context=_setup_context)
