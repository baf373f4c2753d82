"""`lora_norm` and its projection for a tower's last block, which needs the queries of readout rows only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel, run_reference
from discovla.ops.layer_norm import Affine, check_affine
from discovla.ops.lora_norm import LoRAWeights, check_projection, lora_norm_reference, padded_rank


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
    """`lora_norm` of all rows, and x' and z of the n readout rows, which it writes in the same pass.

    Args:
        readout_rows: n, int64, the readout rows among all r, each once.
        readout_index: r, int32, the inverse: which of the n readout rows a row is, or -1.
        x, a, u, affine, eps, dtype, impl: as in `lora_norm`.

    Returns:
        x' of readout rows, n w; z of all rows, ... (w + p); H, ... k, without gradient; z of readout rows.

    Raises:
        ValueError: shapes that do not fit, or a gain or shift that requires a gradient.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    copies = a if a.ndim == 3 else a[None]
    dtype, width = dtype or (x if u is None else u).dtype, x.shape[-1]
    expect_shape("u", u, tuple(x.shape))
    expect_shape("a", copies, (*copies.shape[:2], width))
    expect_shape("readout_index", readout_index, (x.numel() // width,))
    gain, shift = check_affine(affine, x)
    operands = (x, copies, torch.empty(0, dtype=dtype, device=x.device), u, gain, shift)
    chosen = choose("readout_lora_norm", impl, x.device.type, operands=operands)
    if chosen != "triton":
        total, z, low = run_reference(chosen, lora_norm_reference, x, copies[0], u, affine, eps, dtype)
        return total.flatten(0, -2)[readout_rows], z, low, z.flatten(0, -2)[readout_rows]
    rows = x.reshape(-1, width).contiguous()
    update = None if u is None else u.reshape(rows.shape).contiguous()
    if a.ndim == 2:
        copies = a.contiguous().expand(kernel("lora_norm").programs(len(rows)), -1, -1)
    _, z, low, _, readout_x, readout_z = _readout_lora_norm(
        rows, copies, update, gain, shift, readout_index, len(readout_rows), eps, dtype
    )
    z, low = (part.view(*x.shape[:-1], part.shape[1]) for part in (z, low))
    return readout_x, z, low, readout_z


def readout_lora_projection(
    z: Tensor, low: Tensor, readout_z: Tensor, weights: LoRAWeights
) -> tuple[Tensor, Tensor]:
    """`lora_projection` to the queries of readout rows, and to the keys and values of all rows.

    Args:
        z, low, readout_z: as returned by `readout_lora_norm`.

    Returns:
        n w and ... 2w.
    """
    check_projection(z, low, weights)
    expect_shape("readout_z", readout_z, (len(readout_z), z.shape[-1]))
    tensors = z.flatten(0, -2), low.flatten(0, -2), readout_z
    q, kv = _ReadoutLoRAProjection.apply(*tensors, weights.augmented, weights.bias, weights.b)
    return q, kv.view(*z.shape[:-1], kv.shape[1])


class _ReadoutLoRAProjection(torch.autograd.Function):
    """r (w + p) and n (w + p) to n w and r 2w."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, low: Tensor, readout_z: Tensor, augmented: Tensor, bias: Tensor, b: Tensor
    ) -> tuple[Tensor, Tensor]:
        width, first = len(b) // 3, z.shape[1] - padded_rank(b.shape[1])
        ctx.save_for_backward(augmented, low, readout_z[:, first : first + b.shape[1]])
        q = F.linear(readout_z, augmented[:width], bias[:width])
        return q, F.linear(z, augmented[width:], bias[width:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_kv: Tensor) -> tuple[Tensor | None, ...]:
        augmented, low, readout_low = ctx.saved_tensors
        width = grad_q.shape[1]
        db = low.new_empty(3 * width, low.shape[1])
        torch.mm(grad_q.T, readout_low, out=db[:width])
        torch.mm(grad_kv.T, low, out=db[width:])
        return grad_kv @ augmented[width:], None, grad_q @ augmented[:width], None, None, db


@torch.library.custom_op("discovla::readout_lora_norm", mutates_args=())
def _readout_lora_norm(
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
    """The results of `_lora_norm`, then x' and z of the `count` readout rows."""
    return kernel("lora_norm").forward(
        x, u, a[0], gain, shift, eps, dtype, readout_index=readout_index, readout_count=count
    )


@_readout_lora_norm.register_fake
def _(x, a, u, gain, shift, readout_index, count, eps, dtype):
    rank, width = a.shape[1:]
    total = x.new_empty(0) if u is None else torch.empty_like(x)
    z, low = (x.new_empty(len(x), n, dtype=dtype) for n in (width + padded_rank(rank), rank))
    stats, readout_x = x.new_empty(2, len(x), dtype=sum_dtype(x)), x.new_empty(count, width)
    return total, z, low, stats, readout_x, z.new_empty(count, z.shape[1])


@torch.library.custom_op("discovla::readout_lora_norm_backward", mutates_args=())
def _readout_lora_norm_backward(
    grad_z: Tensor,
    grad_readout_x: Tensor,
    grad_readout_z: Tensor,
    x: Tensor,
    stats: Tensor,
    a: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    readout_index: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, by u (empty if it equals that by x) and by a, p k w."""
    dx, du, parts = kernel("lora_norm").backward(
        grad_z.contiguous(), None, x, stats, a, gain, shift, readout_index=readout_index,
        grad_readout_x=grad_readout_x.contiguous(), grad_readout_z=grad_readout_z.contiguous(),
    )  # fmt: skip
    return dx, du, parts.to(a.dtype)


@_readout_lora_norm_backward.register_fake
def _(grad_z, grad_readout_x, grad_readout_z, x, stats, a, gain, shift, readout_index):
    du = x.new_empty(0) if grad_z.dtype == x.dtype else torch.empty_like(x, dtype=grad_z.dtype)
    return torch.empty_like(x), du, a.new_empty(a.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, a, u, gain, shift, readout_index, _, _, ctx.dtype = inputs
    total, z, low, stats, readout_x, readout_z = output
    ctx.mark_non_differentiable(total, low, stats)
    ctx.set_materialize_grads(False)
    ctx.outputs = [(part.shape, part.dtype) for part in (z, readout_x, readout_z)]
    ctx.u_dtype = None if u is None else u.dtype
    ctx.save_for_backward(x if u is None else total, stats, a, gain, shift, readout_index)


def _backward(ctx, _total, grad_z, _low, _stats, grad_readout_x, grad_readout_z):
    saved = ctx.saved_tensors  # unpacked once: a checkpoint refuses a second time
    grads = [
        saved[0].new_zeros(shape, dtype=dtype) if grad is None else grad
        for grad, (shape, dtype) in zip((grad_z, grad_readout_x, grad_readout_z), ctx.outputs, strict=True)
    ]
    dx, du, da = _readout_lora_norm_backward(*grads, *saved)
    if ctx.u_dtype is None:
        return dx, da, *[None] * 7
    return dx, da, (dx if ctx.dtype == dx.dtype else du).to(ctx.u_dtype), *[None] * 6


_readout_lora_norm.register_autograd(_backward, setup_context=_setup_context)
