"""The module that a strategy wraps, from a batch to its losses, and the method's precision and kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from discovla.batch import Batch, Embedding, Losses
from discovla.engine.config import EngineConfig, resolve_precision
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
from discovla.nn.recompute import take_rows
from discovla.ops.buckets import PackedRows
from discovla.ops.column_shard import ColumnShard
from discovla.ops.dispatch import KernelUnavailable, choose

METHOD = "method."  # prefix of the method's parameters in `TrainStep`


class TrainStep(GradCache):
    """Encode a batch and compute the losses over all ranks' pairs.

    On W ranks each rank computes the similarities of all texts to its own videos, 1/W of all pairs: texts are
    gathered while videos are encoded, videos never are. A rank reduces what concerns its videos by itself;
    what concerns texts is reduced over ranks, a few numbers per text. Loss and gradient equal those of one
    process with all pairs: a rank's gradient is W times its own part, so that the strategy's average over
    ranks is the sum of the parts. grad_scale = "official" leaves the gradient of embeddings at 1/W, as
    released. Gathered embeddings and their gradients are sent in the method's compute dtype, or unchanged
    with comm_dtype = "fp32".

    With grad_cache_chunks > 1 a rank encodes its clips in that many chunks and keeps only the embeddings of
    each. Once their gradients are known, it encodes chunk after chunk again from the same random state: in
    backward, or after it if the strategy cannot do that, see `GradCache`.

    Raises:
        ValueError: grad_cache_chunks > 1 and a method whose embeddings depend on the rest of the batch.

    Source: gradient caching as in Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
    (arXiv 2101.06983); within backward everything is one graph, so that each parameter gets its gradient
    once.
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
        self.recorded: Callable[[Batch], Losses] | None = None  # replays `losses` from a CUDA graph, if set

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses of the global batch, without the rows whose clip could not be read."""
        if self.recorded is None:
            return self.losses(batch)
        _check_masks(batch)
        return self.recorded(batch)

    def losses(self, batch: Batch, rows: PackedRows | None = None) -> Losses:
        """Compute the losses without a recording.

        Args:
            rows: number of rows for packed captions, if it is fixed for a recording; see `ops.buckets`.
        """
        self.method.text.rows = rows or {}
        try:
            return self._losses_of_ranks(batch) if self.world.size > 1 else self._losses_of_one(batch)
        finally:
            self.method.text.rows = {}  # they hold for this batch only

    def _losses_of_one(self, batch: Batch) -> Losses:
        """Compute the losses on a single process."""
        text = self._encode(self.method.encode_texts, batch)
        video = self._encode(self.method.encode_videos, batch)
        index = batch.video_index
        if batch.valid is not None:
            rows = _true_rows(batch.valid, index.device)
            text, video, index = _take(text, rows), _take(video, rows), index[rows]
        return self.method.losses(text, video, same_video=same_video(text, index, index))

    def _losses_of_ranks(self, batch: Batch) -> Losses:
        """Compute the losses on one of several ranks, from its columns of every similarity matrix."""
        world, index, valid = self.world, batch.video_index, batch.valid
        text = self._scale_gradient(self._encode(self.method.encode_texts, batch))
        comm_dtype = self.method.compute_dtype if self.comm_dtype == "compute" else None
        pending = {name: start_gather(x, world, comm_dtype) for name, x in text.tensors().items()}
        video = self._scale_gradient(self._encode(self.method.encode_videos, batch))
        text = Embedding(**{name: wait() for name, wait in pending.items()})
        all_index = gather(index, world)
        first = world.rank * len(batch)
        if valid is not None:
            all_valid = gather(valid, world)
            first = int(all_valid[:first].sum())
            rows, all_rows = (_true_rows(x, index.device) for x in (valid, all_valid))
            text, all_index = _take(text, all_rows), all_index[all_rows]
            video, index = _take(video, rows), index[rows]
        columns = ColumnShard(first_text=first, all_reduce=add_over_ranks, all_reduce_max=largest_over_ranks)
        same = same_video(text, all_index, index)
        losses = self.method.losses(text, video, same_video=same, columns=columns)
        return replace(losses, total=scale_gradient(losses.total, world.size))

    def _encode(self, encode: Callable[[Batch], Embedding], batch: Batch) -> Embedding:
        """Encode one side of the batch, chunk by chunk."""
        chunks = self.grad_cache_chunks
        if chunks == 1:
            return encode(batch)
        bounds = [len(batch) * chunk // chunks for chunk in range(chunks + 1)]
        return self.encode_chunks(encode, [batch[start:stop] for start, stop in pairwise(bounds)])

    def _scale_gradient(self, x: Embedding) -> Embedding:
        """With grad_scale = "official", undo the factor W in the gradient of an embedding."""
        factor = 1.0 if self.grad_scale == "exact" else 1 / self.world.size
        return x.map(lambda tensor: scale_gradient(tensor, factor))


def same_video(text: Embedding, text_index: Tensor, video_index: Tensor) -> Tensor:
    """Return t v, bool, true where a caption is of the video: of the same clip played in the same direction.

    A caption that does not tell order is of the reversed clip too.

    Args:
        text: t captions.
        text_index, video_index: t and v, the `Batch.video_index` of captions and videos.
    """
    same = text_index[:, None] == video_index
    if text.tells_order is None:
        return same
    return same | (text_index[:, None] == ~video_index) & ~text.tells_order[:, None]


def _true_rows(mask: Tensor, device: torch.device) -> Tensor:
    """Return the indices of the true entries; of a mask on the CPU without a sync."""
    return mask.nonzero()[:, 0].to(device, non_blocking=True)


def _take(x: Embedding, rows: Tensor) -> Embedding:
    """Return rows of an embedding, by indices without repetition."""
    return x.map(lambda tensor: take_rows(tensor, rows))


def _check_masks(batch: Batch) -> None:
    """Raise ValueError with the row of an empty mask, which in a recorded step would only stop the GPU."""
    check_mask("caption", batch.text_mask)
    check_mask("video", batch.frame_mask)
    if batch.frame_text_mask is not None:
        check_mask("frame caption", batch.frame_text_mask.flatten(0, -2))


def prepare_method(method: Method, engine: EngineConfig, device: torch.device) -> None:
    """Set a method's precision, move it to its device and choose its kernels.

    Raises:
        ValueError: the precision or the implementation cannot run on the device; the message has the reason.
    """
    set_precision(method, engine, device)
    method.to(device)
    set_kernels(method, engine, device)


def set_precision(method: Method, engine: EngineConfig, device: torch.device) -> None:
    """Set the precision that a method computes in, before it moves to `device`.

    Raises:
        ValueError: no layer is frozen that could be in FP8, or the device has no FP8.
    """
    engine = resolve_precision(engine, device)
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


def set_kernels(method: Method, engine: EngineConfig, device: torch.device) -> None:
    """Set the implementation of the towers' blocks, and how much of their activations is kept for backward.

    Raises:
        ValueError: the implementation cannot run here; the message has the reason.
    """
    like = torch.empty(1, dtype=method.compute_dtype, device=device)
    try:
        choose("block", engine.impl, device.type, operands=(like,))
    except KernelUnavailable as error:
        raise ValueError(f"engine.impl: {error}") from None
    for tower in (method.vision, method.text):
        # parameters that a stage gathers for each layer are not the compiler's
        sharded = engine.impl == "auto" and engine.zero_stage == 3
        tower.impl, tower.memory = "torch" if sharded else engine.impl, engine.memory
    method.text.distinct = engine.distinct_captions
