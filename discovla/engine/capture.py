"""CUDA graphs of a training step: recorded once per batch shape and replayed in a single launch."""

from __future__ import annotations

import logging
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from discovla.batch import Batch, Losses
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World, largest_over_ranks
from discovla.engine.flat import FlatOptimizer
from discovla.ops.buckets import MIN_ROWS, PackedRows, bucket_sizes, rows_by_shape

logger = logging.getLogger(__name__)

MAX_RECORDINGS = 16
MAX_SEEN = 64  # shapes remembered that occurred once
MEMORY_SHARE = 0.45  # of GPU memory: the graphs' pool may take it, and an unrecorded step as much again
WARM_UP = 2  # runs before recording, in which libraries plan and kernels compile

Step = Callable[[Batch, PackedRows], Losses]
# losses, and the gradient of each parameter; no gradients if the step includes the update
StepResult = tuple[Losses, Sequence[Tensor | None]]
# records a function; returns its result and a function that replays it into the same tensors
Recorder = Callable[[Callable[[], StepResult]], tuple[StepResult, Callable[[], None]]]
Key = tuple[Any, ...]


@dataclass(kw_only=True)
class Recording:
    """A recorded step: the batch it reads, the result it writes, and its replay.

    replays: number of replays; each one overwrites the result.
    """

    batch: Batch
    result: StepResult
    replay: Callable[[], None]
    replays: int = 0


@dataclass(frozen=True, kw_only=True)
class CaptureLimits:
    """Limits of a capture.

    max_recordings: above it the least recently used recording is dropped.
    min_rows: of packed captions, see `ops.buckets.bucketed_rows`.
    memory_short: returns True if an unrecorded step may not fit beside the recordings, which are then
    dropped. max_over_ranks: elementwise maximum over processes, so that all of them record the same at the
    same step."""

    max_recordings: int = MAX_RECORDINGS
    min_rows: int = MIN_ROWS
    memory_short: Callable[[], bool] = lambda: False
    max_over_ranks: Callable[[list[int]], list[int]] = list


