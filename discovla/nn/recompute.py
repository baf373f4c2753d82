"""Functions with a backward of their own, which recomputes what is cheaper to recompute than to keep.

Under torch.compile they are plain: the compiler chooses what backward recomputes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from discovla.ops.blocks import norm_dtype

QUICK_GELU_SLOPE = 1.702


def recompute_in_backward(function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """Return function(*inputs) and keep only the inputs; backward runs `function` again.

    Args:
        function: of tensors, without randomness; returns a tensor or a tuple of tensors.
        inputs: the tensors to differentiate by; tensors in the closure of `function` get no gradient.
    """
    if torch.compiler.is_compiling():
        return function(*inputs)
    return _RecomputeInBackward.apply(function, *inputs)


class _RecomputeInBackward(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs_grad = ctx.needs_input_grad[1:]
        inputs = [
            x if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip(ctx.saved_tensors, needs_grad, strict=True)
        ]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [x for x in inputs if x is not None and x.requires_grad]
        # an output may depend on frozen inputs alone
        reached = [i for i, y in enumerate(outputs) if y.requires_grad]
        input_grads = iter(
            torch.autograd.grad([outputs[i] for i in reached], leaves, [grads[i] for i in reached])
        )
        return None, *(next(input_grads) if needed else None for needed in needs_grad)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first axis, for an int64 index without repetitions."""
    if torch.compiler.is_compiling():
        return x.index_select(0, index)
    return _TakeRows.apply(x, index)


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.save_for_backward(index)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, index, grad), None


def pad_rows(x: Tensor, pad_index: Tensor, pack_index: Tensor) -> Tensor:
    """x[pad_index]; the gradient at padding is dropped.

    Args:
        x: t w.  pad_index: n l, int64, the row at each place, any row at padding.
        pack_index: t, int64, the inverse: the flat place of each row.
    """
    if torch.compiler.is_compiling():
        return x.index_select(0, pad_index.flatten()).unflatten(0, pad_index.shape)
    return _PadRows.apply(x, pad_index, pack_index)


class _PadRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pad_index: Tensor, pack_index: Tensor) -> Tensor:
        ctx.save_for_backward(pack_index)
        return x.index_select(0, pad_index.flatten()).unflatten(0, pad_index.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (pack_index,) = ctx.saved_tensors
        return grad.flatten(0, 1).index_select(0, pack_index), None, None


def quick_gelu_mlp(
    x: Tensor, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor], *, output_needed: bool = True
) -> Tensor:
    """down(q(up x)) with q(h) = h sigmoid(1.702 h), for frozen weights: only x gets a gradient.

    With u = 1.702 h, q(h) = silu(u) / 1.702: both factors go into the products, and in
    dx = ((dz W_down) silu'(u)) W_up they cancel.  Kept: u.

    Args:
        x: ... w.  up, down: weight and bias of each linear map, in the dtype of x.
        output_needed: False if the result is not read: only u is computed, and the result is arbitrary.
    """
    if torch.compiler.is_compiling():
        u = _scaled_hidden(x, *up)
        return torch.addmm(down[1], F.silu(u), down[0].T, alpha=1 / QUICK_GELU_SLOPE).view(x.shape)
    return _QuickGELUMLP.apply(x, *up, *down, output_needed)


class _QuickGELUMLP(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, output_needed: bool
    ) -> Tensor:
        u = _scaled_hidden(x, w1, b1)
        ctx.save_for_backward(u, w1, w2)
        if not output_needed:
            return torch.empty_like(x)
        return torch.addmm(b2, F.silu(u), w2.T, alpha=1 / QUICK_GELU_SLOPE).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        u, w1, w2 = ctx.saved_tensors
        hidden = grad.flatten(0, -2) @ w2
        torch.ops.aten.silu_backward.grad_input(hidden, u, grad_input=hidden)
        return (hidden @ w1).view(grad.shape), *[None] * 5


def _scaled_hidden(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1.702 (weight x + bias): t m."""
    slope = QUICK_GELU_SLOPE
    return torch.addmm(bias, x.flatten(0, -2), weight.T, alpha=slope, beta=slope)


def normed_lora_projection(
    x: Tensor, norm: tuple[Tensor, Tensor, float], linear: tuple[Tensor, Tensor], lora: tuple[Tensor, Tensor]
) -> Tensor:
    """y Wᵀ + bias + (y aᵀ) bᵀ with y = layer_norm(x), for a frozen norm, W and bias.

    The low-rank update is added in place.  Kept: x, its statistics and y aᵀ; the gradient by a recomputes y.

    Args:
        x: ... w.  norm: weight, bias, epsilon.  linear: W (o w), bias.  lora: a (r w), b (o r); these four
            have the dtype of y and of the result.
    """
    if torch.compiler.is_compiling():
        (w, bias), (a, b) = linear, lora
        y, _, _ = _normalise(x, *norm, w.dtype)
        return (F.linear(y, w, bias) + (y @ a.T) @ b.T).view(*x.shape[:-1], -1)
    return _NormedLoRAProjection.apply(x, *norm, *linear, *lora)


class _NormedLoRAProjection(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        w: Tensor,
        bias: Tensor,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        y, mean, rstd = _normalise(x, gamma, beta, eps, w.dtype)
        low = y @ a.T  # t r
        ctx.eps = eps
        ctx.save_for_backward(x, mean, rstd, low, gamma, beta, w, a, b)
        out = torch.addmm(bias, y, w.T).addmm_(low, _transposed(b))
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean, rstd, low, gamma, beta, w, a, b = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_low = grad @ _transposed(b).T  # t r
        y, _, _ = _normalise(x, gamma, beta, ctx.eps, w.dtype)
        grad_a, grad_b = grad_low.T @ y, (low.T @ grad).T
        if not ctx.needs_input_grad[0]:
            return *[None] * 6, grad_a, grad_b
        grad_y = (grad @ w).addmm_(grad_low, a)
        dtype, shape = norm_dtype(x), [x.shape[-1]]
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(dtype).view(x.shape), x.to(dtype), shape, mean, rstd, gamma.to(dtype), beta.to(dtype),
            [True, False, False],
        )  # fmt: skip
        return grad_x.to(x.dtype), *[None] * 5, grad_a, grad_b


def _normalise(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer norm, t w in `dtype`, the mean and 1 / deviation of each row; summed in float32 at least."""
    work, shape = norm_dtype(x), [x.shape[-1]]
    y, mean, rstd = torch.native_layer_norm(x.to(work), shape, gamma.to(work), beta.to(work), eps)
    return y.to(dtype).flatten(0, -2), mean, rstd


def _transposed(b: Tensor) -> Tensor:
    """bᵀ in contiguous memory, with which thin products are several times faster."""
    return b.T.contiguous()
