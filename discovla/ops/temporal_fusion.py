"""Attention within frames, and of their readout rows across all frames of a group, on packed rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.attention import attention
from discovla.ops.blocks import expect_mask, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.short_attention import Packing, short_attention_reference


@dataclass(frozen=True, kw_only=True)
class FrameGroups:
    """b groups of f neighbouring sequences: the frames of a video, or the captions of its frames.

    readout_rows: b f, int64, the row of each sequence (CLS or EOT) that attends to its whole group, counted
        among all rows (n l flattened, or r).
    packing: layout of packed rows; None for n l.
    causal, key_mask: within a sequence, as in `short_attention`.
    group_mask: n l (or r), bool, true on rows visible across the group; None for all.
    ungrouped: number of sequences before the groups; they have attention within themselves only.
    """

    heads: int
    readout_rows: Tensor
    packing: Packing | None = None
    causal: bool = False
    key_mask: Tensor | None = None
    group_mask: Tensor | None = None
    ungrouped: int = 0


def temporal_fusion(
    qkv: Tensor, groups: FrameGroups, *, position: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """o_f = attention within sequence f; g_f = softmax(q_f[rho_f] Kᵀ / sqrt(c) + log group_mask) V.

    rho_f is the readout row; K = k + position of f, and V, hold all sequences of the group.  The output
    projection takes both results in one tensor, without a copy; `fusion_norm` then applies the adapter to
    the second and adds it to the first: Image-Video Features Fusion.

    Args:
        qkv: n l 3w, or r 3w with packing, as in `short_attention`.
        groups: which rows belong together.
        position: f' w, f' >= f, added to the keys of the f-th sequence as its group sees them.
        impl: reference (plain torch), torch (its fused attention), triton, one that `short_attention` takes
            within sequences while torch's fused attention reads across them, or auto.

    Returns:
        (r + b f) w, in the dtype of qkv: all rows, holding o_f, but g_f in readout rows; then o_f[rho_f] of
        the b f readout rows.  0 for a query that sees no key.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: DiscoVLA (arXiv 2506.08887), Image-Video Features Fusion.
    """
    _check(qkv, groups, position)
    offsets, length = None, qkv.shape[-2]
    if groups.packing is not None:
        offsets, length = groups.packing.offsets, groups.packing.max_length
    key_mask, group_mask = (None if m is None else m.flatten() for m in (groups.key_mask, groups.group_mask))
    position = None if position is None else position[: groups.readout_rows.shape[1]].contiguous()
    operands = (qkv.unflatten(-1, (3, groups.heads, -1)), groups.readout_rows, offsets, key_mask, group_mask)
    chosen = choose("temporal_fusion", impl, qkv.device.type, operands=operands)
    if chosen != "triton":
        return temporal_fusion_reference(qkv, groups, position, chosen)
    rows = qkv.reshape(-1, qkv.shape[-1]).contiguous()
    return _temporal_fusion(
        rows, groups.readout_rows.contiguous(), offsets, key_mask, group_mask, position, groups.heads, length,
        groups.causal, groups.ungrouped,
    )[0]  # fmt: skip


def temporal_fusion_reference(
    qkv: Tensor, groups: FrameGroups, position: Tensor | None, impl: str = "reference"
) -> Tensor:
    """The formula, with packed sequences padded to the longest; impl: of `short_attention`."""
    readout_rows, packing = groups.readout_rows, groups.packing
    local = short_attention_reference(qkv, groups.heads, packing, groups.causal, groups.key_mask, impl)
    rows, queries = local.flatten(0, -2), qkv.flatten(0, -2)[readout_rows]  # b f 3w
    visible = groups.group_mask
    if packing is not None:
        qkv = qkv[packing.pad_index]
        visible = packing.mask if visible is None else visible[packing.pad_index] & packing.mask
    width = local.shape[-1]
    if visible is not None:
        visible = visible[groups.ungrouped :].unflatten(0, readout_rows.shape)
    kv = qkv[groups.ungrouped :, :, width:].unflatten(0, readout_rows.shape)  # b f l 2w
    fused = attend_across_groups(queries[..., :width], kv, visible, position, groups.heads, impl)
    index = readout_rows.flatten()
    return torch.cat([rows.index_copy(0, index, fused.flatten(0, 1)), rows[index]])


def attend_across_groups(
    q: Tensor, kv: Tensor, visible: Tensor | None, position: Tensor | None, heads: int, impl: str
) -> Tensor:
    """Attention of queries b f w over all rows of their group, kv: b f l 2w; visible: b f l, bool."""
    (b, f), (k, v) = q.shape[:2], kv.unflatten(-1, (2, -1)).unbind(-2)  # b f l w
    k = k if position is None else k + position[:f, None].to(k.dtype)
    k, v = (x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (k, v))  # b h (f l) c
    any_visible, mask = torch.ones((), dtype=torch.bool, device=q.device), None
    if visible is not None:
        mask = visible.reshape(b, 1, 1, -1)
        any_visible = mask.any(-1, keepdim=True)
        mask = mask | ~any_visible
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # b h f c
    out = attention(q, k, v, mask=mask, impl="reference" if impl == "reference" else "torch") * any_visible
    return out.transpose(1, 2).flatten(2)


def _check(qkv: Tensor, groups: FrameGroups, position: Tensor | None) -> None:
    width, packing = qkv.shape[-1] // 3, groups.packing
    if qkv.ndim != (3 if packing is None else 2) or 3 * width != qkv.shape[-1] or width % groups.heads:
        shape = f"{'n l' if packing is None else 'r'} 3w, w a multiple of {groups.heads} heads"
        raise ValueError(f"qkv: expected {shape}, found {tuple(qkv.shape)}")
    n = len(qkv) if packing is None else len(packing.offsets) - 1
    grouped, readout_rows = n - groups.ungrouped, groups.readout_rows
    if readout_rows.ndim != 2 or readout_rows.numel() != grouped or readout_rows.dtype != torch.int64:
        actual = f"{readout_rows.dtype} of shape {tuple(readout_rows.shape)}"
        raise ValueError(f"readout_rows: expected int64, b f of {grouped} sequences, found {actual}")
    expect_mask("key_mask", groups.key_mask, tuple(qkv.shape[:-1]))
    expect_mask("group_mask", groups.group_mask, tuple(qkv.shape[:-1]))
    expect_position(position, width, readout_rows.shape[1])


def expect_position(position: Tensor | None, width: int, frames: int) -> None:
    """Raise ValueError unless there is a row of `width` for each of `frames`."""
    if position is not None and (position.shape[1:] != (width,) or len(position) < frames):
        shape = f"at least {frames} rows {width} wide"
        raise ValueError(f"position: expected {shape}, found {tuple(position.shape)}")


@torch.library.custom_op("discovla::temporal_fusion", mutates_args=())
def _temporal_fusion(
    qkv: Tensor,
    readout_rows: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    heads: int,
    length: int,
    causal: bool,
    ungrouped: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r + n) w; then, for backward, g_f in float32 at least, n w, and its log-sum-exp, n h."""
    return kernel("temporal_fusion").forward(
        qkv, readout_rows, offsets, key_mask, group_mask, position, heads, length, causal, ungrouped
    )


