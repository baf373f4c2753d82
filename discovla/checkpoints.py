"""The checkpoints of a run: which one it goes on from, what it writes, and which step was best."""

from __future__ import annotations

import itertools
import json
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from discovla.config import RunConfig
from discovla.data.dataset import frame_origin
from discovla.data.loader import DataConfig
from discovla.engine import checkpoint
from discovla.engine.checkpoint import CheckpointWriter
from discovla.engine.distributed import World, barrier, gather_objects
from discovla.engine.ema import EMA
from discovla.engine.log import METRICS
from discovla.engine.optim import OptimConfig
from discovla.engine.strategy import Strategy

logger = logging.getLogger(__name__)

# what of the data decides which batches a run sees; the rest may change when it is resumed
SEEN = ("frames", "sampling", "sample_rate", "sampling_divisor", "sampling_slice", "context_length")
SEEN += ("augment", "long_captions", "damaged")
METHOD = "method."  # where the method lies in what the strategy trains


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What trains: the strategy, and the average of its parameters where there is one."""

    strategy: Strategy
    average: EMA | None


class CheckpointManager:
    """What a run reads from and writes to `directory/checkpoints`.

    A checkpoint is copied to the CPU between two steps and written by a thread while training goes on; what
    goes wrong in that is raised at the next step.

    Args:
        config: of the run.
        world: of this process; the first one writes.
        fingerprint: of the method that the checkpoints belong to.
        schedule: what the rest of an interrupted run depends on besides, see `schedule`.
        writer: of the first process.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        fingerprint: dict[str, Any],
        schedule: dict[str, Any],
        writer: CheckpointWriter,
    ) -> None:
        self.config, self.world = config, world
        self.fingerprint, self.schedule = fingerprint, schedule
        self.directory = config.directory / "checkpoints"
        self.score: float | None = None  # of the best checkpoint
        self.step: int | None = None  # of the newest checkpoint
        self._writer = writer

    def find(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint, where the run is to go on from one.

        Raises:
            CheckpointError: it is that of another method or other weights.
            ValueError: the run would go on otherwise than it began.
        """
        found = checkpoint.latest(self.directory) if self.config.resume else None
        step = None if found is None else found.step
        steps = gather_objects(step, self.world)
        if len(set(steps)) > 1:
            raise ValueError(f"{self.directory}: expected the same files for all processes, found {steps}")
        if found is None:
            return None
        checkpoint.check_fingerprint(found.meta["fingerprint"], self.fingerprint, str(found.path))
        # a checkpoint older than an option began with its default
        older = {f"data.{key}": DataConfig.model_fields[key].default for key in SEEN} | {"pixels": "decoded"}
        older |= {f"optim.{key}": field.default for key, field in OptimConfig.model_fields.items()}
        for key, value in self.schedule.items():
            began = found.meta["schedule"].get(key, older.get(key))
            if value != began:
                raise ValueError(f"{found.path}: {key}: the run began with {began!r}, found {value!r}")
        return found

    def restore(self, found: checkpoint.Checkpoint, trains: TrainState) -> None:
        """Put back what a checkpoint holds."""
        strategy = trains.strategy
        load_trained(strategy, found.tensors["trained"])
        if trains.average is not None:
            trains.average.load({f"{METHOD}{name}": x for name, x in found.tensors["average"].items()})
        strategy.load_optimizer_state(found.tensors["optimizer"])
        self.step = found.step
        if self.world.first:
            checkpoint.reselect_best(self.directory, found.step)
            known, better = checkpoint.best(self.directory), found.meta["better"]
            # the run may have ended before it wrote this down
            if better is not None and (known is None or better > known[1]):
                checkpoint.set_best(self.directory, found.path, better)
        barrier(self.world)
        known = checkpoint.best(self.directory)
        self.score = None if known is None else known[1]

    def better(self, score: float) -> float | None:
        """The score, where it is the best so far."""
        score = gather_objects(score, self.world)[0]  # on GPUs the last bits may differ between ranks
        return score if self.score is None or score > self.score else None

    def save(self, trains: TrainState, done: int, *, better: float | None, state: dict[str, Any]) -> float:
        """Begin a checkpoint of `done` steps.

        Args:
            trains: what is saved.
            better: its score, where that is the best so far.
            state: what else the run needs to go on, plain JSON.

        Returns:
            Seconds that training was held up for it: copies, and the rest of a write before it.

        Raises:
            CheckpointError: of the write before.
        """
        began = time.perf_counter()
        trained, optimizer = trains.strategy.trained_state(), trains.strategy.optimizer_state()
        average = None if trains.average is None else trains.average.state()
        self.step = done
        if better is not None:
            self.score = better
        if self.world.first:
            tensors = {"trained": _of_method(trained), "optimizer": optimizer}
            if average is not None:
                tensors["average"] = _of_method(average)
            meta = {
                "fingerprint": self.fingerprint,
                "schedule": self.schedule,
                "better": better,
                "state": state,
                "config": json.loads(self.config.to_json()),
            }
            self._writer.start(partial(self._write, done, tensors, meta))
        return time.perf_counter() - began

    def check(self) -> None:
        """Raise the error of a write that has failed."""
        self._writer.check()

    def finish(self) -> None:
        """Wait until everything is written, on every rank."""
        self._writer.wait()
        barrier(self.world)

    def selected(self) -> checkpoint.Checkpoint | None:
        """The best checkpoint, where one was selected."""
        found = checkpoint.best(self.directory)
        return None if found is None else checkpoint.load(found[0])

    def _write(self, step: int, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """A checkpoint, whether it is the best, and which are kept; in the writer's thread."""
        path = checkpoint.save(self.directory, step=step, tensors=tensors, meta=meta)
        if meta["better"] is not None:
            checkpoint.set_best(self.directory, path, meta["better"])
        checkpoint.prune(self.directory, self.config.keep_checkpoints)


def load_trained(strategy: Strategy, trained: dict[str, Tensor]) -> None:
    """Put a method's trained parameters into what the strategy trains."""
    strategy.load_trained_state({f"{METHOD}{name}": x for name, x in trained.items()})


def _of_method(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of what the strategy trains by the method's names."""
    return {name.removeprefix(METHOD): x for name, x in state.items()}


def schedule(config: RunConfig, total: int, pairs: int) -> dict[str, Any]:
    """What the rest of an interrupted run depends on besides the method, by dotted key.

    Args:
        config: of the run.
        total: its steps.
        pairs: that it trains on.
    """
    fixed: dict[str, Any] = {"seed": config.seed, "batch_size": config.batch_size, "steps": total}
    fixed |= {"training pairs": pairs, "pixels": frame_origin(config.data)}
    optim = config.optim.model_dump(mode="json", exclude={"skip_nonfinite"})
    fixed |= {f"optim.{key}": value for key, value in optim.items()}
    data = config.data.model_dump(mode="json")
    return fixed | {f"data.{key}": data[key] for key in SEEN}


def set_aside(directory: Path, world: World) -> None:
    """Keep what an earlier run left in the directory, under another name."""
    if world.first and ((directory / "checkpoints").exists() or (directory / METRICS).exists()):
        number = next(n for n in itertools.count(1) if not _numbered(directory, n).exists())
        directory.rename(_numbered(directory, number))
        directory.mkdir()
        logger.warning("%s: kept the earlier run as %s", directory, _numbered(directory, number))
    barrier(world)


def _numbered(directory: Path, number: int) -> Path:
    return directory.with_name(f"{directory.name}.{number}")
