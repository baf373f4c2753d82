"""The checkpoints of a run: which one it goes on from, what it writes, and which step was best."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

from discovla.config import RunConfig
from discovla.data.loader import DataConfig
from discovla.data.source import pixels
from discovla.engine import checkpoint
from discovla.engine.distributed import World, barrier, gather_objects
from discovla.engine.log import METRICS
from discovla.engine.strategy import Strategy

logger = logging.getLogger(__name__)

# what of the data decides which batches a run sees; the rest may change when it is resumed
SEEN = ("frames", "sampling", "sample_rate", "sampling_divisor", "sampling_slice", "context_length")
SEEN += ("augment", "long_captions", "damaged")
METHOD = "method."  # where the method lies in what the strategy trains


class Saving:
    """What a run reads from and writes to `directory/checkpoints`.

    Args:
        config: of the run.
        world: of this process; the first one writes.
        fingerprint: of the method that the checkpoints belong to.
        schedule: what the rest of an interrupted run depends on besides, see `schedule`.
    """

    def __init__(
        self, config: RunConfig, world: World, fingerprint: dict[str, Any], schedule: dict[str, Any]
    ) -> None:
        self.config, self.world = config, world
        self.fingerprint, self.schedule = fingerprint, schedule
        self.directory = config.directory / "checkpoints"

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
        # a checkpoint older than an option of the data began with its default
        older = {f"data.{key}": DataConfig.model_fields[key].default for key in SEEN} | {"pixels": "decoded"}
        for key, value in self.schedule.items():
            began = found.meta["schedule"].get(key, older.get(key))
            if value != began:
                raise ValueError(f"{found.path}: {key}: the run began with {began!r}, found {value!r}")
        return found

    def restore(self, found: checkpoint.Checkpoint, strategy: Strategy) -> None:
        """Put back what a checkpoint holds."""
        load_trained(strategy, found)
        strategy.load_optimizer_state(found.tensors["optimizer"])
        if found.meta["better"] is not None and self.world.first:
            known = checkpoint.best(self.directory)  # the run may have ended before it wrote this down
            if known is None or found.meta["better"] > known[1]:
                checkpoint.set_best(self.directory, found.path, found.meta["better"])
        barrier(self.world)

    def better(self, score: float) -> float | None:
        """The score, where it is the best so far."""
        known = checkpoint.best(self.directory)
        better = score if known is None or score > known[1] else None
        return gather_objects(better, self.world)[0]  # on GPUs the last bits may differ between ranks

    def save(self, strategy: Strategy, done: int, better: float | None) -> None:
        """A checkpoint of `done` steps; `better` is its score where it is the best so far."""
        trained, optimizer = strategy.trained_state(), strategy.optimizer_state()
        if self.world.first:
            tensors = {
                "trained": {name.removeprefix(METHOD): tensor for name, tensor in trained.items()},
                "optimizer": optimizer,
            }
            meta = {
                "fingerprint": self.fingerprint,
                "schedule": self.schedule,
                "better": better,
                "config": json.loads(self.config.to_json()),
            }
            path = checkpoint.save(self.directory, step=done, tensors=tensors, meta=meta)
            if better is not None:
                checkpoint.set_best(self.directory, path, better)
            checkpoint.keep(self.directory, self.config.keep_checkpoints)
        barrier(self.world)

    def selected(self) -> checkpoint.Checkpoint | None:
        """The best checkpoint, where one was selected."""
        found = checkpoint.best(self.directory)
        return None if found is None else checkpoint.load(found[0])


def load_trained(strategy: Strategy, found: checkpoint.Checkpoint) -> None:
    """Put the trained parameters of a checkpoint into what the strategy trains."""
    strategy.load_trained_state({f"{METHOD}{name}": x for name, x in found.tensors["trained"].items()})


def schedule(config: RunConfig, total: int, pairs: int) -> dict[str, Any]:
    """What the rest of an interrupted run depends on besides the method, by dotted key.

    Args:
        config: of the run.
        total: its steps.
        pairs: that it trains on.
    """
    fixed: dict[str, Any] = {"seed": config.seed, "batch_size": config.batch_size, "steps": total}
    fixed |= {"training pairs": pairs, "pixels": pixels(config.data)}
    fixed |= {f"optim.{key}": value for key, value in config.optim.model_dump(mode="json").items()}
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
