"""Round rows to FP8, each with its own scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.mlp import Activation

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
LEAST = LARGEST / torch.finfo(torch.float32).max  # rows of smaller numbers become zeros: 448 / x overflows
SLOPE = 1.702  # of QuickGELU's sigmoid

Rows = tuple[Tensor, Tensor]  # t i in FP8, and the scale of each row, t 1


def quantise_rows(
    x: Tensor,
    column_scale: Tensor | None = None,
    *,
    activation: Activation | None = None,
    hidden: Tensor | None = None,
    one_scale: bool = False,
    impl: Impl = "auto",
) -> Rows:
    """q and scale with y ≈ scale q, where each row of q fills the range of FP8.

    y = act(x), or x act'(hidden) with `hidden`, or x without an activation; then times `column_scale`.

    Args:
        x: t i.
        column_scale: i, float32, or None for 1.
        activation: act, or None.
        hidden: t i, where the derivative is taken; needs an activation.
        one_scale: True for the same scale for all rows, that of the largest number; the kernel has none.
        impl: reference (plain torch, ten passes over the rows), triton (one pass), or auto.

    Returns:
        q, t i, float8_e4m3fn, and scale, t 1, float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    expect_shape("column_scale", column_scale, (x.shape[1],))
    expect_shape("hidden", hidden, tuple(x.shape))
    if not one_scale and choose("quantise_rows", impl, x.device.type, operands=(x, hidden)) == "triton":
        bits, scale = _quantise_rows(x.contiguous(), column_scale, activation or "", hidden)
        return bits.view(FP8), scale
    y = x.to(sum_dtype(x))
    if activation is not None:
        y = activate(y, activation) if hidden is None else activation_gradient(y, hidden, activation)
    y = y if column_scale is None else y * column_scale
    largest = y.abs().amax().expand(len(y), 1) if one_scale else y.abs().amax(1, keepdim=True)
    # as a tensor: torch rounds a division by a Python number differently
    limit = torch.full_like(largest, LARGEST)
    nonzero = largest > LEAST
    scale, inverse = (torch.where(nonzero, x, 1.0) for x in (largest / limit, limit / largest))
    return (y * inverse).clamp(-LARGEST, LARGEST).to(FP8), scale


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Return act(x) in the dtype of x."""
    return F.gelu(x) if activation == "gelu" else F.silu(SLOPE * x) / SLOPE


def activation_gradient(grad: Tensor, hidden: Tensor, activation: Activation) -> Tensor:
    """Return grad act'(hidden) in the dtype of grad."""
    h = hidden.to(grad.dtype)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, h)
    return torch.ops.aten.silu_backward(grad, SLOPE * h)


@torch.library.custom_op("discovla::quantise_rows", mutates_args=())
def _quantise_rows(
    x: Tensor, column_scale: Tensor | None, activation: str, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The bytes of q, t i, and scale, t 1, float32; activation: "" for none."""
    return kernel("quantise_rows").quantise_rows(x, column_scale, activation, hidden, LARGEST)


@_quantise_rows.register_fake
def _(x, column_scale, activation, hidden):
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)
