"""The two-layer perceptron of a transformer block, which keeps only the pre-activation h for backward."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel, run_reference

Activation = Literal["quick_gelu", "gelu"]
QUACK_NAMES = {"quick_gelu": "quick_gelu", "gelu": "gelu_erf"}  # names of the activations in quack
UNTUNED = {"tuned": False}  # its search over tiles takes minutes, more than a candidate has


@dataclass(frozen=True, kw_only=True)
class MLPWeights:
    """up: m w.  up_bias: m.  down: w m.  down_bias: w."""

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four weights in the order above."""
        return self.up, self.up_bias, self.down, self.down_bias


def mlp(
    x: Tensor,
    weights: MLPWeights,
    *,
    activation: Activation = "quick_gelu",
    output_needed: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """down act(up x + up_bias) + down_bias.

    The kernel applies act, and in backward its derivative, to tiles of the products that compute h and its
    gradient.  Backward keeps h, ... m, in the dtype of x (and x only if `up` is trained).

    Args:
        x: ... w.
        weights: used in the dtype of x.
        activation: quick_gelu, h sigmoid(1.702 h), or gelu, h Phi(h).
        output_needed: False lets the kernel leave the output uninitialised and compute h only.
        impl: reference (plain torch), compiled (it under torch.compile), triton, cublas (torch's products,
            and a kernel for act), quack (that package's products, which apply act too), or auto.

    Returns:
        ... w, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or another activation.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    _check(x, weights, activation)
    up, up_bias, down, down_bias = (tensor.to(x.dtype) for tensor in weights.tensors())
    chosen = choose("mlp", impl, x.device.type, operands=(x, up, up_bias, down, down_bias))
    if chosen in ("reference", "compiled"):
        return run_reference(chosen, mlp_reference, x, up, up_bias, down, down_bias, activation)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, up, up_bias, down, down_bias))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _mlp(rows, up, up_bias, down, down_bias, activation, chosen, keep, output_needed)[0].view(x.shape)


def mlp_reference(
    x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, activation: str
) -> Tensor:
    """The formula of `mlp`."""
    h = F.linear(x, up, up_bias)
    g = F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h)
    return F.linear(g, down, down_bias)


def _check(x: Tensor, weights: MLPWeights, activation: str) -> None:
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"activation: expected quick_gelu or gelu, found {activation!r}")
    width, hidden = x.shape[-1], len(weights.up)
    expect_shape("up", weights.up, (hidden, width))
    expect_shape("up_bias", weights.up_bias, (hidden,))
    expect_shape("down", weights.down, (width, hidden))
    expect_shape("down_bias", weights.down_bias, (width,))


@torch.library.custom_op("discovla::mlp", mutates_args=())
def _mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    activation: str,
    impl: str,
    keep: bool,
    output_needed: bool,
) -> tuple[Tensor, Tensor]:
    """The output, r w (uninitialised unless `output_needed`), and h, r m (empty unless `keep`)."""
    if impl == "quack":
        options = {"bias": up_bias, "activation": QUACK_NAMES[activation], "store_preact": keep, **UNTUNED}
        h, g = _quack().gemm_act(x, up.T, **options)
        h = x.new_empty(0) if h is None else h
    elif impl == "cublas":
        h = F.linear(x, up, up_bias)
        g = _elements().activation(h, activation == "gelu")
        h = h if keep else x.new_empty(0)
    else:
        h, g = kernel("mlp").hidden(x, up, up_bias.contiguous(), activation == "gelu", keep)
    return F.linear(g, down, down_bias) if output_needed else torch.empty_like(x), h


@_mlp.register_fake
def _(x, up, up_bias, down, down_bias, activation, impl, keep, output_needed):
    return torch.empty_like(x), x.new_empty(len(x), len(up)) if keep else x.new_empty(0)


@torch.library.custom_op("discovla::mlp_hidden_gradient", mutates_args=())
def _hidden_gradient(grad: Tensor, down: Tensor, h: Tensor, activation: str, impl: str) -> Tensor:
    """(grad down) act'(h), r m."""
    if impl == "quack":
        options = {"activation": QUACK_NAMES[activation], **UNTUNED}
        return _quack().gemm_dact(grad.contiguous(), down, h, **options)[0]
    if impl == "cublas":
        return _elements().activation_gradient(grad @ down, h, activation == "gelu")
    return kernel("mlp").hidden_gradient(grad.contiguous(), down, h, activation == "gelu")


@_hidden_gradient.register_fake
def _(grad, down, h, activation, impl):
    return torch.empty_like(h)


def _setup_context(ctx, inputs, output) -> None:
    x, up, _, down, _, ctx.activation, ctx.impl, _, _ = inputs
    ctx.set_materialize_grads(False)  # zeros for h would be four times as wide as x
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, up, down, output[1])


def _backward(ctx, grad, _):
    x, up, down, h = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dh = _hidden_gradient(grad, down, h, ctx.activation, ctx.impl) if any(needs[:3]) else None
    dx = dh @ up if needs[0] and dh is not None else None
    dup = dh.T @ x if needs[1] and dh is not None else None
    dup_bias = _column_sums(dh) if needs[2] and dh is not None else None
    ddown = None
    if needs[3]:
        z = h.to(sum_dtype(h))
        g = F.gelu(z) if ctx.activation == "gelu" else z * torch.sigmoid(1.702 * z)
        ddown = grad.T @ g.to(h.dtype)
    return dx, dup, dup_bias, ddown, _column_sums(grad) if needs[4] else None, *[None] * 4


def _elements() -> Any:
    return importlib.import_module("discovla_kernels.activation")


def _quack() -> Any:
    return importlib.import_module("quack.gemm_interface")


def _column_sums(x: Tensor) -> Tensor:
    return x.sum(0, dtype=sum_dtype(x)).to(x.dtype)


_mlp.register_autograd(_backward, setup_context=_setup_context)
