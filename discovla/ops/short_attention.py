"""Self-attention of short sequences on packed rows (q k v), read where the projection left them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.attention import attention, size_bias
from discovla.ops.blocks import expect_mask, expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Layout of n sequences of different lengths, end to end in r rows without padding.

    offsets: n + 1, int32, on the device of the rows: the first row of each sequence, and r.
    max_length: l, at least the number of rows of any sequence.
    num_rows: r.
    """

    offsets: Tensor
    max_length: int
    num_rows: int

    @staticmethod
    def from_mask(kept: Tensor, num_rows: int | None = None) -> Packing:
        """Pack the tokens of padded sequences at which `kept`, n k, bool, is true.

        num_rows: their number, if known; `max_length` is then k, and nothing is read from the device.
            Without it a mask on a GPU makes this a sync.
        """
        lengths = kept.sum(1)
        offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        if num_rows is not None:
            return Packing(offsets=offsets, max_length=kept.shape[1], num_rows=num_rows)
        return Packing(offsets=offsets, max_length=int(lengths.max()), num_rows=int(offsets[-1]))

    def to(self, device: torch.device | str) -> Packing:
        """Copy to `device`."""
        return replace(self, offsets=self.offsets.to(device, non_blocking=True))

    @cached_property
    def lengths(self) -> Tensor:
        """Rows of each sequence: n 1, int32."""
        return self.offsets.diff()[:, None]

    @cached_property
    def mask(self) -> Tensor:
        """Real tokens of the padded layout: n l, bool; padding comes last."""
        return torch.arange(self.max_length, device=self.offsets.device) < self.lengths

    @cached_property
    def pad_index(self) -> Tensor:
        """Index that pads: the packed row at each place of n l, int64; padding repeats the last row."""
        place = torch.arange(self.max_length, device=self.offsets.device)
        return (self.offsets[:-1, None] + torch.minimum(place, self.lengths - 1)).long()

    @cached_property
    def pack_index(self) -> Tensor:
        """Index that packs: the place in the flattened n l of each packed row, r, int64."""
        return self.mask.flatten().nonzero_static(size=self.num_rows)[:, 0]


