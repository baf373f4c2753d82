"""The two-layer perceptron of a transformer block with frozen weights in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from discovla.ops.dispatch import Impl
from discovla.ops.fp8_linear import FP8Method, FP8Weight, check_fp8, choose_method, input_gradient
from discovla.ops.mlp import Activation
from discovla.ops.quantise_rows import activation_gradient


@dataclass(frozen=True, kw_only=True)
class FP8MLPWeights:
    """up: m w.  up_bias: m.  down: w m.  down_bias: w.  All frozen."""

    up: FP8Weight
    up_bias: Tensor
    down: FP8Weight
    down_bias: Tensor


def fp8_mlp(
    x: Tensor,
    weights: FP8MLPWeights,
    *,
    activation: Activation = "quick_gelu",
    output_needed: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """down act(up x + up_bias) + down_bias, with both products and their gradients as in `fp8_linear`.

    act, and in backward its derivative, is computed in float32 while rows are rounded for the next product.
    Backward keeps h = up x + up_bias, ... m, in the dtype of x.

    Args:
        x: ... w.
        activation: quick_gelu, h sigmoid(1.702 h), or gelu, h Phi(h).
        output_needed: False leaves the output uninitialised and computes only what backward needs.
        impl: of `fp8_linear`.

    Returns:
        ... w, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a bias that requires a gradient.
        KernelUnavailable: the implementation asked for by name does not exist.
    """
    hidden, width = weights.up.bits.shape
    check_fp8(x, weights.up, weights.up_bias)
    check_fp8(x.new_empty(0, hidden), weights.down, weights.down_bias)
    out = _FP8MLP.apply(x.reshape(-1, width), weights, activation, choose_method(impl, x), output_needed)
    return out.view(*x.shape[:-1], len(weights.down.bits))


class _FP8MLP(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: FP8MLPWeights,
        activation: Activation,
        method: FP8Method,
        output_needed: bool,
    ) -> Tensor:
        up, down = weights.up, weights.down
        rows = method.round(x)
        h = method.product(rows, up.bits, up.scale, weights.up_bias.to(x.dtype), x.dtype)
        ctx.method, ctx.activation, ctx.up_tensors = method, activation, len(up.backward_tensors)
        ctx.save_for_backward(h, *up.backward_tensors, *down.backward_tensors)
        if not output_needed:
            return x.new_empty(len(x), len(down.bits))
        rows = method.round(h, activation=activation)
        return method.product(rows, down.bits, down.scale, weights.down_bias.to(x.dtype), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, *saved = ctx.saved_tensors
        up, down = saved[: ctx.up_tensors], saved[ctx.up_tensors :]
        dg = input_gradient(grad, down, ctx.method)
        if len(up) == 1:
            return activation_gradient(dg, h, ctx.activation) @ up[0].to(grad.dtype), *[None] * 4
        dx = input_gradient(dg, up, ctx.method, activation=ctx.activation, hidden=h)
        return dx, *[None] * 4
