"""Attention of one query a sequence, as the last block of a tower needs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.attention import attention
from discovla.ops.blocks import expect_shape, wide
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.short_attention import Packing, expect_mask
from discovla.ops.temporal_fusion import read_groups


@dataclass(frozen=True, kw_only=True)
class Readout:
    """n sequences of which one row each is read.

    ends: n, int64: among all rows (n l flattened, or r), the one of each sequence.
    group: how many neighbouring sequences see each other; 0 for none.
    alone: with groups, how many sequences come before them and have none.
    packing: where the sequences are in r rows; None where all have l of n l.
    causal, key_mask: within a sequence, as in `short_attention`.
    group_mask: n l (or r), bool, true on rows that may be seen across the group; None where all may.
    """

    heads: int
    ends: Tensor
    group: int = 0
    alone: int = 0
    packing: Packing | None = None
    causal: bool = False
    key_mask: Tensor | None = None
    group_mask: Tensor | None = None

    @property
    def first(self) -> int:
        """How many sequences have no group."""
        return self.alone if self.group else len(self.ends)


def readout_attention(
    q: Tensor, kv: Tensor, readout: Readout, *, position: Tensor | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """o_f = attention of query f within its sequence; g_f = softmax(q_f Kᵀ / sqrt(c) + log group_mask) V.

    K = k + position of f, and V, are those of all sequences of the group: what `temporal_fusion` gives in
    readout rows.  The kernel keeps nothing for backward beside its inputs.

    Args:
        q: n w, the query of each sequence, of `heads` heads of c = w / heads channels.
        kv: n l 2w, a row holding keys and values; or r 2w with packing.
        readout: which rows belong together.
        position: f' w, f' >= f, added to the keys of the f-th sequence as its group sees them.
        impl: reference (plain torch), torch (its fused attention), triton, or auto.

    Returns:
        n w, holding g_f, or o_f of sequences without a group; and o_f of the others, n' w.  0 where a query
        may see no key.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: DiscoVLA (arXiv 2506.08887), Image-Video Features Fusion.
    """
    found = readout_attention_rows(q, kv, readout, position=position, impl=impl)
    rows, own = found.split([len(q), len(found) - len(q)])
    return rows, own


def readout_attention_rows(
    q: Tensor, kv: Tensor, readout: Readout, *, position: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """Both results of `readout_attention` end to end, (n + n') w, as one output projection takes them."""
    _check(q, kv, readout, position)
    offsets, length = None, kv.shape[-2]
    if readout.packing is not None:
        offsets, length = readout.packing.offsets, readout.packing.longest
    masks = [None if m is None else m.flatten() for m in (readout.key_mask, readout.group_mask)]
    position = None if position is None or not readout.group else position[: readout.group].contiguous()
    heads = q.unflatten(-1, (readout.heads, -1)), kv.unflatten(-1, (2, readout.heads, -1))
    members = readout.ends[readout.first :].unflatten(0, (-1, max(1, readout.group)))
    operands = (*heads, members, offsets, *masks)
    chosen = choose("readout_attention", impl, q.device.type, operands=operands)
    if chosen != "triton":
        return torch.cat(readout_attention_reference(q, kv, readout, position, chosen))
    rows, ends = kv.reshape(-1, kv.shape[-1]).contiguous(), readout.ends.contiguous()
    sizes = (readout.heads, length, readout.causal, readout.alone, readout.group)
    arguments = (q.contiguous(), rows, ends, offsets, *masks, position, *sizes)
    return _readout_attention(*arguments)


def readout_attention_reference(
    q: Tensor, kv: Tensor, readout: Readout, position: Tensor | None, impl: str = "reference"
) -> tuple[Tensor, Tensor]:
    """The formula of `readout_attention`, of packed sequences padded to the longest; impl: of `attention`."""
    packing, heads, first = readout.packing, readout.heads, readout.first
    masks = readout.key_mask, readout.group_mask
    if packing is None:
        starts = torch.arange(0, kv.shape[0] * kv.shape[1], kv.shape[1], device=kv.device)
        real = torch.ones(kv.shape[:2], dtype=torch.bool, device=kv.device)
    else:
        kv, starts, real = kv[packing.places], packing.offsets[:-1], packing.real
        masks = [None if mask is None else mask[packing.places] for mask in masks]
    seen, across = (real if mask is None else mask & real for mask in masks)
    if readout.causal:
        seen = seen & (torch.arange(kv.shape[1], device=kv.device) <= (readout.ends - starts)[:, None])
    k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # n h l c
    some = seen.any(-1)[:, None, None, None]
    read = attention(
        q.unflatten(-1, (heads, -1))[:, :, None],
        k,
        v,
        mask=seen[:, None, None] | ~some,
        impl="torch" if impl == "torch" else "reference",
    )
    local = (read * some)[:, :, 0].flatten(1)  # n w
    if not readout.group:
        return local, local[:0]
    queries, pairs = (x[first:].unflatten(0, (-1, readout.group)) for x in (q, kv))
    masked = across[first:].unflatten(0, (-1, readout.group))
    grouped = read_groups(queries, pairs, masked, position, heads, impl).flatten(0, 1)
    return torch.cat([local[:first], grouped]), local[first:]


def _check(q: Tensor, kv: Tensor, readout: Readout, position: Tensor | None) -> None:
    packing, group = readout.packing, readout.group
    n, width = q.shape if q.ndim == 2 else (0, 0)
    if q.ndim != 2 or width % readout.heads:
        raise ValueError(f"q: expected n w, w a multiple of {readout.heads} heads, found {tuple(q.shape)}")
    if kv.ndim != (3 if packing is None else 2) or kv.shape[-1] != 2 * width:
        wanted = f"{'n l' if packing is None else 'r'} {2 * width}"
        raise ValueError(f"kv: expected {wanted}, found {tuple(kv.shape)}")
    if n != (len(kv) if packing is None else len(packing.offsets) - 1):
        raise ValueError(f"q: expected one row a sequence, found {n}")
    expect_shape("ends", readout.ends, (n,))
    if readout.ends.dtype != torch.int64:
        raise ValueError(f"ends: expected int64, found {readout.ends.dtype}")
    if group and (n - readout.alone) % group:
        raise ValueError(f"group: expected one of which {n - readout.alone} is a multiple, found {group}")
    expect_mask("key_mask", readout.key_mask, tuple(kv.shape[:-1]))
    expect_mask("group_mask", readout.group_mask, tuple(kv.shape[:-1]))
    if position is not None and (position.shape[1:] != (width,) or len(position) < group):
        wanted = f"{width} wide and at least {group} long"
        raise ValueError(f"position: expected it {wanted}, found {tuple(position.shape)}")


@torch.library.custom_op("discovla::readout_attention", mutates_args=())
def _readout_attention(
    q: Tensor,
    kv: Tensor,
    ends: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    alone: int,
    group: int,
) -> Tensor:
    """Rows n w and n' w end to end."""
    others, sizes = (offsets, key_mask, group_mask, position), (heads, length, causal, alone, group)
    return kernel("readout_attention").forward(q, kv, ends, others, sizes)


@_readout_attention.register_fake
def _(q, kv, ends, offsets, key_mask, group_mask, position, heads, length, causal, alone, group):
    return q.new_empty(2 * len(q) - alone if group else len(q), q.shape[1])


@torch.library.custom_op("discovla::readout_attention_backward", mutates_args=())
def _readout_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    ends: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    alone: int,
    group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by queries, by rows, and of each group by the positions, n' w (empty without)."""
    others, sizes = (offsets, key_mask, group_mask, position), (heads, length, causal, alone, group)
    return kernel("readout_attention").backward(grad.contiguous(), q, kv, ends, others, sizes)


@_readout_attention_backward.register_fake
def _(grad, q, kv, ends, offsets, key_mask, group_mask, position, heads, length, causal, alone, group):
    places = 0 if position is None else len(q) - alone
    return torch.empty_like(q), torch.empty_like(kv), q.new_empty(places, q.shape[1], dtype=wide(q))


def _keep(ctx, inputs, output) -> None:
    ctx.sizes = inputs[7:]
    ctx.save_for_backward(*inputs[:7])


def _differentiate(ctx, grad):
    saved = ctx.saved_tensors  # once: a checkpoint refuses to unpack them a second time
    dq, dkv, dposition = _readout_attention_backward(grad, *saved, *ctx.sizes)
    position = saved[6]
    if position is not None:
        dposition = dposition.unflatten(0, (-1, len(position))).sum(0).to(position.dtype)
    return dq, dkv, *[None] * 4, None if position is None else dposition, *[None] * 5


_readout_attention.register_autograd(_differentiate, setup_context=_keep)
