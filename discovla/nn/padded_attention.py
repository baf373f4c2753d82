"""Attention of blocks in plain torch: rows are padded, attended to by torch's fused attention, and unpadded.

Backward recomputes all of it from queries, keys and values, so that neither scores nor outputs are kept; on
a CPU, whose memory is not scarce, attention without a mask keeps its output and computes no scores again.
The kernels of `ops.short_attention`, `ops.temporal_fusion` and `ops.readout_attention` compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.nn.layout import SequenceLayout
from discovla.nn.recompute import recompute_in_backward
from discovla.ops.attention import attention, size_bias


def self_attention(qkv: Tensor, heads: int, layout: SequenceLayout) -> Tensor:
    """Attention within each sequence.

    Args:
        qkv: n l 3w or t 3w, queries, keys and values side by side.

    Returns:
        n l w or t w.
    """

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = _split(layout.pad(qkv), heads, 3)  # n h l c
        return layout.unpad(_join(_within_sequences(q, k, v, layout)))

    if qkv.device.type == "cpu" and layout.key_mask is None and layout.key_sizes is None:
        return attend(qkv)
    return recompute_in_backward(attend, qkv)


def readout_attention(q: Tensor, kv: Tensor, heads: int, layout: SequenceLayout) -> Tensor:
    """`self_attention` of the readout rows alone, n w.

    Args:
        q: n w, queries of the readout rows.  kv: n l 2w or t 2w, keys and values of all rows.
    """

    def attend(q: Tensor, kv: Tensor) -> Tensor:
        k, v = _split(layout.pad(kv), heads, 2)
        return _readout_within_sequences(q, k, v, heads, layout)

    return recompute_in_backward(attend, q, kv)


def fusion_attention(
    qkv: Tensor, position: Tensor | None, heads: int, layout: SequenceLayout
) -> tuple[Tensor, Tensor]:
    """`self_attention`, and the attention of each grouped readout row over its whole group, n' w.

    Args:
        position: f' w, f' >= f, added to the keys of the f-th sequence of a group as the group sees them.
    """

    def attend(qkv: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = _split(layout.pad(qkv), heads, 3)  # n h l c
        local = layout.unpad(_join(_within_sequences(q, k, v, layout)))
        assert layout.readout is not None, "groups have readout rows"
        q, k, v = (part[layout.ungrouped :] for part in (q, k, v))
        readout = layout.readout[layout.ungrouped :]
        queries = q[torch.arange(q.shape[0], device=q.device), :, readout]  # n' h c
        return local, _across_groups(queries, k, v, position, layout)

    return recompute_in_backward(attend, qkv, position)


def fusion_readout_attention(
    q: Tensor, kv: Tensor, position: Tensor | None, heads: int, layout: SequenceLayout
) -> tuple[Tensor, Tensor]:
    """`readout_attention`, n w, and the same rows over their whole groups, n' w."""

    def attend(q: Tensor, kv: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor]:
        k, v = _split(layout.pad(kv), heads, 2)
        local = _readout_within_sequences(q, k, v, heads, layout)
        k, v = k[layout.ungrouped :], v[layout.ungrouped :]
        queries = q[layout.ungrouped :].unflatten(-1, (heads, -1))  # n' h c
        return local, _across_groups(queries, k, v, position, layout)

    return recompute_in_backward(attend, q, kv, position)


def _within_sequences(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
    """n h l c."""
    return attention(
        q, k, v, mask=_key_mask(layout), bias=size_bias(layout.key_sizes, q), causal=layout.causal
    )


def _readout_within_sequences(q: Tensor, k: Tensor, v: Tensor, heads: int, layout: SequenceLayout) -> Tensor:
    """n w."""
    (queries,) = _split(q[:, None], heads, 1)  # n h 1 c
    mask = _key_mask(layout)
    if layout.causal:
        assert layout.readout is not None, "the last block has readout rows"
        earlier = torch.arange(k.shape[2], device=k.device) <= layout.readout[:, None]  # n l
        mask = earlier[:, None, None] if mask is None else mask & earlier[:, None, None]
    return _join(attention(queries, k, v, mask=mask, bias=size_bias(layout.key_sizes, q)))[:, 0]


def _across_groups(
    queries: Tensor, k: Tensor, v: Tensor, position: Tensor | None, layout: SequenceLayout
) -> Tensor:
    """Queries n' h c over the n' h l c of their group, n' w."""
    group, mask = layout.group, layout.fusion_key_mask
    if mask is None and layout.packing is not None:
        mask = layout.packing.mask
    if mask is not None:
        mask = mask[layout.ungrouped :].unflatten(0, (-1, group)).flatten(1)[:, None, None, :]  # b 1 1 (f l)
    if position is not None:
        k = k + _group_position(position, group, k).to(k.dtype)
    k, v = (x.unflatten(0, (-1, group)).transpose(1, 2).flatten(2, 3) for x in (k, v))  # b h (f l) c
    queries = queries.unflatten(0, (-1, group)).transpose(1, 2)  # b h f c
    bias = size_bias(layout.key_sizes, queries)
    if bias is not None:
        bias = bias[layout.ungrouped :].unflatten(0, (-1, group)).movedim(1, 3).flatten(3)  # b 1 1 (f l)
    return _join(attention(queries, k, v, mask=mask, bias=bias)).flatten(0, 1)


def _group_position(position: Tensor, group: int, k: Tensor) -> Tensor:
    """The position of each sequence in its group, shaped as keys: n' h 1 c."""
    if group > len(position):
        raise ValueError(f"frames: expected at most {len(position)} with positions, got {group}")
    table = position[:group].unflatten(-1, (k.shape[1], -1))  # f h c
    return table.repeat(k.shape[0] // group, 1, 1)[:, :, None]


def _key_mask(layout: SequenceLayout) -> Tensor | None:
    """key_mask in the shape of scores, n 1|h 1 l."""
    mask = layout.key_mask
    return None if mask is None else (mask[:, None] if mask.dim() == 2 else mask)[:, :, None]


def _split(x: Tensor, heads: int, parts: int) -> list[Tensor]:
    """n l (k w) -> k tensors n h l c."""
    x = x.unflatten(-1, (parts, heads, -1))  # n l k h c
    return [part.transpose(1, 2) for part in x.unbind(2)]


def _join(x: Tensor) -> Tensor:
    """n h l c -> n l w."""
    return x.transpose(1, 2).flatten(2)
