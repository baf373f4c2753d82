"""Parts that let the frames of a video (or the frame captions of a sample) look at each other."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from discovla.nn.block import (
    Attended,
    Attention,
    BlockShape,
    LayerNorm,
    Linear,
    attend,
    join_heads,
    quick_gelu,
)
from discovla.nn.layout import SequenceLayout
from discovla.nn.recompute import recompute_in_backward, take_rows
from discovla.ops.attention import attention
from discovla.ops.dispatch import Impl
from discovla.ops.fusion_norm import AdapterWeights
from discovla.ops.temporal_fusion import FrameGroups, temporal_fusion

FRAME_POSITIONS = 128  # rows of a table of frame positions


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
        """As the op takes them."""
        down, up = self.down, self.up
        return AdapterWeights(down=down.weight, down_bias=down.bias, up=up.weight, up_bias=up.bias)


class FusionAttention(Attention):
    """Self-attention whose readout rows see every sequence of their group: Image-Video Features Fusion.

    Let o_f be the ordinary attention output of sequence f, q_f its queries, rho_f its readout row (CLS or
    EOT) and K, V the keys and values of all sequences of the group.  The readout row becomes

        A(o_f[rho_f]) + out(softmax(q_f[rho_f] Kᵀ / sqrt(c) + log fusion_key_mask) V)

    with A the `Adapter`; the other rows keep o_f.  The adapter has no skip and starts at zero, so an
    untrained readout row holds the global attention alone.  Sequences outside any group
    (`SequenceLayout.alone`, or all where group is 0) keep o_f.

    The map above is blind to the order of the group's sequences.  With `positions` the keys that `read_group`
    sees of sequence f are K_f + frame_position[f], a table of our own that starts at zero.

    Source: DiscoVLA (arXiv 2506.08887), Image-Video Features Fusion; details as in its code.
    """

    fuses = True

    def __init__(self, shape: BlockShape, rank: int, *, positions: bool = False) -> None:
        super().__init__(shape)
        self.adapter = Adapter(shape.width, rank)
        table = nn.Parameter(torch.zeros(FRAME_POSITIONS, shape.width))
        self.frame_position = table if positions else None

    def forward(self, x: Tensor, sequences: SequenceLayout, norm: LayerNorm | None = None) -> Tensor:
        if not sequences.group:
            return super().forward(x, sequences, norm)
        if sequences.pruned:
            attend_read = partial(self.attend_read_of_group, sequences)
            q, kv = self.project_read(x, sequences, norm)
            local, group = recompute_in_backward(attend_read, q, kv, self.frame_position)
            local, grouped = self.out(local).tensor_split([sequences.alone])
            return beside(local, self.adapter(grouped) + self.out(group))
        attend = partial(self.attend_of_group, sequences)
        local, group = recompute_in_backward(attend, self.project(x, norm), self.frame_position)
        rows, ends = self.out(local).flatten(0, -2), sequences.ends(x.shape[1])[sequences.alone :]
        fused = self.adapter(take_rows(rows, ends)) + self.out(group)
        return rows.index_copy(0, ends, fused).view(x.shape)

    def chain(
        self, rows: tuple[Tensor, Tensor | None], norm: LayerNorm, sequences: SequenceLayout, impl: Impl
    ) -> Attended:
        if not sequences.group:
            return super().chain(rows, norm, sequences, impl)
        x, parts = self.projections(rows, norm, sequences, impl)
        if sequences.pruned:
            update = self.read_rows(parts, sequences, impl, self.frame_position)
            return x, self.out(update), self.adapter.weights
        groups = FrameGroups(
            heads=self.heads,
            readout_rows=sequences.ends(x.shape[1])[sequences.alone :].unflatten(0, (-1, sequences.group)),
            ungrouped=sequences.alone,
            packing=sequences.packing,
            causal=sequences.causal,
            key_mask=sequences.of_rows(sequences.key_mask),
            group_mask=sequences.of_rows(sequences.fusion_key_mask),
        )
        update = temporal_fusion(parts[0], groups, position=self.frame_position, impl=impl)
        return x, self.out(update), self.adapter.weights

    def attend_of_group(
        self, sequences: SequenceLayout, qkv: Tensor, position: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Every row within its sequence, as `project` gave them, and readout rows in their groups, n w."""
        q, k, v = self.split(sequences.pad(qkv))  # n h l c
        local = sequences.unpad(join_heads(attend(q, k, v, sequences)))
        assert sequences.readout is not None, "rows were read by it"
        q, k, v = (part[sequences.alone :] for part in (q, k, v))
        queries = q[torch.arange(len(q), device=q.device), :, sequences.readout[sequences.alone :]]  # n h c
        return local, self.read_group(queries, k, v, sequences, position)

    def attend_read_of_group(
        self, sequences: SequenceLayout, q: Tensor, kv: Tensor, position: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each readout row within its sequence, and those of groups in their group; of `project_read`."""
        k, v = (part[sequences.alone :] for part in self.split(sequences.pad(kv)))
        queries = q[sequences.alone :].unflatten(-1, (self.heads, -1))  # n h c
        return self.attend_read(sequences, q, kv), self.read_group(queries, k, v, sequences, position)

    def read_group(
        self, queries: Tensor, k: Tensor, v: Tensor, sequences: SequenceLayout, position: Tensor | None = None
    ) -> Tensor:
        """Each grouped sequence's query (n h c) over the tokens of its whole group, n w before projection.

        position: rows to add to the keys of the frames of a group, f' w with f' >= f.
        """
        group, mask = sequences.group, sequences.across
        mask = None if mask is None else mask[sequences.alone :]
        if position is not None:
            k = k + self.position_of(position, group, len(k)).to(k.dtype)
        read = attention(
            queries.unflatten(0, (-1, group)).transpose(1, 2),  # b h f c
            _join(k, group),
            _join(v, group),
            mask=None if mask is None else mask.unflatten(0, (-1, group)).flatten(1)[:, None, None, :],
        )  # b h f c
        return join_heads(read).flatten(0, 1)

    def position_of(self, position: Tensor, group: int, sequences: int) -> Tensor:
        """The position of each of n sequences in its group, shaped as keys: n h 1 c."""
        if group > len(position):
            raise ValueError(f"frames: expected at most {len(position)} with positions, got {group}")
        table = position[:group].unflatten(-1, (self.heads, -1))  # f h c
        return table.repeat(sequences // group, 1, 1)[:, :, None]


def beside(alone: Tensor, grouped: Tensor) -> Tensor:
    """Rows of sequences that stand alone, if any, and after them those of groups."""
    return torch.cat([alone, grouped]) if len(alone) else grouped


def _join(x: Tensor, group: int) -> Tensor:
    """n h l c -> b h (f l) c, the sequences of a group end to end."""
    return x.unflatten(0, (-1, group)).transpose(1, 2).flatten(2, 3)
