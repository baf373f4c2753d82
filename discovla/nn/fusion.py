"""Image-Video Features Fusion: attention blocks in which the frames of a video see each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from discovla.nn import padded_attention
from discovla.nn.block import QKV, Attention, BlockShape
from discovla.nn.layers import Linear, ReadoutAdapter, quick_gelu
from discovla.nn.layout import SequenceLayout
from discovla.nn.recompute import take_rows
from discovla.ops.fusion_norm import AdapterWeights
from discovla.ops.readout_attention import readout_attention
from discovla.ops.temporal_fusion import FrameGroups, temporal_fusion

MAX_FRAMES = 128  # rows of the table of frame positions


class Adapter(nn.Module):
    """up(quick_gelu(down z)), a rank-r bottleneck without a skip; `up` starts at zero."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = Linear(width, rank), Linear(rank, width)
        bound = (6 / (width + rank)) ** 0.5
        nn.init.uniform_(self.down.weight, -bound, bound)
        nn.init.normal_(self.down.bias, std=1e-6)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(quick_gelu(self.down(x)))

    @property
    def weights(self) -> AdapterWeights:
        """The parameters as `ops.fusion_norm` takes them."""
        down, up = self.down, self.up
        return AdapterWeights(down=down.weight, down_bias=down.bias, up=up.weight, up_bias=up.bias)


class FusionAttention(Attention):
    """Self-attention whose readout rows see every sequence of their group: Image-Video Features Fusion.

    Let o_f be the ordinary attention output of sequence f, q_f its queries, rho_f its readout row (CLS or
    EOT) and K, V the keys and values of all sequences of the group.  The readout row becomes

        A(o_f[rho_f]) + out(softmax(q_f[rho_f] Kᵀ / sqrt(c) + log fusion_key_mask) V)

    with A the `Adapter`; the other rows keep o_f.  The adapter has no skip and starts at zero, so an
    untrained readout row holds the attention over its group only.  Sequences without a group
    (`SequenceLayout.ungrouped`, or all if `group` is 0) keep o_f.

    The map above does not depend on the order of the group's sequences.  With `positions` the keys of
    sequence f, as its group sees them, are K_f + frame_position[f]; this table starts at zero.

    Source: DiscoVLA (arXiv 2506.08887), Image-Video Features Fusion; details as in its code.
    """

    fuses = True

    def __init__(self, shape: BlockShape, rank: int, *, positions: bool = False) -> None:
        super().__init__(shape)
        self.adapter = Adapter(shape.width, rank)
        table = nn.Parameter(torch.zeros(MAX_FRAMES, shape.width))
        self.frame_position = table if positions else None

    def attend(self, qkv: QKV, layout: SequenceLayout) -> Tensor:
        """The update of all rows; kernels leave the adapter to `LayerNorm.add`, see `readout_adapter`."""
        if not layout.group:
            return super().attend(qkv, layout)
        if layout.readout_impl == "torch":
            return self._attend_padded(qkv, layout)
        if isinstance(qkv, tuple):
            q, kv = qkv
            readout = self.readout(kv, layout)
            fused = readout_attention(q, kv, readout, position=self.frame_position, impl=layout.impl)
        else:
            groups = self._groups(qkv, layout)
            fused = temporal_fusion(qkv, groups, position=self.frame_position, impl=layout.impl)
        return self.output(fused)

    def readout_adapter(self, x: Tensor, layout: SequenceLayout) -> ReadoutAdapter | None:
        if not layout.group or layout.readout_impl == "torch":
            return None
        return ReadoutAdapter(
            weights=self.adapter.weights, readout_index=layout.readout_index(x), ungrouped=layout.ungrouped
        )

    def _attend_padded(self, qkv: QKV, layout: SequenceLayout) -> Tensor:
        if isinstance(qkv, tuple):
            local, group = padded_attention.fusion_readout_attention(
                *qkv, self.frame_position, self.heads, layout
            )
            ungrouped, grouped = self.output(local).tensor_split([layout.ungrouped])
            fused = self.adapter(grouped) + self.output(group)
            return torch.cat([ungrouped, fused]) if ungrouped.shape[0] else fused
        local, group = padded_attention.fusion_attention(qkv, self.frame_position, self.heads, layout)
        local = self.output(local)
        rows, readout = local.flatten(0, -2), layout.readout_rows(local.shape[1])[layout.ungrouped :]
        fused = self.adapter(take_rows(rows, readout)) + self.output(group)
        return rows.index_copy(0, readout, fused).view(local.shape)

    def _groups(self, qkv: Tensor, layout: SequenceLayout) -> FrameGroups:
        """The layout as the kernel takes it."""
        readout = layout.readout_rows(qkv.shape[1])[layout.ungrouped :]
        return FrameGroups(
            heads=self.heads,
            readout_rows=readout.unflatten(0, (-1, layout.group)),
            ungrouped=layout.ungrouped,
            packing=layout.packing,
            causal=layout.causal,
            key_mask=layout.mask_rows(layout.key_mask),
            group_mask=layout.mask_rows(layout.fusion_key_mask),
        )
