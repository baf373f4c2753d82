"""What a strategy wraps: one module from a batch to its losses."""

from __future__ import annotations

from torch import nn

from discovla.batch import Batch, Embedding, Losses
from discovla.engine.distributed import GradScale, World, gather
from discovla.methods.base import Method


class TrainStep(nn.Module):
    """Encode, gather over ranks, losses: the one module a strategy wraps."""

    def __init__(self, method: Method, world: World, grad_scale: GradScale) -> None:
        super().__init__()
        self.method, self.world = method, world
        self.grad_scale: GradScale = grad_scale

    def forward(self, batch: Batch) -> Losses:
        """Losses of the global batch, of those of its rows whose clip could be read."""
        text, video = self.method.encode(batch)
        index = gather(batch.video_index, self.world)
        text, video = self._gather(text), self._gather(video)
        if batch.valid is not None:
            kept = gather(batch.valid, self.world)
            text, video, index = text[kept], video[kept], index[kept]
        return self.method.losses(text, video, same_video=index[:, None] == index)

    def _gather(self, x: Embedding) -> Embedding:
        return x.map(lambda tensor: gather(tensor, self.world, grad_scale=self.grad_scale))
