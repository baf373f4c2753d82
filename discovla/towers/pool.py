"""Pools with attention: a learned query reads the rows of a frame."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from discovla.nn.block import MLP, BlockShape
from discovla.nn.fusion import Adapter
from discovla.nn.layers import LayerNorm, Linear
from discovla.ops.attention import attention, size_bias
from discovla.towers.architecture import Architecture

MAX_FRAMES = 128  # rows of the table of frame positions


class AttentionPool(nn.Module):
    """Attention of a learned query over all rows of a frame, then y + mlp(ln y).

    With `fuse` the query of each frame also reads the rows of all frames of its video.  Let P be the
    attention with its output projection, T_f the rows of frame f, q the learned query.  Then

        q_f = q + B(P(q; T_f)),   y_f = A(P(q_f; T_f)) + P(q_f; T_1 ... T_F)

    with adapters A and B that start at zero: an untrained pool reads the whole video, alike for each frame.
    Without `own_query` there is no B: q_f = q.
    With `positions` the keys of frame f, as the video sees them, get frame_position[f], zero at the start.

    Source: the pool is SigLIP's (arXiv 2303.15343), as timm computes it; the fusion is this project's form of
    DiscoVLA's (arXiv 2506.08887) for towers without a class row.
    """

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.latent = nn.Parameter(torch.empty(shape.width))
        self.query = Linear(shape.width, shape.width)
        self.key_value = Linear(shape.width, 2 * shape.width)
        self.out = Linear(shape.width, shape.width)
        self.ln = LayerNorm(shape.width, eps=shape.eps)
        self.mlp = MLP(shape)
        self.adapter: Adapter | None = None
        self.query_adapter: Adapter | None = None
        self.frame_position: nn.Parameter | None = None

    def fuse(self, rank: int, *, own_query: bool = True, positions: bool) -> None:
        """Add the adapters, that of the query with `own_query` alone, and positions of frames if wanted."""
        width = len(self.latent)
        self.adapter = Adapter(width, rank)
        self.query_adapter = Adapter(width, rank) if own_query else None
        if positions:
            self.frame_position = nn.Parameter(torch.zeros(MAX_FRAMES, width))

    def forward(
        self, rows: Tensor, group: int, mask: Tensor | None, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the features of frames, n w, and those of each frame by itself; the same without fusion.

        Args:
            rows: n l w, normed.  group: frames of a video, b group = n.
            mask: b f, bool, frames that the video sees; None: all.
            sizes: n l, numbers of tokens merged into each row; None: 1 each.
        """
        latent = self.latent.to(rows.dtype).expand(len(rows), -1)  # n w
        key, value = self.key_value(rows).chunk(2, -1)  # n l w
        bias = size_bias(sizes, key)
        own = self._attend(latent, key, value, bias)
        if self.adapter is None:
            own = own + self.mlp(self.ln(own))
            return own, own
        query, frame = latent, own
        if self.query_adapter is not None:
            query = latent + self.query_adapter(own)
            frame = self._attend(query, key, value, bias)
        fused = self.adapter(frame) + self._attend_video(query, key, value, bias, group, mask)
        return tuple(y + self.mlp(self.ln(y)) for y in (fused, own))

    def _attend(self, latent: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """P(q; T) of each frame, n w."""
        q, k, v = (self._split(x) for x in (self.query(latent)[:, None], key, value))  # n h l c
        return self.out(attention(q, k, v, bias=bias).transpose(1, 2).flatten(2)[:, 0])

    def _attend_video(
        self,
        latent: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        group: int,
        mask: Tensor | None,
    ) -> Tensor:
        """P(q_f; T_1 ... T_F), n w."""
        if self.frame_position is not None:
            if group > MAX_FRAMES:
                raise ValueError(f"frames: expected at most {MAX_FRAMES} with positions, got {group}")
            place = self.frame_position[:group].to(key.dtype)
            key = key + place.repeat(len(key) // group, 1)[:, None]
        grouped = (x.unflatten(0, (-1, group)).flatten(1, -2) for x in (self.query(latent), key, value))
        q, k, v = (self._split(x) for x in grouped)  # b h f c, b h (f l) c twice
        if mask is not None:
            mask = mask.repeat_interleave(key.shape[1], 1)[:, None, None]  # b 1 1 (f l)
        if bias is not None:
            bias = bias.unflatten(0, (-1, group)).movedim(1, 3).flatten(3)  # b 1 1 (f l)
        return self.out(attention(q, k, v, mask=mask, bias=bias).transpose(1, 2).flatten(2).flatten(0, 1))

    def _split(self, x: Tensor) -> Tensor:
        """n l w -> n h l c."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class LatentPool(nn.Module):
    """CoCa's pool: the first of its queries reads the normed rows, in the width of the features.

    Source: CoCa (arXiv 2205.01917) as open_clip has it; the other queries are those of its captioner.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, features, eps = architecture.vision.width, architecture.embed_dim, architecture.vision.eps
        self.heads = architecture.frames.pool_heads
        self.latent = nn.Parameter(torch.empty(QUERIES, features))
        self.query, self.key_value = Linear(features, features), Linear(width, 2 * features)
        self.out = Linear(features, features)
        self.ln_query, self.ln_rows = LayerNorm(features, eps=eps), LayerNorm(width, eps=eps)

    def forward(self, rows: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Return the features of frames, n d, of rows n l w and their sizes n l."""
        latent = self.ln_query(self.latent[:1].to(rows.dtype)).expand(len(rows), 1, -1)  # n 1 d
        projected = self.query(latent), *self.key_value(self.ln_rows(rows)).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        y = attention(q, k, v, bias=size_bias(sizes, k))
        return self.out(y.transpose(1, 2).flatten(2)[:, 0])


QUERIES = 256  # of CoCa's pool


def pool_shape(architecture: Architecture) -> BlockShape:
    """Shape of an attention pool."""
    tower, frames = architecture.vision, architecture.frames
    activation = tower.activation or architecture.activation
    return BlockShape(
        width=tower.width,
        heads=frames.pool_heads,
        mlp_width=frames.pool_mlp_width,
        activation="gelu" if frames.rotation else activation,
        eps=tower.eps,
    )
