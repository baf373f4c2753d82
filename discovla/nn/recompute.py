"""Maps whose backward keeps only what it cannot compute again cheaply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

SLOPE = 1.702  # of QuickGELU's sigmoid


def recompute_in_backward(function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """function(*inputs), of which only the inputs are kept for backward; that computes the rest again.

    Args:
        function: of tensors alone, without randomness; gives a tensor or a tuple of tensors.
        inputs: what it may differentiate by; a tensor it closes over gets no gradient.
    """
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
        needed = ctx.needs_input_grad[1:]
        inputs = [
            x if x is None else x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads))
        return None, *(next(found) if need else None for need in needed)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first axis, for an index (int64) whose entries all differ."""
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


def pad_rows(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """x[places], where what stands at padding gets no gradient.

    Args:
        x: t w.  places: n l, int64, the row at each place; any row at padding.
        rows: t, int64, the inverse: the flat place of each row.
    """
    return _PadRows.apply(x, places, rows)


class _PadRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.index_select(0, places.flatten()).unflatten(0, places.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return grad.flatten(0, 1).index_select(0, rows), None, None


def quick_gelu_mlp(
    x: Tensor, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor], *, needed: bool = True
) -> Tensor:
    """down(q(up x)) with q(h) = h sigmoid(1.702 h), for frozen weights: no gradient but that by x.

    With u = 1.702 h, q(h) = silu(u) / 1.702: both factors go into the products, and in
    dx = ((dz W_down) silu'(u)) W_up they cancel.  Kept: u.

    Args:
        x: ... w.  up, down: weight and bias of each linear map, in the dtype of x.
        needed: whether the result is read; else its numbers are any, and only u is computed.
    """
    return _QuickGELUMLP.apply(x, *up, *down, needed)


class _QuickGELUMLP(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, needed: bool) -> Tensor:
        u = torch.addmm(b1, x.flatten(0, -2), w1.T, alpha=SLOPE, beta=SLOPE)
        ctx.save_for_backward(u, w1, w2)
        if not needed:
            return torch.empty_like(x)
        return torch.addmm(b2, F.silu(u), w2.T, alpha=1 / SLOPE).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        u, w1, w2 = ctx.saved_tensors
        hidden = grad.flatten(0, -2) @ w2
        torch.ops.aten.silu_backward.grad_input(hidden, u, grad_input=hidden)
        return (hidden @ w1).view(grad.shape), *[None] * 5


def normed_lora_projection(
    x: Tensor, norm: tuple[Tensor, Tensor, float], linear: tuple[Tensor, Tensor], lora: tuple[Tensor, Tensor]
) -> Tensor:
    """y Wᵀ + bias + (y aᵀ) bᵀ with y = layer_norm(x), for a frozen norm, W and bias.

    The low-rank update is added in place, without a tensor of its own.  Kept: x, its statistics and y aᵀ;
    y is normalised again for the gradient by a.

    Args:
        x: ... w.  norm: weight, bias, epsilon.  linear: W (o w), bias.  lora: a (r w), b (o r); these four
            are of the dtype of y and of the result.
    """
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
        small = grad @ _transposed(b).T  # t r
        y, _, _ = _normalise(x, gamma, beta, ctx.eps, w.dtype)
        grad_a, grad_b = small.T @ y, (low.T @ grad).T
        if not ctx.needs_input_grad[0]:
            return *[None] * 6, grad_a, grad_b
        grad_y = (grad @ w).addmm_(small, a)
        work = mean.dtype
        shape = [x.shape[-1]]
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(work).view(x.shape), x.to(work), shape, mean, rstd, gamma.to(work), beta.to(work),
            [True, False, False],
        )  # fmt: skip
        return grad_x.to(x.dtype), *[None] * 5, grad_a, grad_b


def _normalise(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the layer norm, t w in `dtype`, with mean and 1 / deviation; float32 arithmetic at least."""
    work = torch.promote_types(x.dtype, torch.float32)
    shape = [x.shape[-1]]
    y, mean, rstd = torch.native_layer_norm(x.to(work), shape, gamma.to(work), beta.to(work), eps)
    return y.to(dtype).flatten(0, -2), mean, rstd


def _transposed(b: Tensor) -> Tensor:
    """bᵀ with its long axis in memory order: thin products take a fraction of the time that way."""
    return b.T.contiguous()
