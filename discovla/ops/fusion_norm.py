"""Residual sum and layer norm after temporal fusion, with an adapter on the readout rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.layer_norm import Affine, check_affine, layer_norm_reference


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """A bottleneck of rank k without a skip: up quick_gelu(down x + down_bias) + up_bias.

    down: k w.  down_bias: k.  up: w k.  up_bias: w.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the four weights in the order above, contiguous."""
        return (
            self.down.contiguous(),
            self.down_bias.contiguous(),
            self.up.contiguous(),
            self.up_bias.contiguous(),
        )

    def check(self, width: int) -> None:
        """Raise ValueError if a shape does not fit rows of this width."""
        rank = len(self.down)
        expect_shape("down", self.down, (rank, width))
        expect_shape("down_bias", self.down_bias, (rank,))
        expect_shape("up", self.up, (width, rank))
        expect_shape("up_bias", self.up_bias, (width,))


def fusion_norm(
    x: Tensor,
    u: Tensor,
    adapter: AdapterWeights,
    readout_index: Tensor,
    *,
    first: int = 0,
    affine: Affine | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of x + u[:r], where readout rows also get adapter(u[r:]).

    u is the output projection of all that `temporal_fusion` returns: neither part of it, nor of its
    gradient, is copied.

    Args:
        x: ... w, r rows, the residual stream.
        u: (r + n) w, of a dtype of its own.
        adapter: applied to rows r and after, in the dtype of u.
        readout_index: r, int32: row i gets adapter(u[r + readout_index[i] - first]), and nothing if
            readout_index[i] is below `first`; each of the n rows is named once.
        first: the index of the first row with a group.
        affine, eps, dtype, impl: as in `layer_norm`.

    Returns:
        x' and y, ... w.

    Raises:
        ValueError: shapes that do not fit, or a gain or shift that requires a gradient.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    dtype, width, rows = dtype or u.dtype, x.shape[-1], x.numel() // x.shape[-1]
    if u.ndim != 2 or u.shape[1] != width or len(u) < rows:
        raise ValueError(f"u: expected at least {rows} rows {width} wide, found {tuple(u.shape)}")
    expect_shape("readout_index", readout_index, (rows,))
    adapter.check(width)
    gain, shift = check_affine(affine, x)
    operands = (x, u, readout_index, gain, shift, *adapter.tensors())
    if choose("fusion_norm", impl, x.device.type, operands=operands) == "reference":
        return fusion_norm_reference(x, u, adapter, readout_index - first, affine, eps, dtype)
    total, y, _, _ = _fusion_norm(
        x.reshape(rows, width).contiguous(), u.contiguous(), *adapter.tensors(), readout_index, gain, shift,
        first, eps, dtype,
    )  # fmt: skip
    return total.view(x.shape), y.view(x.shape)


def fusion_norm_reference(
    x: Tensor,
    u: Tensor,
    adapter: AdapterWeights,
    readout_index: Tensor,
    affine: Affine | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The formula of `fusion_norm`; rows with an index below 0 get nothing from the adapter."""
    rows, work = len(readout_index), sum_dtype(x)
    adapted = adapter_reference(u[rows:], adapter).to(work)
    readout = (readout_index >= 0).nonzero()[:, 0]
    update = u[:rows].to(work).index_add(0, readout, adapted[readout_index[readout].long()])
    return layer_norm_reference(x, update.view(x.shape), affine, eps, dtype)


def adapter_reference(x: Tensor, adapter: AdapterWeights) -> Tensor:
    """up quick_gelu(down x + down_bias) + up_bias, in the dtype of x."""
    down, down_bias, up, up_bias = (weight.to(x.dtype) for weight in adapter.tensors())
    h = F.linear(x, down, down_bias)  # ... k
    return F.linear(h * torch.sigmoid(1.702 * h), up, up_bias)


@torch.library.custom_op("discovla::fusion_norm", mutates_args=())
def _fusion_norm(
    x: Tensor,
    u: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    readout_index: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    first: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', y, mean and 1 / deviation of every row, 2 r, and a copy of the adapter's input, n w.

    The copy lets backward do without u, which is (r + n) w.
    """
    rows = len(x)
    adapter_input = torch.empty_like(u[rows:])
    adapted = kernel("fusion_norm").forward(u[rows:], down, down_bias, up, up_bias, copy=adapter_input)
    total, y, stats = kernel("layer_norm").forward(
        x, u[:rows], gain, shift, eps, dtype, added=adapted, added_index=readout_index, first=first
    )
    return total, y, stats, adapter_input


@_fusion_norm.register_fake
def _(x, u, down, down_bias, up, up_bias, readout_index, gain, shift, first, eps, dtype):
    stats = x.new_empty(2, len(x), dtype=sum_dtype(x))
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype), stats, torch.empty_like(u[len(x) :])


@torch.library.custom_op("discovla::fusion_norm_backward", mutates_args=())
def _fusion_norm_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    stats: Tensor,
    adapter_input: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    readout_index: Tensor,
    gain: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by u, and by the adapter's weights, one after the other in one flat tensor."""
    grad_total = None if grad_total is None else grad_total.contiguous()
    rows, (n, width) = len(x), adapter_input.shape
    du, grad_adapted = adapter_input.new_empty(rows + n, width), torch.empty_like(adapter_input)
    dx = kernel("layer_norm").backward(
        grad_y.contiguous(), grad_total, x, stats, gain, du[:rows],
        dadded=grad_adapted, added_index=readout_index, first=first,
    )  # fmt: skip
    parts = kernel("fusion_norm").backward(grad_adapted, adapter_input, down, down_bias, up, du[rows:])
    return dx, du, parts.sum(0)


@_fusion_norm_backward.register_fake
def _(grad_y, grad_total, x, stats, adapter_input, down, down_bias, up, readout_index, gain, first):
    n, width = adapter_input.shape
    weights = 2 * down.numel() + len(down) + width
    du = adapter_input.new_empty(len(x) + n, width)
    return torch.empty_like(x), du, adapter_input.new_empty(weights, dtype=sum_dtype(adapter_input))


def _setup_context(ctx, inputs, output) -> None:
    _, _, down, down_bias, up, up_bias, readout_index, gain, _, ctx.first, *_ = inputs
    total, _, stats, adapter_input = output
    ctx.mark_non_differentiable(stats, adapter_input)
    ctx.set_materialize_grads(False)
    ctx.weights = [(x.shape, x.dtype) for x in (down, down_bias, up, up_bias)]
    ctx.save_for_backward(total, stats, adapter_input, down, down_bias, up, readout_index, gain)


def _backward(ctx, grad_total, grad_y, *_):
    saved = ctx.saved_tensors  # unpacked once: a checkpoint refuses a second time
    if grad_y is None:
        grad_y = torch.zeros_like(saved[0])
    dx, du, flat = _fusion_norm_backward(grad_y, grad_total, *saved, ctx.first)
    parts = flat.split([shape.numel() for shape, _ in ctx.weights])
    weights = [part.view(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.weights, strict=True)]
    return dx, du, *weights, *[None] * 6


_fusion_norm.register_autograd(_backward, setup_context=_setup_context)
