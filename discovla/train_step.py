"""What a strategy wraps: one module from a batch to its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch

from discovla.batch import Batch, Embedding, Losses
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import (
    CommDtype,
    GradScale,
    World,
    add_over_ranks,
    gather,
    largest_over_ranks,
    scale_gradient,
    start_gather,
)
from discovla.engine.grad_cache import GradCache
from discovla.engine.strategy import cast_frozen
from discovla.methods.base import Method
from discovla.nn.features import check_mask
from discovla.nn.precision import quantise_frozen, widen_residual
from discovla.ops.buckets import PackedRows
from discovla.ops.column_shard import ColumnShard


class TrainStep(GradCache):
    """Encode, and the losses of all ranks' pairs: the one module a strategy wraps.

    Each of W ranks has the similarities of all texts to its own videos: texts are gathered while videos are
    encoded, videos never.  Of such a block, 1/W of all pairs, a rank sums up what concerns its videos; what
    concerns texts is put together over ranks, a few numbers each.  Loss and gradient are those of one process
    with all pairs: a rank's gradient is W times its own part, so that a strategy's average over ranks is the
    sum of the parts.  grad_scale = "official" leaves that of the embeddings 1/W, as released.  What is
    gathered, and its gradient, travels in the method's compute dtype, or with comm_dtype = "fp32" as it is.

    With grad_cache_chunks > 1 a rank encodes its clips in that many chunks and keeps only the embeddings of
    each. Once their gradients are known, it encodes chunk after chunk again from the same random state: in
    backward, or after it if the strategy cannot do that, see `GradCache`.

    Raises:
        ValueError: grad_cache_chunks > 1 and a method whose embeddings depend on the rest of the batch.

    Source: gradient caching as in Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
    (arXiv 2101.06983); inside of backward all is one graph, so that every parameter's gradient comes once.
    """

    def __init__(
        self,
        method: Method,
        world: World,
        grad_scale: GradScale,
        grad_cache_chunks: int = 1,
        comm_dtype: CommDtype = "compute",
    ) -> None:
        super().__init__()
        if grad_cache_chunks > 1 and method.sees_batch:
            raise ValueError(
                f"engine.grad_cache_chunks: expected 1 with {method.sees_batch}, by which embeddings depend "
                f"on the rest of the batch, found {grad_cache_chunks}"
            )
        self.method, self.world, self.grad_cache_chunks = method, world, grad_cache_chunks
        self.grad_scale: GradScale = grad_scale
        self.comm_dtype: CommDtype = comm_dtype
        self.recorded: Callable[[Batch], Losses] | None = None  # what runs `losses` instead, if any

    def forward(self, batch: Batch) -> Losses:
        """Losses of the global batch, of those of its rows whose clip could be read."""
        if self.recorded is None:
            return self.losses(batch)
        _check(batch)
        return self.recorded(batch)

    def losses(self, batch: Batch, rows: PackedRows | None = None) -> Losses:
        """The same, by no recording.

        rows: how many packed captions take, where that is settled; see `ops.buckets`.
        """
        self.method.text.rows = rows or {}
        try:
            return self._of_many(batch) if self.world.size > 1 else self._of_one(batch)
        finally:
            self.method.text.rows = {}  # whoever encodes captions next has others

    def _of_one(self, batch: Batch) -> Losses:
        """The same on the only process."""
        text = self._encoded(self.method.encode_texts, batch)
        video = self._encoded(self.method.encode_videos, batch)
        index = batch.video_index
        if batch.valid is not None:
            text, video, index = text[batch.valid], video[batch.valid], index[batch.valid]
        return self.method.losses(text, video, same_video=index[:, None] == index)

    def _of_many(self, batch: Batch) -> Losses:
        """The same on each of several ranks, from its own columns of every similarity matrix."""
        world, index, valid = self.world, batch.video_index, batch.valid
        text = self._scaled(self._encoded(self.method.encode_texts, batch))
        comm_dtype = self.method.compute_dtype if self.comm_dtype == "compute" else None
        coming = {name: start_gather(x, world, comm_dtype) for name, x in text.tensors().items()}
        video = self._scaled(self._encoded(self.method.encode_videos, batch))
        text, everyones = Embedding(**{name: wait() for name, wait in coming.items()}), gather(index, world)
        first = world.rank * len(batch)
        if valid is not None:
            kept = gather(valid, world)
            first = int(kept[:first].sum())
            text, everyones, video, index = text[kept], everyones[kept], video[valid], index[valid]
        columns = ColumnShard(first_text=first, all_reduce=add_over_ranks, all_reduce_max=largest_over_ranks)
        losses = self.method.losses(text, video, same_video=everyones[:, None] == index, columns=columns)
        return replace(losses, total=scale_gradient(losses.total, world.size))

    def _encoded(self, encode: Callable[[Batch], Embedding], batch: Batch) -> Embedding:
        """One side of the batch, part by part."""
        if self.grad_cache_chunks == 1:
            return encode(batch)
        bounds = [len(batch) * part // self.grad_cache_chunks for part in range(self.grad_cache_chunks + 1)]
        return self.encode_chunks(encode, [batch[start:stop] for start, stop in pairwise(bounds)])

    def _scaled(self, x: Embedding) -> Embedding:
        """The embedding, whose gradient alone is not made up for the average over ranks where official."""
        factor = 1.0 if self.grad_scale == "exact" else 1 / self.world.size
        return x.map(lambda tensor: scale_gradient(tensor, factor))


def _check(batch: Batch) -> None:
    """Refuse, with its row, a mask at which a recorded step would but stop the GPU."""
    check_mask("caption", batch.text_mask)
    check_mask("video", batch.frame_mask)
    if batch.frame_text_mask is not None:
        check_mask("frame caption", batch.frame_text_mask.flatten(0, -2))


def set_precision(method: Method, engine: EngineConfig, device: torch.device) -> None:
    """Let a method compute in the config's precision, before it moves to the device it will be on.

    Raises:
        ValueError: nothing is frozen that could be in FP8, or the device has no FP8.
    """
    if engine.precision == "fp32":
        return
    method.compute_dtype = torch.bfloat16
    if engine.residual_dtype == "fp32":
        for tower in (method.vision, method.text):
            widen_residual(tower, torch.bfloat16)
    if engine.precision.startswith("fp8"):
        try:
            impl = "triton" if engine.impl == "triton" else "auto"
            quantise_frozen(method, device, backward=engine.precision == "fp8_backward", impl=impl)
        except ValueError as error:
            raise ValueError(f"engine.precision: {error}") from None
    if not engine.bf16_parameters:
        cast_frozen(method, torch.bfloat16)
