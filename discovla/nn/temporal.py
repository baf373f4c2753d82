"""Parts that let the frames of a video (or the frame captions of a sample) look at each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from discovla.nn.transformer import Attention, BlockShape, Linear, Sequences, attend, quick_gelu
from discovla.ops.attention import attention

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


class FusionAttention(Attention):
    """Self-attention whose readout rows see every sequence of their group: Image-Video Features Fusion.

    Let o_f be the ordinary attention output of sequence f, q_f its queries, rho_f its readout row (CLS or
    EOT) and K, V the keys and values of all sequences of the group.  The readout row becomes

        A(o_f[rho_f]) + out(softmax(q_f[rho_f] Kᵀ / sqrt(c) + log fusion_key_mask) V)

    with A the `Adapter`; the other rows keep o_f.  The adapter has no skip and starts at zero, so an
    untrained readout row holds the global attention alone.  Sequences that stand alone (group 0) take the
    ordinary path.

    The map above is blind to the order of the group's sequences.  With `positions` the keys that `read_group`
    sees of sequence f are K_f + frame_position[f], a table of our own that starts at zero.

    Source: DiscoVLA (arXiv 2506.08887), Image-Video Features Fusion; details as in its code.
    """

    def __init__(self, shape: BlockShape, rank: int, *, positions: bool = False) -> None:
        super().__init__(shape)
        self.adapter = Adapter(shape.width, rank)
        table = nn.Parameter(torch.zeros(FRAME_POSITIONS, shape.width))
        self.frame_position = table if positions else None

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        q, k, v = self.project(x)  # n h l c
        local = self.merge(attend(q, k, v, sequences))  # n l w
        if not sequences.group:
            return local
        if sequences.readout is None:
            raise ValueError("sequences.readout: expected the row to fuse of each sequence, got None")
        rows, readout = torch.arange(len(x), device=x.device), sequences.readout
        fused = self.adapter(local[rows, readout]) + self.read_group(q[rows, :, readout], k, v, sequences)
        return local.index_put((rows, readout), fused)

    def read_group(self, queries: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        """Each sequence's query (n h c) over the tokens of its whole group: n w."""
        group = sequences.group
        mask = sequences.fusion_key_mask
        if self.frame_position is not None:
            k = k + self.position_of(group, len(k)).to(k.dtype)
        read = attention(
            queries.unflatten(0, (-1, group)).transpose(1, 2),  # b h f c
            _join(k, group),
            _join(v, group),
            mask=None if mask is None else mask.unflatten(0, (-1, group)).flatten(1)[:, None, None, :],
        )  # b h f c
        return self.merge(read).flatten(0, 1)

    def position_of(self, group: int, sequences: int) -> Tensor:
        """The position of each of n sequences in its group, shaped as keys: n h 1 c."""
        assert self.frame_position is not None, "asked for where there are positions only"
        if group > len(self.frame_position):
            raise ValueError(
                f"frames: expected at most {len(self.frame_position)} with positions, got {group}"
            )
        table = self.frame_position[:group].unflatten(-1, (self.heads, -1))  # f h c
        return table.repeat(sequences // group, 1, 1)[:, :, None]


def _join(x: Tensor, group: int) -> Tensor:
    """n h l c -> b h (f l) c, the sequences of a group end to end."""
    return x.unflatten(0, (-1, group)).transpose(1, 2).flatten(2, 3)
