"""`lora_norm` and its projection where some rows' queries alone are wanted, as in a tower's last block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.layer_norm import Affine, check_affine
from discovla.ops.lora_norm import LoRAWeights, expect_rows, lora_norm_reference, padding


def readout_lora_norm(
    x: Tensor,
    a: Tensor,
    u: Tensor | None,
    readout_rows: Tensor,
    readout_index: Tensor,
    *,
    affine: Affine | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`lora_norm`, and of n rows x' and z once more, by themselves: x' of the others nobody wants.

    Args:
        readout_rows: n, int64, the n rows among all r, each once.
        readout_index: r, int32, the inverse: which of the n rows a row is, or -1.
        x, a, u, affine, eps, dtype, impl: as in `lora_norm`.

    Returns:
        x' of the n rows, n w; z of all, ... (w + p), and H, ... k, without a gradient; z of the n rows.

    Raises:
        ValueError: shapes that do not fit, or a gain or shift that asks for a gradient.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    copies = a if a.ndim == 3 else a[None]
    dtype, width = dtype or (x if u is None else u).dtype, x.shape[-1]
    expect_shape("u", u, tuple(x.shape))
    expect_shape("a", copies, (*copies.shape[:2], width))
    expect_shape("readout_index", readout_index, (x.numel() // width,))
    gain, shift = check_affine(affine, x)
    like = torch.empty(0, dtype=dtype, device=x.device)
    if (
        choose("readout_lora_norm", impl, x.device.type, operands=(x, copies, like, u, gain, shift))
        == "reference"
    ):
        total, z, low = lora_norm_reference(x, copies[0], u, affine, eps, dtype)
        return total.flatten(0, -2)[readout_rows], z, low, z.flatten(0, -2)[readout_rows]
    rows = x.reshape(-1, width).contiguous()
    more = None if u is None else u.reshape(rows.shape).contiguous()
    if a.ndim == 2:
        copies = a.contiguous().expand(kernel("lora_norm").programs(len(rows)), -1, -1)
    _, z, low, _, read, z_read = _read_lora_norm(
        rows, copies, more, gain, shift, readout_index, len(readout_rows), eps, dtype
    )
    z, low = (part.view(*x.shape[:-1], part.shape[1]) for part in (z, low))
    return read, z, low, z_read


def readout_lora_projection(
    z: Tensor, low: Tensor, z_read: Tensor, weights: LoRAWeights
) -> tuple[Tensor, Tensor]:
    """Of `lora_projection` to queries, keys and values the queries of the rows read; the others of all.

    Args:
        z, low, z_read: as `readout_lora_norm` gives them.

    Returns:
        n w and ... 2w.
    """
    expect_rows(z, low, weights)
    expect_shape("z_read", z_read, (len(z_read), z.shape[-1]))
    given = z.flatten(0, -2), low.flatten(0, -2), z_read
    q, kv = _ReadLoRAProjection.apply(*given, weights.augmented, weights.bias, weights.b)
    return q, kv.view(*z.shape[:-1], kv.shape[1])


class _ReadLoRAProjection(torch.autograd.Function):
    """r (w + p) and n (w + p) to n w and r 2w."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, low: Tensor, read: Tensor, augmented: Tensor, bias: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        width, first = len(b) // 3, z.shape[1] - padding(b.shape[1])
        ctx.save_for_backward(augmented, low, read[:, first : first + b.shape[1]])
        q = F.linear(read, augmented[:width], bias[:width])
        return q, F.linear(z, augmented[width:], bias[width:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_kv: Tensor) -> tuple[Tensor | None, ...]:
        augmented, low, read = ctx.saved_tensors
        width = grad_q.shape[1]
        grad_b = low.new_empty(3 * width, low.shape[1])
        torch.mm(grad_q.T, read, out=grad_b[:width])
        torch.mm(grad_kv.T, low, out=grad_b[width:])
        return grad_kv @ augmented[width:], None, grad_q @ augmented[:width], None, None, grad_b


@torch.library.custom_op("discovla::readout_lora_norm", mutates_args=())
def _read_lora_norm(
    x: Tensor,
    a: Tensor,
    u: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    readout_index: Tensor,
    count: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_lora_norm`, then x' and z of the rows that are read, `count` of them."""
    affine = None if gain is None or shift is None else (gain, shift)
    return kernel("lora_norm").forward(x, u, a[0], affine, (eps, dtype), (readout_index, count))


@_read_lora_norm.register_fake
def _(x, a, u, gain, shift, readout_index, count, eps, dtype):
    rank, width = a.shape[1:]
    total = x.new_empty(0) if u is None else torch.empty_like(x)
    z, low = (x.new_empty(len(x), n, dtype=dtype) for n in (width + padding(rank), rank))
    stats, read = x.new_empty(2, len(x), dtype=sum_dtype(x)), x.new_empty(count, width)
    return total, z, low, stats, read, z.new_empty(count, z.shape[1])


@torch.library.custom_op("discovla::readout_lora_norm_backward", mutates_args=())
def _read_lora_norm_backward(
    grad: Tensor,
    grad_read: Tensor,
    grad_z_read: Tensor,
    x: Tensor,
    stats: Tensor,
    a: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    readout_index: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by u (empty where it is that by x) and by a, p k w."""
    affine = None if gain is None or shift is None else (gain, shift)
    read = grad_read.contiguous(), grad_z_read.contiguous(), readout_index
    dx, du, parts = kernel("lora_norm").backward((grad.contiguous(), None), x, stats, a, affine, read)
    return dx, du, parts.to(a.dtype)


@_read_lora_norm_backward.register_fake
def _(grad, grad_read, grad_z_read, x, stats, a, gain, shift, readout_index):
    du = x.new_empty(0) if grad.dtype == x.dtype else torch.empty_like(x, dtype=grad.dtype)
    return torch.empty_like(x), du, a.new_empty(a.shape)


def _keep(ctx, inputs, output) -> None:
    x, a, u, gain, shift, readout_index, _, _, ctx.dtype = inputs
    total, _, low, stats, _, _ = output
    ctx.mark_non_differentiable(total, low, stats)
    ctx.set_materialize_grads(False)
    ctx.shapes = [(part.shape, part.dtype) for part in (output[1], *output[4:])]
    ctx.u_dtype = None if u is None else u.dtype
    ctx.save_for_backward(x if u is None else total, stats, a, gain, shift, readout_index)


def _differentiate(ctx, _total, grad, _low, _stats, grad_read, grad_z_read):
    """x' of all rows, H and the statistics are for backward alone: nobody differentiates them."""
    saved = ctx.saved_tensors  # once: a checkpoint refuses to unpack them a second time
    grads = [  # of what nobody used
        saved[0].new_zeros(shape, dtype=dtype) if one is None else one
        for one, (shape, dtype) in zip((grad, grad_read, grad_z_read), ctx.shapes, strict=True)
    ]
    dx, du, da = _read_lora_norm_backward(*grads, *saved)
    if ctx.u_dtype is None:
        return dx, da, *[None] * 7
    return dx, da, (dx if ctx.dtype == dx.dtype else du).to(ctx.u_dtype), *[None] * 6


_read_lora_norm.register_autograd(_differentiate, setup_context=_keep)