@_temporal_fusion.register_fake
def _(qkv, readout_rows, offsets, key_mask, group_mask, position, heads, length, causal, ungrouped):
    n, width = readout_rows.numel(), qkv.shape[1] // 3
    out = qkv.new_empty(len(qkv) + n, width)
    return out, qkv.new_empty(n, width, dtype=sum_dtype(qkv)), qkv.new_empty(n, heads, dtype=sum_dtype(qkv))


@torch.library.custom_op("discovla::temporal_fusion_backward", mutates_args=())
def _temporal_fusion_backward(
    grad: Tensor,
    qkv: Tensor,
    readout_rows: Tensor,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    group_mask: Tensor | None,
    position: Tensor | None,
    fused: Tensor,
    lse: Tensor,
    heads: int,
    length: int,
    causal: bool,
    ungrouped: int,
) -> tuple[Tensor, Tensor]:
    """Gradients by the rows and by the positions of every group, b f w (empty without positions)."""
    return kernel("temporal_fusion").backward(
        grad.contiguous(), qkv, readout_rows, offsets, key_mask, group_mask, position, fused, lse, heads,
        length, causal, ungrouped,
    )  # fmt: skip


@_temporal_fusion_backward.register_fake
def _(grad, qkv, readout_rows, offsets, key_mask, group_mask, position, *rest):
    shape = (0, 0) if position is None else readout_rows.shape
    return torch.empty_like(qkv), qkv.new_empty(*shape, qkv.shape[1] // 3, dtype=sum_dtype(qkv))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, heads, length, causal, ungrouped = inputs
    ctx.sizes = heads, length, causal, ungrouped
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, grad, *_):
    saved = ctx.saved_tensors  # unpacked once: a checkpoint refuses a second time
    dqkv, dposition = _temporal_fusion_backward(grad, *saved, *ctx.sizes)
    position = saved[5]
    dposition = None if position is None else dposition.sum(0).to(position.dtype)
    return dqkv, None, None, None, None, dposition, None, None, None, None


_temporal_fusion.register_autograd(_backward, setup_context=_setup_context)