def short_attention(
    qkv: Tensor,
    heads: int,
    *,
    packing: Packing | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    key_sizes: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(q kᵀ / sqrt(c) + log mask + log sizes) v within each sequence; 0 for a query that sees no key.

    The kernel keeps nothing but its inputs for backward: neither the result nor log-sum-exps.

    Args:
        qkv: n l 3w, a row holding queries, keys and values, each of `heads` heads of c = w / heads channels;
            or r 3w with `packing`.
        heads: a divisor of w.
        packing: layout of packed rows; None for n l.
        causal: a row sees itself and earlier rows of its sequence only.
        key_mask: n l (or r), bool, true on visible rows.
        key_sizes: n l (or r), above 0: how many equal keys each stands for, as tokens that were merged do
            (proportional attention of ToMe, arXiv 2210.09461); without gradient.  None: 1 each.
        impl: reference (plain torch), torch (its fused kernel), triton, math, flash, cudnn or efficient (that
            back end of torch's), varlen (torch's for packed rows), flash_attn (that package), or auto.

    Returns:
        n l w (or r w), in the dtype of qkv.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    _check(qkv, heads, packing, key_mask)
    if key_sizes is not None:
        expect_shape("key_sizes", key_sizes, tuple(qkv.shape[:-1]))
    offsets, length = None, qkv.shape[-2]
    if packing is not None:
        offsets, length = packing.offsets, packing.max_length
    operands = (qkv.unflatten(-1, (3, heads, -1)), key_mask, offsets, key_sizes)
    chosen = choose("short_attention", impl, qkv.device.type, operands=operands)
    if chosen != "triton":
        return short_attention_reference(qkv, heads, packing, causal, key_mask, chosen, key_sizes)
    mask = None if key_mask is None else key_mask.flatten().contiguous()
    sizes = None if key_sizes is None else key_sizes.detach().to(sum_dtype(qkv)).flatten().contiguous()
    rows = qkv.reshape(-1, qkv.shape[-1]).contiguous()
    out = _short_attention(rows, offsets, mask, sizes, heads, length, causal)
    return out.view(*qkv.shape[:-1], out.shape[1])


def short_attention_reference(
    qkv: Tensor,
    heads: int,
    packing: Packing | None,
    causal: bool,
    key_mask: Tensor | None,
    impl: str = "reference",
    key_sizes: Tensor | None = None,
) -> Tensor:
    """The formula; impl: a library, or, with packed sequences padded to the longest, one of `attention`."""
    if impl in ("varlen", "flash_attn"):
        return _library_attention(qkv.unflatten(-1, (3, heads, -1)), packing, causal, impl).flatten(-2)
    attention_impl = cast(Impl, impl)
    visible = key_mask
    if packing is not None:
        qkv = qkv[packing.pad_index]
        visible = packing.mask if key_mask is None else key_mask[packing.pad_index] & packing.mask
        key_sizes = None if key_sizes is None else key_sizes[packing.pad_index]
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # 3 n h l c
    bias = size_bias(key_sizes, q)
    if visible is None and causal and bias is not None:
        visible = torch.ones(qkv.shape[:2], dtype=torch.bool, device=qkv.device)
    if visible is None:
        out = attention(q, k, v, bias=bias, causal=causal, impl=attention_impl)
    else:
        pairs = visible[:, None, None, :].expand(-1, 1, visible.shape[1], -1)  # n 1 i j
        pairs = pairs.tril() if causal else pairs
        any_visible = pairs.any(-1, keepdim=True)
        out = attention(q, k, v, mask=pairs | ~any_visible, bias=bias, impl=attention_impl) * any_visible
    out = out.transpose(1, 2).flatten(2)  # n l w
    return out if packing is None else out.flatten(0, 1)[packing.pack_index]


def _library_attention(qkv: Tensor, packing: Packing | None, causal: bool, library: str) -> Tensor:
    """Attention by torch's variable-length kernel or by flash-attn: n l 3 h c (or r 3 h c) to n l h c."""
    if library == "varlen":
        assert packing is not None, "dispatch gives it packed rows only"
        varlen = importlib.import_module("torch.nn.attention.varlen")
        offsets, length = packing.offsets, packing.max_length
        window = (-1, 0) if causal else (-1, -1)
        return varlen.varlen_attn(*qkv.unbind(1), offsets, offsets, length, length, window_size=window)
    flash = importlib.import_module("flash_attn")
    if packing is None:
        return flash.flash_attn_qkvpacked_func(qkv, causal=causal)
    return flash.flash_attn_varlen_qkvpacked_func(qkv, packing.offsets, packing.max_length, causal=causal)


def _check(qkv: Tensor, heads: int, packing: Packing | None, key_mask: Tensor | None) -> None:
    width = qkv.shape[-1] // 3
    axes = 3 if packing is None else 2
    if qkv.ndim != axes or width * 3 != qkv.shape[-1] or width % heads:
        shape = f"{'n l' if packing is None else 'r'} 3w, w a multiple of {heads} heads"
        raise ValueError(f"qkv: expected {shape}, found {tuple(qkv.shape)}")
    expect_mask("key_mask", key_mask, tuple(qkv.shape[:-1]))
    if packing is not None and (packing.offsets.dtype != torch.int32 or packing.offsets.ndim != 1):
        actual = f"{packing.offsets.dtype} of shape {tuple(packing.offsets.shape)}"
        raise ValueError(f"packing.offsets: expected one axis of int32, found {actual}")
    if packing is not None and packing.num_rows != len(qkv):
        raise ValueError(f"packing.num_rows: expected {len(qkv)}, the rows of qkv, found {packing.num_rows}")


@torch.library.custom_op("discovla::short_attention", mutates_args=())
def _short_attention(
    qkv: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    sizes: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
) -> Tensor:
    """r 3w to r w."""
    return kernel("short_attention").forward(qkv, offsets, mask, sizes, heads, length, causal)


@_short_attention.register_fake
def _(qkv, offsets, mask, sizes, heads, length, causal):
    return qkv.new_empty(len(qkv), qkv.shape[1] // 3)


@torch.library.custom_op("discovla::short_attention_backward", mutates_args=())
def _short_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    offsets: Tensor | None,
    mask: Tensor | None,
    sizes: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
) -> Tensor:
    """Gradient by the packed rows, r 3w."""
    module = kernel("short_attention")
    return module.backward(grad.contiguous(), qkv, offsets, mask, sizes, heads, length, causal)


@_short_attention_backward.register_fake
def _(grad, qkv, offsets, mask, sizes, heads, length, causal):
    return torch.empty_like(qkv)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.heads, ctx.length, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    dqkv = _short_attention_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.length, ctx.causal)
    return dqkv, None, None, None, None, None, None


_short_attention.register_autograd(_backward, setup_context=_setup_context)
