"""The two-layer perceptron of a transformer block by frozen weights in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from discovla.ops.dispatch import Impl
from discovla.ops.fp8_linear import FP8Weight, How, check_fp8, how_multiplied, multiplied_back
from discovla.ops.mlp import Activation
from discovla.ops.quantise_rows import Through, passed, quantise_rows


@dataclass(frozen=True, kw_only=True)
class FP8MLPWeights:
    """up: m w, up_bias: m, down: w m, down_bias: w; all frozen."""

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
    """down act(up x + up_bias) + down_bias, both products and their gradients as of `fp8_linear`.

    act, and in backward its derivative, are computed in float32 while rows are rounded for the next product.
    Kept for backward is h = up x + up_bias, ... m, in the dtype of x.

    Args:
        x: ... w.
        activation: quick_gelu, h sigmoid(1.702 h), or gelu, h Phi(h).
        output_needed: whether the result is read; else its numbers are any.
        impl: of `fp8_linear`.

    Returns:
        ... w, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a bias that asks for a gradient.
        KernelUnavailable: the implementation asked for by name does not exist.
    """
    hidden, width = weights.up.bits.shape
    check_fp8(x, weights.up, weights.up_bias)
    check_fp8(x.new_empty(0, hidden), weights.down, weights.down_bias)
    how = how_multiplied(impl, x)
    out = _FP8MLP.apply(x.reshape(-1, width), weights, activation, how, output_needed)
    return out.view(*x.shape[:-1], len(weights.down.bits))


class _FP8MLP(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: FP8MLPWeights, activation: Activation, how: How, output_needed: bool
    ) -> Tensor:
        up, down, (product, impl) = weights.up, weights.down, how
        h = product(quantise_rows(x, impl=impl), up.bits, up.scale, weights.up_bias.to(x.dtype), x.dtype)
        ctx.how, ctx.activation, ctx.counts = how, activation, (len(up.kept), len(down.kept))
        ctx.save_for_backward(h, *up.kept, *down.kept)
        if not output_needed:
            return x.new_empty(len(x), len(down.bits))
        rows = quantise_rows(h, through=Through(activation=activation), impl=impl)
        return product(rows, down.bits, down.scale, weights.down_bias.to(x.dtype), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, *kept = ctx.saved_tensors
        up, down = kept[: ctx.counts[0]], kept[ctx.counts[0] :]
        through = Through(activation=ctx.activation, hidden=h)
        dg = multiplied_back(grad, down, ctx.how)
        if len(up) == 1:
            return passed(dg, through) @ up[0].to(grad.dtype), *[None] * 4
        return multiplied_back(dg, up, ctx.how, through), *[None] * 4
