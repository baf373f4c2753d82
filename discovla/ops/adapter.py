"""The bottleneck that a readout row passes before what its group says is added to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, wide
from discovla.ops.dispatch import Impl, choose, kernel


def adapter(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """up quick_gelu(down x + down_bias) + up_bias, quick_gelu(h) = h sigmoid(1.702 h), without a skip.

    The kernel keeps x alone for backward, the bottleneck stays in registers.

    Args:
        x: ... w.
        down: k w.  down_bias: k.  up: w k.  up_bias: w.  Computed with in the dtype of x.
        impl: reference (plain torch), triton, or auto.

    Returns:
        ... w, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    width, rank = x.shape[-1], len(down)
    expect_shape("down", down, (rank, width))
    expect_shape("down_bias", down_bias, (rank,))
    expect_shape("up", up, (width, rank))
    expect_shape("up_bias", up_bias, (width,))
    weights = [weight.to(x.dtype).contiguous() for weight in (down, down_bias, up, up_bias)]
    chosen = choose("adapter", impl, x.device.type, operands=(x, *weights))
    if chosen == "reference":
        return adapter_reference(x, *weights)
    return _adapter(x.reshape(-1, width).contiguous(), *weights).view(x.shape)


def adapter_reference(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """The formula of `adapter`."""
    h = F.linear(x, down, down_bias)  # ... k
    return F.linear(h * torch.sigmoid(1.702 * h), up, up_bias)


@torch.library.custom_op("discovla::adapter", mutates_args=())
def _adapter(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """Rows n w to n w."""
    return kernel("adapter").forward(x, down, down_bias, up, up_bias)


@_adapter.register_fake
def _(x, down, down_bias, up, up_bias):
    return torch.empty_like(x)


@torch.library.custom_op("discovla::adapter_backward", mutates_args=())
def _adapter_backward(
    grad: Tensor, x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient by x, n w, the activated bottleneck and the gradient before it, n k each."""
    return kernel("adapter").backward(grad.contiguous(), x, down, down_bias, up)


@_adapter_backward.register_fake
def _(grad, x, down, down_bias, up):
    return torch.empty_like(x), x.new_empty(len(x), len(down)), x.new_empty(len(x), len(down))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx, grad):
    x, down, down_bias, up = ctx.saved_tensors
    dx, g, dh = _adapter_backward(grad, x, down, down_bias, up)
    return dx, dh.T @ x, _column_sums(dh), grad.T @ g, _column_sums(grad)


def _column_sums(x: Tensor) -> Tensor:
    return x.sum(0, dtype=wide(x)).to(x.dtype)


_adapter.register_autograd(_differentiate, setup_context=_keep)
