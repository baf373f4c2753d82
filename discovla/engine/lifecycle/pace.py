"""How long each rank works for a step, so that one that holds the others up is named."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from discovla.engine.distributed import World, gather_objects

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
SLOW = 1.5  # times the others' median
LEAST = 0.02  # seconds more than it; what is less is no trouble


@dataclass(frozen=True, kw_only=True)
class Share:
    """Seconds a step that one rank took by itself: to wait for its batch, and in its towers' forward pass."""

    name: str
    reading: float
    towers: float

    @property
    def total(self) -> float:
        """Both."""
        return self.reading + self.towers


class Pace:
    """Measures this rank's own part of its steps, and now and then compares all ranks.

    All ranks end a step together, for they wait for each other in its collectives; what a rank does before
    the first of them tells who is waited for.  On a GPU the towers' time is that of the device, read once the
    step is over, so nothing waits for it.

    Args:
        world: of this process.
        towers: modules whose forward passes hold no collective (below ZeRO's stage 3).
        every: steps between comparisons.
        name: of this process, in messages.
    """

    def __init__(self, world: World, towers: Sequence[nn.Module], *, every: int, name: str) -> None:
        self.world, self.every, self.name = world, every, name
        self._steps, self._reading, self._towers = 0, 0.0, 0.0
        self._began: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []
        for tower in towers:
            tower.register_forward_pre_hook(self._begin)
            tower.register_forward_hook(self._end)

    def reading(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with the time it took to get each."""
        iterator = iter(items)
        while True:
            began = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._reading += time.perf_counter() - began
            yield item

    def step(self) -> list[Share] | None:
        """After a step, once its loss has been read: the shares of all ranks where it is time, else None."""
        for began, ended in self._spans:
            on_gpu = isinstance(began, torch.cuda.Event)
            self._towers += began.elapsed_time(ended) / 1000 if on_gpu else ended - began
        self._spans.clear()
        self._steps += 1
        if self._steps < self.every:
            return None
        reading, towers = self._reading / self._steps, self._towers / self._steps
        self._steps, self._reading, self._towers = 0, 0.0, 0.0
        return gather_objects(Share(name=self.name, reading=reading, towers=towers), self.world)

    def _begin(self, *_: Any) -> None:
        if not self._captured():
            self._began.append(self._now())

    def _end(self, module: nn.Module, *_: Any) -> None:
        if not self._captured():
            self._spans.append((self._began.pop(), self._now()))

    def _captured(self) -> bool:
        """Whether a CUDA graph is being recorded: its events have no time, and its replays call no hook."""
        return self.world.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _now(self) -> Any:
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slow(shares: Sequence[Share]) -> list[str]:
    """One line for every rank that takes `SLOW` times as long as the others' median."""
    lines = []
    if len(shares) == 1:
        return lines
    for rank, share in enumerate(shares):
        others = statistics.median(other.total for i, other in enumerate(shares) if i != rank)
        if share.total > max(SLOW * others, others + LEAST):
            lines.append(
                f"{share.name} is slow: {share.total:.3f} s a step by itself ({share.reading:.3f} to read, "
                f"{share.towers:.3f} in the towers), the others' median {others:.3f} s"
            )
    return lines