class Capture:
    """Records `step` with its backward, and the update, once per batch shape and replays it.

    A batch is copied into the buffers that the recording reads, with its number of packed caption rows
    rounded up (see `ops.buckets`).  With an optimizer a replay also clips the gradients and updates the
    parameters; its losses hold the gradient norm, and the next replay overwrites them.  Without one the
    returned losses carry the recorded gradients in their backward.

    A shape is recorded when it occurs for the second time.  The first step of a shape runs unrecorded with
    the same rows; batches with unreadable clips and steps without gradients run unrecorded with the rows they
    need, which gives the same numbers up to the order of sums.

    Args:
        step: forward of a batch and its rows of captions; reads nothing but these and its parameters, and
            does not synchronise with the device.
        parameters: that train; their storage stays the same.
        recorder: `record_graph` on a GPU.
        optimizer: of the parameters, on a single process; its learning rate is set before the call.
    """

    def __init__(
        self,
        step: Step,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
        limits: CaptureLimits | None = None,
        optimizer: FlatOptimizer | None = None,
    ) -> None:
        self.step, self.parameters, self.recorder = step, tuple(parameters), recorder
        self.optimizer = optimizer
        self.limits = limits or CaptureLimits()
        self.recordings: OrderedDict[Key, Recording] = OrderedDict()
        self.buffers: dict[Key, Tensor] = {}
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._warned: set[str] = set()

    def __call__(self, batch: Batch) -> Losses:
        """Return the losses of a batch; if they hold no gradient norm, call backward before the next step."""
        if not torch.is_grad_enabled():
            return self.step(batch, {})
        if batch.valid is not None:
            self._warn_once("a batch with unreadable clips runs unrecorded, which takes longer")
            return self._run_unrecorded(batch, {})
        rows = self._common_rows(batch)
        if rows is None:
            self._warn_once("batches whose shapes differ between processes run unrecorded")
            return self._run_unrecorded(batch, {})
        key = (*_shapes(batch), tuple(sorted(rows.items())))
        recording = self.recordings.get(key)
        if recording is None:
            if not self._seen_before(key):
                return self._run_unrecorded(batch, rows)
            recording = self._record(key, batch, rows)
        self.recordings.move_to_end(key)
        _copy_batch(recording.batch, batch)
        recording.replay()
        recording.replays += 1
        losses = recording.result[0]
        if self.optimizer is not None:
            return losses
        total = _Replayed.apply(losses.total, recording, *self.parameters)
        return Losses(total=total, terms={name: term.clone() for name, term in losses.terms.items()})

    def _run_unrecorded(self, batch: Batch, rows: PackedRows) -> Losses:
        """Run the step unrecorded, after dropping all recordings if any process is short of memory."""
        if self.recordings and self.limits.max_over_ranks([int(self.limits.memory_short())])[0]:
            self._warn_once("recordings are dropped for an unrecorded step, because GPU memory is short")
            self._drop(len(self.recordings))
            torch.cuda.empty_cache()  # releases the memory of the dropped graphs
        return self.step(batch, rows)

    def _drop(self, count: int) -> None:
        """Drop the least recently used recordings, and buffers that no other recording reads."""
        for _ in range(count):
            self.recordings.popitem(last=False)
        used = {id(x) for recording in self.recordings.values() for _, x in _tensors(recording.batch)}
        self.buffers = {key: x for key, x in self.buffers.items() if id(x) in used}

    def _common_rows(self, batch: Batch) -> PackedRows | None:
        """Return caption rows that fit the batch of every process; None if shapes differ or none fit."""
        masks = _masks(batch)
        wanted, capacity = zip(*bucket_sizes(masks, self.limits.min_rows), strict=True)
        shapes = zlib.crc32(repr(_shapes(batch)).encode())
        maxima = self.limits.max_over_ranks([shapes, -shapes, *wanted, *(-most for most in capacity)])
        if maxima[0] != -maxima[1]:
            return None
        rows, capacity = maxima[2 : 2 + len(masks)], [-most for most in maxima[2 + len(masks) :]]
        fits = all(count <= most for count, most in zip(rows, capacity, strict=True))
        return rows_by_shape(masks, rows) if fits else None

    def _seen_before(self, key: Key) -> bool:
        """Return True if a batch of this shape occurred before; remember it from now on."""
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return False

    def _record(self, key: Key, batch: Batch, rows: PackedRows) -> Recording:
        """Record the step on batches of this shape."""
        if len(self.recordings) >= self.limits.max_recordings:
            self._warn_once(
                f"batches of more than {self.limits.max_recordings} shapes: the least recently used "
                "recording is dropped, and recorded again when its shape occurs again"
            )
            self._drop(1)
        buffered = self._buffered(batch)
        _copy_batch(buffered, batch)

        def run() -> StepResult:
            losses = self.step(buffered, rows)
            gradients = torch.autograd.grad(losses.total, self.parameters, allow_unused=True)
            if self.optimizer is None:
                return losses, gradients
            self.optimizer.set_gradients(gradients)
            return replace(losses, grad_norm=self.optimizer.update()), ()

        with nullcontext() if self.optimizer is None else self.optimizer.preserved():
            result, replay = self.recorder(run)  # runs the step several times
        recording = Recording(batch=buffered, result=_detached(result), replay=replay)
        self.recordings[key] = recording
        return recording

    def _buffered(self, batch: Batch) -> Batch:
        """Return a batch of these shapes in the buffers that recordings read, all on the device."""
        device, tensors = batch.text_ids.device, {}
        for name, x in _tensors(batch):
            key = name, x.shape, x.dtype
            if key not in self.buffers:
                self.buffers[key] = torch.empty(x.shape, dtype=x.dtype, device=device)
            tensors[name] = self.buffers[key]
        return replace(batch, **tensors, bad=())

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("engine.capture: %s", message)


