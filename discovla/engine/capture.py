"""A training step recorded once for every shape of its batch and replayed: one launch in place of many."""

from __future__ import annotations

import logging
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from discovla.ops.buckets import MIN_ROWS, PackedRows, bucket_sizes, rows_by_shape

logger = logging.getLogger(__name__)

MOST = 16  # recordings that are kept
REMEMBERED = 64  # shapes of batches that came once
ROOM = 0.45  # of a GPU's memory, which the graphs' pool may take and a step as it is once more
WARM_UP = 2  # runs before a step is recorded, in which libraries make their plans and kernels are compiled

Step = Callable[[Batch, PackedRows], Losses]
Found = tuple[Losses, Sequence[Tensor | None]]  # of a step: losses, and the gradient of each parameter
# runs a function until it can be recorded, records it, and gives what it found and how to find it anew
Recorder = Callable[[Callable[[], Found]], tuple[Found, Callable[[], None]]]
Key = tuple[Any, ...]


@dataclass(kw_only=True)
class Recording:
    """A recorded step: what it reads, what it writes, and how to let it.

    turn: how often it was replayed, for what it wrote lasts until the next time only.
    """

    batch: Batch
    found: Found
    replay: Callable[[], None]
    turn: int = 0


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a capture keeps to.

    most: recordings that are kept; the one that was not used for longest gives way.
    fewest: rows of captions, see `bucketed_rows`.
    crowded: whether a step as it is may not fit into memory beside the recordings, which then give way.
    largest: the largest of each of a few numbers over all processes, which so record the same at once.
    """

    most: int = MOST
    fewest: int = MIN_ROWS
    crowded: Callable[[], bool] = lambda: False
    largest: Callable[[list[int]], list[int]] = list


class Capture:
    """`step` and its backward, recorded for every shape of batch and replayed.

    A batch is copied to where the recording reads it, captions with a settled number of rows (see
    `ops.buckets`), and what comes back are losses whose backward hands out the gradients that were found with
    them.  A shape is recorded when it comes for the second time; at first its step is taken as it is, of the
    same rows.  So are batches with clips that could not be read, and without backward, of the rows they need:
    the same numbers, but for the order of sums.

    Args:
        step: forward, of a batch and the rows of its captions; starts no kernel but on what it is given and
            on its parameters, and reads no number back.
        parameters: that train; they stay where they are.
        recorder: `record_graph` on a GPU.
    """

    def __init__(
        self,
        step: Step,
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
        bounds: Bounds | None = None,
    ) -> None:
        self.step, self.parameters, self.recorder = step, tuple(parameters), recorder
        self.bounds = bounds or Bounds()
        self.recordings: OrderedDict[Key, Recording] = OrderedDict()
        self.buffers: dict[Key, Tensor] = {}
        self._came: OrderedDict[Key, None] = OrderedDict()
        self._said: set[str] = set()

    def __call__(self, batch: Batch) -> Losses:
        """Losses of a batch; their backward is to be taken before the next call."""
        if not torch.is_grad_enabled():
            return self.step(batch, {})
        if batch.valid is not None:
            self._say("a batch with clips that could not be read is no recorded step, and takes longer")
            return self._unrecorded(batch, {})
        rows = self._agreed(batch)
        if rows is None:
            self._say("processes whose batches are of different shapes take steps that are not recorded")
            return self._unrecorded(batch, {})
        key = (*_shapes(batch), tuple(sorted(rows.items())))
        recording = self.recordings.get(key)
        if recording is None:
            if not self._came_before(key):
                return self._unrecorded(batch, rows)
            recording = self._record(key, batch, rows)
        self.recordings.move_to_end(key)
        self._fill(recording.batch, batch)
        recording.replay()
        recording.turn += 1
        losses = recording.found[0]
        total = _Replayed.apply(losses.total, recording, *self.parameters)
        return Losses(total=total, terms={name: term.clone() for name, term in losses.terms.items()})

    def _unrecorded(self, batch: Batch, rows: PackedRows) -> Losses:
        """The step as it is, which needs memory of its own."""
        if self.recordings and self.bounds.largest([int(self.bounds.crowded())])[0]:
            self._say("recordings give way to a step that has none, for lack of memory")
            self._forget(len(self.recordings))
            torch.cuda.empty_cache()  # what they held is else still counted as taken
        return self.step(batch, rows)

    def _forget(self, count: int) -> None:
        """Drop so many recordings, unused for longest, and the buffers that no other reads."""
        for _ in range(count):
            self.recordings.popitem(last=False)
        read = {id(x) for recording in self.recordings.values() for _, x in _tensors(recording.batch)}
        self.buffers = {key: x for key, x in self.buffers.items() if id(x) in read}

    def _agreed(self, batch: Batch) -> PackedRows | None:
        """Rows of captions that all processes have room for; None where they have none, or other shapes."""
        masks = _masks(batch)
        wanted, room = zip(*bucket_sizes(masks, self.bounds.fewest), strict=True)
        shapes = zlib.crc32(repr(_shapes(batch)).encode())
        agreed = self.bounds.largest([shapes, -shapes, *wanted, *(-most for most in room)])
        rows, least = agreed[2 : 2 + len(masks)], [-most for most in agreed[2 + len(masks) :]]
        fits = all(count <= most for count, most in zip(rows, least, strict=True))
        return rows_by_shape(masks, rows) if fits and agreed[0] == -agreed[1] else None

    def _came_before(self, key: Key) -> bool:
        """Whether batches of this shape have come before; from now on they have."""
        if key in self._came:
            return True
        self._came[key] = None
        if len(self._came) > REMEMBERED:
            self._came.popitem(last=False)
        return False

    def _record(self, key: Key, batch: Batch, rows: PackedRows) -> Recording:
        """The recording of a step on batches of this shape."""
        if len(self.recordings) >= self.bounds.most:
            self._say(
                f"batches of more than {self.bounds.most} shapes: the step of the one that has not come for "
                "longest is recorded anew when it comes again"
            )
            self._forget(1)
        own = self._own(batch)
        self._fill(own, batch)

        def run() -> Found:
            losses = self.step(own, rows)
            return losses, torch.autograd.grad(losses.total, self.parameters, allow_unused=True)

        found, replay = self.recorder(run)
        recording = self.recordings[key] = Recording(batch=own, found=_detached(found), replay=replay)
        return recording

    def _own(self, batch: Batch) -> Batch:
        """A batch like this one where recordings read it, masks too on the device."""
        device, own = batch.text_ids.device, {}
        for name, x in _tensors(batch):
            key = name, x.shape, x.dtype
            if key not in self.buffers:
                self.buffers[key] = torch.empty(x.shape, dtype=x.dtype, device=device)
            own[name] = self.buffers[key]
        return replace(batch, **own, bad=())

    @staticmethod
    def _fill(own: Batch, batch: Batch) -> None:
        """Copy a batch there."""
        for name, x in _tensors(batch):
            getattr(own, name).copy_(x, non_blocking=True)

    def _say(self, message: str) -> None:
        """A warning, once."""
        if message not in self._said:
            self._said.add(message)
            logger.warning("engine.capture: %s", message)


class _Replayed(Function):
    """The recorded loss, whose gradients are those recorded with it."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, recording: Recording, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.turn = recording, recording.turn
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        recording = ctx.recording
        if ctx.turn != recording.turn:
            raise RuntimeError("engine.capture: expected the backward of a step before the next step")
        gradients = recording.found[1]
        present = [x for x in gradients if x is not None]
        scaled = iter(torch._foreach_mul(present, grad))  # pyright: ignore[reportPrivateImportUsage]
        return None, None, *(None if x is None else next(scaled) for x in gradients)


