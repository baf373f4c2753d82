"""Each rank's own time per step, compared over ranks to name those that are slow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from discovla.engine.distributed import World, gather_objects

Item = TypeVar("Item")
SLOW_FACTOR = 1.5  # a rank is slow above this multiple of the others' median
MIN_DELAY = 0.02  # seconds above the median that count as slow


@dataclass(frozen=True, kw_only=True)
class RankTime:
    """Seconds a step that a rank spends on its own: waiting for its batch, and in the towers' forward."""

    name: str
    loading: float
    towers: float

    @property
    def total(self) -> float:
        return self.loading + self.towers


class RankTimer:
    """Measures a rank's own time per step and regularly gathers that of all ranks.

    All ranks end a step together, because its collectives wait for the slowest; only the time before the
    first collective tells which rank that is.  On a GPU the towers are timed by CUDA events, read a step
    late, so nothing waits for them.

    Args:
        world: of this process.
        towers: modules whose forward holds no collective (below ZeRO stage 3).
        every: steps between comparisons.
        name: of this process, in messages.
    """

    def __init__(self, world: World, towers: Sequence[nn.Module], *, every: int, name: str) -> None:
        self.world, self.every, self.name = world, every, name
        self._steps, self._loading, self._towers = 0, 0.0, 0.0
        self._starts: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []
        self._last_spans: list[tuple[Any, Any]] = []  # of the step before
        for tower in towers:
            tower.register_forward_pre_hook(self._start_tower)
            tower.register_forward_hook(self._end_tower)

    def time_loading(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the batches and add up the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._loading += time.perf_counter() - began
            yield batch

    def step(self) -> list[RankTime] | None:
        """End a step; return the times of all ranks every `every` steps.

        On a GPU the loss of the step before must have been read.
        """
        on_gpu = self.world.device.type == "cuda"
        complete, self._last_spans = (self._last_spans, self._spans) if on_gpu else (self._spans, [])
        for began, ended in complete:
            self._towers += began.elapsed_time(ended) / 1000 if on_gpu else ended - began
        self._spans = []
        self._steps += 1
        if self._steps < self.every:
            return None
        own = RankTime(name=self.name, loading=self._loading / self._steps, towers=self._towers / self._steps)
        self._steps, self._loading, self._towers = 0, 0.0, 0.0
        return gather_objects(own, self.world)

    def _start_tower(self, *_: Any) -> None:
        if not self._recording_graph():
            self._starts.append(self._now())

    def _end_tower(self, *_: Any) -> None:
        if not self._recording_graph():
            self._spans.append((self._starts.pop(), self._now()))

    def _recording_graph(self) -> bool:
        """Return True while a CUDA graph is recorded: its events have no time, its replays call no hook."""
        return self.world.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _now(self) -> Any:
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def describe_slow_ranks(times: Sequence[RankTime]) -> list[str]:
    """Return one line for every rank above `SLOW_FACTOR` times the median of the others."""
    lines = []
    if len(times) == 1:
        return lines
    for rank, own in enumerate(times):
        median = statistics.median(other.total for i, other in enumerate(times) if i != rank)
        if own.total > max(SLOW_FACTOR * median, median + MIN_DELAY):
            lines.append(
                f"{own.name} is slow: {own.total:.3f} s a step on its own ({own.loading:.3f} waiting for "
                f"batches, {own.towers:.3f} in the towers), median of the others {median:.3f} s"
            )
    return lines