class _Replayed(Function):
    """Return the recorded loss; backward returns the recorded gradients."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, recording: Recording, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.replays = recording, recording.replays
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        recording = ctx.recording
        if ctx.replays != recording.replays:
            raise RuntimeError("engine.capture: expected the backward of a step before the next step")
        gradients = recording.result[1]
        present = [x for x in gradients if x is not None]
        scaled = iter(torch._foreach_mul(present, grad))  # pyright: ignore[reportPrivateImportUsage]
        return None, None, *(None if x is None else next(scaled) for x in gradients)


def record_graph(device: torch.device) -> Recorder:
    """Return a recorder of CUDA graphs that share one memory pool.

    Random numbers of torch's GPU generator (dropout) follow its seed at each replay, as when unrecorded.
    """
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(function: Callable[[], StepResult]) -> tuple[StepResult, Callable[[], None]]:
        state = torch.cuda.get_rng_state(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local" allows other threads to pin memory for batches and to write checkpoints meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = function()
        torch.cuda.set_rng_state(state, device)
        return result, graph.replay

    return record


def make_capture(
    step: Step,
    parameters: Iterable[nn.Parameter],
    engine: EngineConfig,
    world: World,
    optimizer: FlatOptimizer | None = None,
) -> Capture | None:
    """Return the configured capture of a step, or None; arguments as of `Capture`.

    Raises:
        ValueError: see `check_capture`.
    """
    check_capture(engine, world)
    if engine.capture == "none":
        return None
    limits = CaptureLimits(
        memory_short=partial(memory_is_short, world.device), max_over_ranks=partial(max_over_ranks, world)
    )
    return Capture(step, tuple(parameters), record_graph(world.device), limits, optimizer)


def max_over_ranks(world: World, values: list[int]) -> list[int]:
    """Return the elementwise maximum over processes, exchanged on the CPU."""
    return values if world.size == 1 else largest_over_ranks(torch.tensor(values)).tolist()


def memory_is_short(device: torch.device) -> bool:
    """Return True if torch reserves so much of the GPU's memory that as much again may not fit."""
    return torch.cuda.memory_reserved(device) > MEMORY_SHARE * torch.cuda.mem_get_info(device)[1]


def check_capture(engine: EngineConfig, world: World) -> None:
    """Raise ValueError if CUDA graphs are configured without a GPU."""
    if engine.capture == "graph" and world.device.type != "cuda":
        raise ValueError(f"engine.capture: expected 'none' on a {world.device.type}, found 'graph'")


def _copy_batch(target: Batch, batch: Batch) -> None:
    """Copy a batch into the buffers of another; tensors of one dtype that are on the device at once."""
    alike: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for name, x in _tensors(batch):
        buffer = getattr(target, name)
        if x.device == buffer.device:
            alike.setdefault(x.dtype, []).append((buffer, x))
        else:
            buffer.copy_(x, non_blocking=True)
    for pairs in alike.values():
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch, by field."""
    for each in fields(batch):
        if isinstance(x := getattr(batch, each.name), Tensor):
            yield each.name, x


def _masks(batch: Batch) -> list[Tensor]:
    """Return the masks of captions and of frame captions, n l each."""
    frames = batch.frame_text_mask
    return [batch.text_mask, *([] if frames is None else [frames.flatten(0, -2)])]


def _shapes(batch: Batch) -> Key:
    return tuple((name, x.shape, x.dtype) for name, x in _tensors(batch))


def _detached(result: StepResult) -> StepResult:
    """Detach the losses from the autograd graph, which a recording does not need."""
    losses, gradients = result
    terms = {name: term.detach() for name, term in losses.terms.items()}
    return replace(losses, total=losses.total.detach(), terms=terms), gradients