def record_graph(device: torch.device) -> Recorder:
    """A recorder of CUDA graphs, all of which share one pool of memory.

    Random numbers of torch's generator on the GPU (dropout) follow its seed at each replay, as in a step that
    is not recorded.
    """
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def record(function: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
        state = torch.cuda.get_rng_state(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads pin memory for batches to come and write checkpoints, which a graph need not forbid
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            found = function()
        torch.cuda.set_rng_state(state, device)
        return found, graph.replay

    return record


def make_capture(
    step: Step, parameters: Iterable[nn.Parameter], engine: EngineConfig, world: World
) -> Capture | None:
    """What the config asks for: recorded steps, or None.

    Raises:
        ValueError: as `check_capture`.
    """
    check_capture(engine, world)
    if engine.capture == "none":
        return None
    bounds = Bounds(crowded=partial(memory_is_short, world.device), largest=partial(largest, world))
    return Capture(step, tuple(parameters), record_graph(world.device), bounds)


def largest(world: World, values: list[int]) -> list[int]:
    """The largest of each number over processes, which tell each other on the CPU."""
    return values if world.size == 1 else largest_over_ranks(torch.tensor(values)).tolist()


def memory_is_short(device: torch.device) -> bool:
    """Whether torch holds so much of a GPU's memory that as much again may not fit."""
    return torch.cuda.memory_reserved(device) > ROOM * torch.cuda.mem_get_info(device)[1]


def check_capture(engine: EngineConfig, world: World) -> None:
    """Refuse to record where it cannot be done.

    Raises:
        ValueError: without a GPU, on however many processes.
    """
    if engine.capture == "graph" and world.device.type != "cuda":
        raise ValueError(f"engine.capture: expected 'none' on a {world.device.type}, found 'graph'")


def _tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """What a step reads of a batch whose clips could all be read."""
    for each in fields(batch):
        if isinstance(x := getattr(batch, each.name), Tensor):
            yield each.name, x


def _masks(batch: Batch) -> list[Tensor]:
    """The masks of captions, n l, and of frame captions."""
    frames = batch.frame_text_mask
    return [batch.text_mask, *([] if frames is None else [frames.flatten(0, -2)])]


def _shapes(batch: Batch) -> Key:
    return tuple((name, x.shape, x.dtype) for name, x in _tensors(batch))


def _detached(found: Found) -> Found:
    """The same without the graph of autograd, which a recording has no more use for."""
    losses, gradients = found
    terms = {name: term.detach() for name, term in losses.terms.items()}
    return Losses(total=losses.total.detach(), terms=terms), gradients
