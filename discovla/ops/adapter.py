"""The bottleneck that a readout row passes before what its group says is added to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, wide
from discovla.ops.dispatch import Impl, choose, kernel


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """down: k w.  down_bias: k.  up: w k.  up_bias: w."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order above, contiguous."""
        weights = (self.down, self.down_bias, self.up, self.up_bias)
        return tuple(weight.contiguous() for weight in weights)  # type: ignore[return-value]

    def check(self, width: int) -> None:
        """Refuse shapes that do not fit rows of this width."""
        rank = len(self.down)
        expect_shape("down", self.down, (rank, width))
        expect_shape("down_bias", self.down_bias, (rank,))
        expect_shape("up", self.up, (width, rank))
        expect_shape("up_bias", self.up_bias, (width,))


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
    given, width = AdapterWeights(down=down, down_bias=down_bias, up=up, up_bias=up_bias), x.shape[-1]
    given.check(width)
    weights = given.tensors()
    chosen = choose("adapter", impl, x.device.type, operands=(x, *weights))
    if chosen == "reference":
        return adapter_reference(x, *weights)
    return _adapter(x.reshape(-1, width).contiguous(), *weights).view(x.shape)


def adapter_reference(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """The formula of `adapter`."""
    down, down_bias, up, up_bias = (weight.to(x.dtype) for weight in (down, down_bias, up, up_bias))
    h = F.linear(x, down, down_bias)  # ... k
    return F.linear(h * torch.sigmoid(1.702 * h), up, up_bias)


@torch.library.custom_op("discovla::adapter", mutates_args=())
def _adapter(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """Rows n w to n w."""
    return kernel("adapter").forward(x, (down, down_bias, up, up_bias))


@_adapter.register_fake
def _(x, down, down_bias, up, up_bias):
    return torch.empty_like(x)


@torch.library.custom_op("discovla::adapter_backward", mutates_args=())
def _adapter_backward(
    grad: Tensor, x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by x, n w, and by the weights, one after the other in one flat tensor."""
    dx = torch.empty_like(x)
    parts = kernel("adapter").backward(grad.contiguous(), x, (down, down_bias, up), dx)
    return dx, parts.sum(0)


@_adapter_backward.register_fake
def _(grad, x, down, down_bias, up):
    size = 2 * down.numel() + len(down) + x.shape[1]
    return torch.empty_like(x), x.new_empty(size, dtype=wide(x))


def _keep(ctx, inputs, output) -> None:
    ctx.shapes = [(weight.shape, weight.dtype) for weight in inputs[1:]]
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx, grad):
    dx, flat = _adapter_backward(grad, *ctx.saved_tensors)
    sizes = [shape.numel() for shape, _ in ctx.shapes]
    parts = zip(flat.split(sizes), ctx.shapes, strict=True)
    return dx, *(part.view(shape).to(dtype) for part, (shape, dtype) in parts)


_adapter.register_autograd(_differentiate, setup_context=_keep)
