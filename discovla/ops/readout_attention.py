"""Attention of one query a sequence, for the last block of a tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from discovla.ops.attention import attention
from discovla.ops.blocks import expect_mask, expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.short_attention import Packing
from discovla.ops.temporal_fusion import attend_across_groups, expect_position


@dataclass(frozen=True, kw_only=True)
class Readout:
    """n sequences with one readout row each.

    rows: n, int64, the readout row of each sequence, counted among all rows (n l flattened, or r).
    group: number of neighbouring sequences that see each other; 0 for none.
    ungrouped: number of sequences before the groups; without groups it is not used.
    packing: layout of packed rows; None for n l.
    causal, key_mask: within a sequence, as in `short_attention`.
    group_mask: n l (or r), bool, true on rows visible across the group; None for all.
    """

    heads: int
    rows: Tensor
    group: int = 0
    ungrouped: int = 0
    packing: Packing | None = None
    causal: bool = False
    key_mask: Tensor | None = None
    group_mask: Tensor | None = None

    @property
    def first_grouped(self) -> int:
        """Number of sequences without a group."""
        return self.ungrouped if self.group else len(self.rows)


def readout_attention(
    q: Tensor, kv: Tensor, readout: Readout, *, position: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """o_f = attention of query f within its sequence; g_f = softmax(q_f Kᵀ / sqrt(c) + log group_mask) V.

    K = k + position of f, and V, hold all sequences of the group: the readout rows of `temporal_fusion`.
    The kernel keeps nothing but its inputs for backward.

    Args:
        q: n w, the query of each sequence, of `heads` heads of c = w / heads channels.
        kv: n l 2w, keys and values of every row; or r 2w with packing.
        readout: which rows belong together.
        position: f' w, f' >= f, added to the keys of the f-th sequence as its group sees them.
        impl: reference (plain torch), torch (its fused attention), triton, math or efficient (that back end
            of torch's within sequences, its fused attention across them), or auto.

    Returns:
        (n + n') w, in the dtype of q: g_f of grouped sequences and o_f of the others, n; then o_f of the n'
        grouped ones.  0 for a query that sees no key.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: DiscoVLA (arXiv 2506.08887), Image-Video Features Fusion.
    """
    _check(q, kv, readout, position)
    offsets, length = None, kv.shape[-2]
    if readout.packing is not None:
        offsets, length = readout.packing.offsets, readout.packing.max_length
    key_mask, group_mask = (
        None if m is None else m.flatten() for m in (readout.key_mask, readout.group_mask)
    )
    position = None if position is None or not readout.group else position[: readout.group].contiguous()
    heads = q.unflatten(-1, (readout.heads, -1)), kv.unflatten(-1, (2, readout.heads, -1))
    groups = readout.rows[readout.first_grouped :].unflatten(0, (-1, max(1, readout.group)))
    operands = (*heads, groups, offsets, key_mask, group_mask)
    chosen = choose("readout_attention", impl, q.device.type, operands=operands)
    if chosen != "triton":
        return readout_attention_reference(q, kv, readout, position, chosen)
    return _readout_attention(
        q.contiguous(), kv.reshape(-1, kv.shape[-1]).contiguous(), readout.rows.contiguous(), offsets,
        key_mask, group_mask, position, readout.heads, length, readout.causal, readout.ungrouped,
        readout.group,
    )  # fmt: skip


def readout_attention_reference(
    q: Tensor, kv: Tensor, readout: Readout, position: Tensor | None, impl: str = "reference"
) -> Tensor:
    """The formula, with packed sequences padded to the longest; impl: of `attention`."""
    packing, heads, first = readout.packing, readout.heads, readout.first_grouped
    key_mask, group_mask = readout.key_mask, readout.group_mask
    if packing is None:
        starts = torch.arange(0, kv.shape[0] * kv.shape[1], kv.shape[1], device=kv.device)
        real = torch.ones(kv.shape[:2], dtype=torch.bool, device=kv.device)
    else:
        kv, starts, real = kv[packing.pad_index], packing.offsets[:-1], packing.mask
        key_mask, group_mask = (None if m is None else m[packing.pad_index] for m in (key_mask, group_mask))
    visible, group_visible = (real if mask is None else mask & real for mask in (key_mask, group_mask))
    if readout.causal:
        places = torch.arange(kv.shape[1], device=kv.device)
        visible = visible & (places <= (readout.rows - starts)[:, None])
    k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # n h l c
    any_visible = visible.any(-1)[:, None, None, None]
    out = attention(
        q.unflatten(-1, (heads, -1))[:, :, None],
        k,
        v,
        mask=visible[:, None, None] | ~any_visible,
        impl=cast(Impl, impl),
    )
    local = (out * any_visible)[:, :, 0].flatten(1)  # n w
    if not readout.group:
        return local
    q, kv, group_visible = (x[first:].unflatten(0, (-1, readout.group)) for x in (q, kv, group_visible))
    fused = attend_across_groups(q, kv, group_visible, position, heads, impl).flatten(0, 1)
    return torch.cat([local[:first], fused, local[first:]])


def _check(q: Tensor, kv: Tensor, readout: Readout, position: Tensor | None) -> None:
    packing, group = readout.packing, readout.group
    if q.ndim != 2 or q.shape[1] % readout.heads:
        raise ValueError(f"q: expected n w, w a multiple of {readout.heads} heads, found {tuple(q.shape)}")
    n, width = q.shape
    if kv.ndim != (3 if packing is None else 2) or kv.shape[-1] != 2 * width:
        shape = f"{'n l' if packing is None else 'r'} {2 * width}"
        raise ValueError(f"kv: expected {shape}, found {tuple(kv.shape)}")
    if n != (len(kv) if packing is None else len(packing.offsets) - 1):
        raise ValueError(f"q: expected one row a sequence, found {n}")
    expect_shape("rows", readout.rows, (n,))
    if readout.rows.dtype != torch.int64:
        raise ValueError(f"rows: expected int64, found {readout.rows.dtype}")
    if group and (n - readout.ungrouped) % group:
        raise ValueError(f"group: expected a divisor of {n - readout.ungrouped}, found {group}")
    expect_mask("key_mask", readout.key_mask, tuple(kv.shape[:-1]))
    expect_mask("group_mask", readout.group_mask, tuple(kv.shape[:-1]))
    expect_position(position, width, group)


@torch.library.custom_op("discovla::readout_attention", mutates_args=())
def _readout_attention(
    q: Tensor,
    kv: Tensor,
    readout_rows: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    ungrouped: int,
    group: int,
) -> Tensor:
    """(n + n') w."""
    return kernel("readout_attention").forward(
        q, kv, readout_rows, offsets, key_mask, group_mask, position, heads, length, causal, ungrouped, group
    )


@_readout_attention.register_fake
def _(q, kv, readout_rows, offsets, key_mask, group_mask, position, heads, length, causal, ungrouped, group):
    return q.new_empty(2 * len(q) - ungrouped if group else len(q), q.shape[1])


@torch.library.custom_op("discovla::readout_attention_backward", mutates_args=())
def _readout_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    readout_rows: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    ungrouped: int,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by queries, by rows, and by the positions of every group, n' w (empty without positions)."""
    return kernel("readout_attention").backward(
        grad.contiguous(), q, kv, readout_rows, offsets, key_mask, group_mask, position, heads, length,
        causal, ungrouped, group,
    )  # fmt: skip


@_readout_attention_backward.register_fake
def _(
    grad, q, kv, readout_rows, offsets, key_mask, group_mask, position, heads, length, causal, ungrouped,
    group,
):  # fmt: skip
    grouped = 0 if position is None else len(q) - ungrouped
    return torch.empty_like(q), torch.empty_like(kv), q.new_empty(grouped, q.shape[1], dtype=sum_dtype(q))


def _setup_context(ctx, inputs, output) -> None:
    ctx.sizes = inputs[7:]
    ctx.save_for_backward(*inputs[:7])


def _backward(ctx, grad):
    saved = ctx.saved_tensors  # unpacked once: a checkpoint refuses a second time
    dq, dkv, dposition = _readout_attention_backward(grad, *saved, *ctx.sizes)
    position = saved[6]
    if position is not None:
        dposition = dposition.unflatten(0, (-1, len(position))).sum(0).to(position.dtype)
    return dq, dkv, *[None] * 4, None if position is None else dposition, *[None] * 5


_readout_attention.register_autograd(_backward, setup_context=_setup_context)
