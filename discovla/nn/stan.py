"""STAN: a branch beside the last blocks of a vision tower that relates the frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from discovla.nn.block import Attention, Block, BlockShape
from discovla.nn.features import masked_mean
from discovla.nn.layers import LayerNorm, Linear
from discovla.nn.layout import SequenceLayout

MAX_FRAMES = 64  # rows of the time table
DROP_PATH = 0.1  # rate of the last layer; rates rise linearly from 0 in the first


@dataclass(frozen=True, kw_only=True)
class StanState:
    """Rows of the branch for b videos: a class row each (b w), and the patches of each frame (b f p w)."""

    cls: Tensor
    patches: Tensor


class STAN(nn.Module):
    """The branch: layer j runs after trunk block (blocks - depth + j), on that block's output.

    With c the mean of the trunk's class rows over frames and G its patch rows: layer 0 reads
    z = (c + a + pos_0) / 2 and P_tl = G_tl + pos_(1+l) + time_t, a later one z + c and P + G.  The trunk does
    not read the branch; the last z is added to every frame's class row before projection.

    Args:
        shape: of the trunk's blocks.
        depth: layers.

    Source: STAN (arXiv 2301.11116), Mug-STAN (arXiv 2311.15075); specification of T2VParser, section 2.
    """

    def __init__(self, shape: BlockShape, depth: int) -> None:
        super().__init__()
        self.time_embedding = nn.Parameter(torch.randn(MAX_FRAMES, shape.width))
        rates = [DROP_PATH * layer / max(1, depth - 1) for layer in range(depth)]
        self.layers = nn.ModuleList(StanLayer(shape, rate) for rate in rates)

    def start(
        self, trunk: Tensor, class_embedding: Tensor, position_embedding: Tensor, mask: Tensor | None = None
    ) -> StanState:
        """Return the input of layer 0.

        Args:
            trunk: b f 1+p w, a trunk block's output, the class row first.
            class_embedding, position_embedding: w and 1+p w, the trunk's own.
            mask: b f, bool, true on real frames; None: all are.

        Raises:
            ValueError: more frames than the time table has rows.
        """
        frames, dtype = trunk.shape[1], trunk.dtype
        if frames > MAX_FRAMES:
            raise ValueError(f"frames: expected at most {MAX_FRAMES} with STAN, got {frames}")
        position = position_embedding.to(dtype)
        start = (mean_of_frames(trunk[:, :, 0], mask) + class_embedding.to(dtype) + position[0]) / 2
        time = self.time_embedding[:frames, None].to(dtype)  # f 1 w
        return StanState(cls=start, patches=trunk[:, :, 1:] + position[1:] + time)

    def next_state(self, state: StanState, trunk: Tensor, mask: Tensor | None = None) -> StanState:
        """Return the input of a later layer; arguments as in `start`."""
        cls = state.cls + mean_of_frames(trunk[:, :, 0], mask)
        return StanState(cls=cls, patches=state.patches + trunk[:, :, 1:])

    def copy_trunk(self, blocks: Sequence[nn.Module]) -> None:
        """Copy the trunk's last blocks into the spatial halves, one to one."""
        for layer, block in zip(self.layers, blocks[-len(self.layers) :], strict=True):
            assert isinstance(layer, StanLayer)
            own = layer.spatial.state_dict()
            trunk = block.state_dict()
            layer.spatial.load_state_dict({name: trunk[name] for name in own})


class StanLayer(nn.Module):
    """A temporal half among the frames at each patch's place, then a spatial half within each frame.

    Temporal: P <- P + fc(drop(attention over frames of ln(P))); fc starts at zero, and a dropped path still
    adds its bias.  Spatial: every frame gets a copy of z in front of its patches; with A the attention within
    the frame of their ln_1, z <- z + mean over frames of drop(A)'s first row, P <- P + its other rows; then
    x <- x + mlp(ln_2 x) on all.  drop is stochastic depth per (video, patch) and per (video, frame).
    """

    def __init__(self, shape: BlockShape, drop_path: float) -> None:
        super().__init__()
        self.temporal_norm = LayerNorm(shape.width, eps=shape.eps)
        self.temporal = Attention(shape)
        self.temporal_fc = Linear(shape.width, shape.width)
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)
        self.spatial = Block(shape)
        self.drop_path = drop_path

    def forward(self, state: StanState, mask: Tensor | None = None) -> StanState:
        """Return the state after the layer; mask: b f, bool, true on real frames."""
        patches = state.patches + self._among_frames(state.patches, mask)
        return self._within_frames(StanState(cls=state.cls, patches=patches), mask)

    def _among_frames(self, patches: Tensor, mask: Tensor | None) -> Tensor:
        """Update of the patches by the temporal half, b f p w."""
        b, _, p, _ = patches.shape
        places = patches.transpose(1, 2).flatten(0, 1)  # (b p) f w
        seen = None if mask is None else mask.repeat_interleave(p, 0)
        read = self.temporal(self.temporal_norm(places), SequenceLayout(key_mask=seen))
        update = self.temporal_fc(drop_path(read, self.drop_path, self.training))
        return update.unflatten(0, (b, p)).transpose(1, 2)

    def _within_frames(self, state: StanState, mask: Tensor | None) -> StanState:
        """The spatial half."""
        b, f = state.patches.shape[:2]
        cls = state.cls[:, None, None].expand(-1, f, 1, -1)
        rows = torch.cat([cls, state.patches], dim=2).flatten(0, 1)  # (b f) 1+p w
        read = self.spatial.attention(self.spatial.ln_1(rows), SequenceLayout())
        read = drop_path(read, self.drop_path, self.training).unflatten(0, (b, f))  # b f 1+p w
        cls = state.cls + mean_of_frames(read[:, :, 0], mask)
        patches = state.patches + read[:, :, 1:]
        return StanState(cls=cls + self._mlp(cls), patches=patches + self._mlp(patches))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.spatial.mlp(self.spatial.ln_2(x))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: in training zero entries of x's first axis at `rate`, divide the rest by 1 - rate."""
    if not training or not rate:
        return x
    kept = torch.rand(len(x), device=x.device) >= rate
    return x * (kept.to(x.dtype) / (1 - rate)).view(-1, *[1] * (x.dim() - 1))


def mean_of_frames(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over f of b f w, over the frames where mask (b f) is true."""
    return rows.mean(1) if mask is None else masked_mean(rows, mask)
