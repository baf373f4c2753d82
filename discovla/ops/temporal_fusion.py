"""Attention within frames, and of their readout rows across all frames of a group, on packed rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.attention import attention
from discovla.ops.blocks import wide
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.short_attention import Packing, expect_mask, short_attention_reference


@dataclass(frozen=True, kw_only=True)
class Groups:
    """b f of n sequences in b groups of neighbours: the frames of a video, or the captions of its frames.

    readout: b f, int64: among all rows (n l flattened, or r), the one of each sequence that sees its group.
    packing: where the sequences are in r rows; None where all have l of n l.
    causal, key_mask: within a sequence, as in `short_attention`.
    group_mask: n l (or r), bool, true on rows that may be seen across the group; None where all may.
    alone: how many sequences come before the groups and have none; attention within them is all they get.
    """

    heads: int
    readout: Tensor
    packing: Packing | None = None
    causal: bool = False
    key_mask: Tensor | None = None
    group_mask: Tensor | None = None
    alone: int = 0


def temporal_fusion(
    qkv: Tensor, groups: Groups, *, position: Tensor | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """o_f = attention within sequence f; g_f = softmax(q_f[rho_f] Kᵀ / sqrt(c) + log group_mask) V.

    rho_f is the readout row; K = k + position of f, and V, are those of all sequences of the group.  Rows
    come back holding o_f, but g_f in the readout rows, whose own o_f[rho_f] comes beside them.  Both then
    pass the output projection, and the adapter's result for the second is added to the first
    (`layer_norm`'s `added`): Image-Video Features Fusion, in which no row is copied.

    Args:
        qkv: n l 3w, or r 3w with packing, as in `short_attention`.
        groups: which rows belong together.
        position: f' w, f' >= f, added to the keys of the f-th sequence as its group sees them.
        impl: reference (plain torch), torch (its fused attention), triton, or auto.

    Returns:
        rows n l w (or r w) and b f w, in the dtype of qkv; 0 where a query may see no key.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: DiscoVLA (arXiv 2506.08887), Image-Video Features Fusion.
    """
    shape, readout = (*qkv.shape[:-1], qkv.shape[-1] // 3), groups.readout
    found = temporal_fusion_rows(qkv, groups, position=position, impl=impl)
    rows, own = found.split([len(found) - readout.numel(), readout.numel()])
    return rows.view(shape), own.unflatten(0, readout.shape)


def temporal_fusion_rows(
    qkv: Tensor, groups: Groups, *, position: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """Both results of `temporal_fusion` end to end, (r + b f) w, as one output projection takes them."""
    _check(qkv, groups, position)
    offsets, length = None, qkv.shape[-2]
    if groups.packing is not None:
        offsets, length = groups.packing.offsets, groups.packing.longest
    masks = [None if m is None else m.flatten() for m in (groups.key_mask, groups.group_mask)]
    position = None if position is None else position[: groups.readout.shape[1]].contiguous()
    operands = (qkv.unflatten(-1, (3, groups.heads, -1)), groups.readout, offsets, *masks)
    chosen = choose("temporal_fusion", impl, qkv.device.type, operands=operands)
    if chosen != "triton":
        return torch.cat(temporal_fusion_reference(qkv, groups, position, chosen))
    rows = qkv.reshape(-1, qkv.shape[-1]).contiguous()
    readout = groups.readout.contiguous()
    sizes = (groups.heads, length, groups.causal, groups.alone)
    arguments = (rows, readout, offsets, *masks, position, *sizes)
    return _temporal_fusion(*arguments)[0]


def temporal_fusion_reference(
    qkv: Tensor, groups: Groups, position: Tensor | None, impl: str = "reference"
) -> tuple[Tensor, Tensor]:
    """The formula, r w and (b f) w, of packed sequences padded to the longest; impl: of `attention`."""
    readout, packing = groups.readout, groups.packing
    local = short_attention_reference(qkv, groups.heads, packing, groups.causal, groups.key_mask, impl)
    rows, queries = local.flatten(0, -2), qkv.flatten(0, -2)[readout]  # b f 3w
    seen = groups.group_mask
    if packing is not None:
        real = packing.real
        qkv, seen = qkv[packing.places], real if seen is None else seen[packing.places] & real
    width = local.shape[-1]
    seen = None if seen is None else seen[groups.alone :].unflatten(0, readout.shape)
    pairs = qkv[groups.alone :, :, width:].unflatten(0, readout.shape)  # b f l 2w
    read = read_groups(queries[..., :width], pairs, seen, position, groups.heads, impl)
    return rows.index_copy(0, readout.flatten(), read.flatten(0, 1)), rows[readout.flatten()]


def read_groups(
    q: Tensor, kv: Tensor, seen: Tensor | None, position: Tensor | None, heads: int, impl: str
) -> Tensor:
    """What queries b f w read of all rows of their group, kv: b f l 2w, b f w; seen: b f l, bool."""
    (b, f), (k, v) = q.shape[:2], kv.unflatten(-1, (2, -1)).unbind(-2)  # b f l w
    k = k if position is None else k + position[:f, None].to(k.dtype)
    k, v = (x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (k, v))  # b h (f l) c
    some, mask = torch.ones((), dtype=torch.bool, device=q.device), None
    if seen is not None:
        mask = seen.reshape(b, 1, 1, -1)
        some = mask.any(-1, keepdim=True)
        mask = mask | ~some
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # b h f c
    read = attention(q, k, v, mask=mask, impl="torch" if impl == "torch" else "reference") * some
    return read.transpose(1, 2).flatten(2)


def _check(qkv: Tensor, groups: Groups, position: Tensor | None) -> None:
    width, packing = qkv.shape[-1] // 3, groups.packing
    if qkv.ndim != (3 if packing is None else 2) or 3 * width != qkv.shape[-1] or width % groups.heads:
        wanted = f"{'n l' if packing is None else 'r'} 3w, w a multiple of {groups.heads} heads"
        raise ValueError(f"qkv: expected {wanted}, found {tuple(qkv.shape)}")
    n = len(qkv) if packing is None else len(packing.offsets) - 1
    grouped, readout = n - groups.alone, groups.readout
    if readout.ndim != 2 or readout.numel() != grouped or readout.dtype != torch.int64:
        found = f"{readout.dtype} of shape {tuple(readout.shape)}"
        raise ValueError(f"readout: expected int64, b f of {grouped} sequences, found {found}")
    expect_mask("key_mask", groups.key_mask, tuple(qkv.shape[:-1]))
    expect_mask("group_mask", groups.group_mask, tuple(qkv.shape[:-1]))
    frames = groups.readout.shape[1]
    if position is not None and (position.shape[1:] != (width,) or len(position) < frames):
        wanted = f"{width} wide and at least {frames} long"
        raise ValueError(f"position: expected it {wanted}, found {tuple(position.shape)}")


@torch.library.custom_op("discovla::temporal_fusion", mutates_args=())
def _temporal_fusion(
    qkv: Tensor,
    readout: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    alone: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows r w and own n w end to end; for backward what the readout rows read, n w, and its lse, n h."""
    others = (offsets, key_mask, group_mask, position)
    return kernel("temporal_fusion").forward(qkv, readout, others, (heads, length, causal, alone))


@_temporal_fusion.register_fake
def _(qkv, readout, offsets, key_mask, group_mask, position, heads, length, causal, alone):
    n, width = readout.numel(), qkv.shape[1] // 3
    out = qkv.new_empty(len(qkv) + n, width)
    return out, qkv.new_empty(n, width, dtype=wide(qkv)), qkv.new_empty(n, heads, dtype=wide(qkv))


@torch.library.custom_op("discovla::temporal_fusion_backward", mutates_args=())
def _temporal_fusion_backward(
    grad: Tensor,
    qkv: Tensor,
    readout: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    read: Tensor,
    lse: Tensor,
    heads: int,
    length: int,
    causal: bool,
    alone: int,
) -> tuple[Tensor, Tensor]:
    """Gradients by the rows and, of each group, by the positions, b f w (empty without)."""
    others = (offsets, key_mask, group_mask, position)
    sizes = (heads, length, causal, alone)
    return kernel("temporal_fusion").backward(grad.contiguous(), qkv, readout, others, (read, lse), sizes)


@_temporal_fusion_backward.register_fake
def _(
    grad, qkv, readout, offsets, key_mask, group_mask, position, read, lse, heads, length, causal,
    alone,
):  # fmt: skip
    shape = (0, 0) if position is None else readout.shape
    return torch.empty_like(qkv), qkv.new_empty(*shape, qkv.shape[1] // 3, dtype=wide(qkv))


def _keep(ctx, inputs, output) -> None:
    *tensors, heads, length, causal, alone = inputs
    ctx.sizes = heads, length, causal, alone
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx, grad, *_):
    """What the readout rows read is kept for backward alone: nobody differentiates it."""
    saved = ctx.saved_tensors  # once: a checkpoint refuses to unpack them a second time
    dqkv, dposition = _temporal_fusion_backward(grad, *saved, *ctx.sizes)
    position = saved[5]
    dposition = None if position is None else dposition.sum(0).to(position.dtype)
    return dqkv, None, None, None, None, dposition, None, None, None, None


_temporal_fusion.register_autograd(_differentiate, setup_context=_keep)
