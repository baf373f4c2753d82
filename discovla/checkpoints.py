"""The checkpoints of a run: resuming from the newest, writing in the background, selecting the best."""

from __future__ import annotations

import itertools
import json
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discovla.config import RENAMED_KEYS, RunConfig
from discovla.data.config import DataConfig
from discovla.data.dataset import frame_origin
from discovla.data.fingerprint import DataFingerprint, differences
from discovla.engine import checkpoint
from discovla.engine.distributed import World, barrier, gather_objects
from discovla.engine.ema import EMA
from discovla.engine.log import METRICS
from discovla.engine.optim import OptimConfig
from discovla.engine.strategy import Strategy
from discovla.lock import WriterLock
from discovla.train_step import METHOD

logger = logging.getLogger(__name__)

RESULTS = "results.json"  # of a finished run
# options of the data that decide the batches of a run; the others may change when it is resumed
BATCH_OPTIONS = (
    *("frames", "sampling", "sample_rate", "sampling_divisor", "sampling_slice", "context_length"),
    *("tokenizer", "resize", "interpolation"),
    *("augment", "long_captions", "damaged", "hdr", "reversed_pairs", "order_words", "exchanges"),
)


@dataclass(kw_only=True)
class TrainState:
    """The state of training that changes from step to step.

    strategy: holds parameters and optimizer.  ema: moving average of the parameters, if the run has one.
    step: steps taken.  skipped_steps: those left out because their gradient was not finite.
    """

    strategy: Strategy
    ema: EMA | None
    step: int = 0
    skipped_steps: int = 0


class CheckpointManager:
    """Reads and writes `directory/checkpoints`.

    A checkpoint is copied to the CPU between two steps and written by a thread while training continues; an
    error of the thread is raised at the next step.

    Args:
        config: of the run.
        world: of this process; only the first one writes.
        writer: the thread.
        fingerprint: of the method, which a checkpoint must match.
        data: fingerprint of the clips, which a checkpoint must match but for `allow_changed_data`.
        total_steps: of the run.
        pairs: number of training pairs.
        lock: of the run directory, which must be held whenever a checkpoint is written.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        writer: checkpoint.CheckpointWriter,
        *,
        fingerprint: dict[str, Any],
        data: DataFingerprint,
        total_steps: int,
        pairs: int,
        lock: WriterLock | None,
    ) -> None:
        self.config, self.world = config, world
        self.directory = config.directory / "checkpoints"
        self.fingerprint, self.data = fingerprint, data
        self._best_is_comparable = True  # False if the validation split has changed
        self.fixed = fixed_options(config, total_steps, pairs)
        self.best_score: float | None = None
        self.newest_step: int | None = None
        self._newest: checkpoint.Checkpoint | None = None  # until it is restored
        self._writer, self._lock = writer, lock

    @property
    def resumes(self) -> bool:
        """True if training goes on from a checkpoint, which `restore` has not loaded yet."""
        return self._newest is not None

    @property
    def kept_threads(self) -> int | None:
        """Number of torch's threads with which the checkpoint to resume was trained; None without one."""
        if self._newest is None:
            return None
        return self._newest.meta.get("state", {}).get("threads", torch.get_num_threads())

    def find_newest(self) -> None:
        """Find the newest complete checkpoint if the run resumes, and check that it belongs to this run.

        Raises:
            CheckpointError: it belongs to another method or other weights.
            ValueError: the processes see different files, or an option or clips that must not change have
                changed.
        """
        newest = checkpoint.latest(self.directory) if self.config.resume else None
        steps = gather_objects(None if newest is None else newest.step, self.world)
        if len(set(steps)) > 1:
            raise ValueError(f"{self.directory}: expected the same files for all processes, found {steps}")
        if newest is None:
            return
        checkpoint.check_fingerprint(newest.meta["fingerprint"], self.fingerprint, str(newest.path))
        self._check_data(newest)
        stored = {RENAMED_KEYS.get(key, key): value for key, value in newest.meta["schedule"].items()}
        # a checkpoint older than an option was trained with its default
        defaults = {f"data.{key}": DataConfig.model_fields[key].default for key in BATCH_OPTIONS}
        defaults |= {f"optim.{key}": field.default for key, field in OptimConfig.model_fields.items()}
        defaults["pixels"] = "decoded"
        for key, value in self.fixed.items():
            if key == "training pairs" and self.config.allow_changed_data:
                continue
            began_with = stored.get(key, defaults.get(key))
            if value != began_with:
                raise ValueError(f"{newest.path}: {key}: the run began with {began_with!r}, found {value!r}")
        self._newest = newest

    def _check_data(self, newest: checkpoint.Checkpoint) -> None:
        """Refuse clips that differ from those of a checkpoint, or log the differences if they may change."""
        began_with = newest.meta.get("data")
        if began_with is None:
            logger.warning("%s: written without a fingerprint of its clips: not checked", newest.path)
            return
        differing = "; ".join(differences(began_with, self.data))
        if not differing:
            return
        source = "data.manifest" if self.config.data.shards is None else "data.shards"
        if not self.config.allow_changed_data:
            raise ValueError(
                f"{newest.path}: {source}: {differing}; resume with the clips of the beginning, or with "
                "allow_changed_data=true, which goes on with these and measures the zero-shot rows anew"
            )
        logger.warning("%s: %s: goes on with changed data: %s", newest.path, source, differing)
        self._best_is_comparable = "val: " not in differing

    def restore(self, state: TrainState) -> None:
        """Load the checkpoint of `find_newest`, if there is one, into the state."""
        newest, self._newest = self._newest, None
        if newest is None:
            return
        load_trained(state.strategy, newest.tensors["trained"])
        if state.ema is not None:
            state.ema.load(_prefixed(newest.tensors["average"]))
        state.strategy.load_optimizer_state(newest.tensors["optimizer"])
        state.step = self.newest_step = newest.step
        state.skipped_steps = newest.meta.get("state", {}).get("skipped", 0)
        if self.world.first:
            checkpoint.reselect_best(self.directory, newest.step)
        barrier(self.world)
        best = checkpoint.best(self.directory)
        self.best_score = None if best is None or not self._best_is_comparable else best[1]
        logger.info("resuming at step %d of %d from %s", newest.step, self.fixed["steps"], newest.path)

    def select(self, step: int, score: float) -> bool:
        """Mark the checkpoint of a step as the best if its score is the highest so far; return True if it is.

        Waits until the checkpoint is written.

        Raises:
            CheckpointError: it could not be written.
        """
        score = gather_objects(score, self.world)[0]  # on GPUs the last bits may differ between ranks
        self._writer.wait()
        if self.best_score is not None and score <= self.best_score:
            return False
        self.best_score = score
        if self.world.first:
            if self._lock is not None:
                self._lock.check()
            checkpoint.set_best(self.directory, checkpoint.step_folder(self.directory, step), score)
            checkpoint.prune(self.directory, self.config.keep_checkpoints)
        return True

    def save(self, state: TrainState) -> float:
        """Begin to write a checkpoint.

        Args:
            state: to save, on every process.

        Returns:
            Seconds that training had to wait: for copies, and for the write before.

        Raises:
            CheckpointError: the write before failed.
        """
        began = time.perf_counter()
        trained, optimizer = state.strategy.trained_state(), state.strategy.optimizer_state()
        average = None if state.ema is None else state.ema.state()
        self.newest_step = state.step
        if self.world.first:
            tensors = {"trained": _unprefixed(trained), "optimizer": optimizer}
            if average is not None:
                tensors["average"] = _unprefixed(average)
            meta = {
                "fingerprint": self.fingerprint,
                "data": self.data,
                "schedule": self.fixed,
                "state": {"skipped": state.skipped_steps, "threads": torch.get_num_threads()},
                "config": json.loads(self.config.to_json()),
            }
            self._writer.start(partial(self._write, state.step, tensors, meta))
        return time.perf_counter() - began

    def check_writer(self) -> None:
        """Raise the error of a write that has failed."""
        self._writer.check()

    def finish(self) -> None:
        """Wait on every rank until everything is written."""
        self._writer.wait()
        barrier(self.world)

    def load_selected(self, state: TrainState) -> int | None:
        """Load the parameters of the best checkpoint and return its step; None if none was selected."""
        best = checkpoint.best(self.directory)
        if best is None:
            return None
        selected = checkpoint.load(best[0])
        load_trained(state.strategy, checkpoint.selected_weights(selected))
        return selected.step

    def _write(self, step: int, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write a checkpoint and remove old ones; runs in the writer's thread."""
        if self._lock is not None:
            self._lock.check()
        checkpoint.save(self.directory, step=step, tensors=tensors, meta=meta)
        checkpoint.prune(self.directory, self.config.keep_checkpoints)


def fixed_options(config: RunConfig, total_steps: int, pairs: int) -> dict[str, Any]:
    """Return, by dotted key, the options that must not change when a run is resumed, besides the method's."""
    data = config.data.model_dump(mode="json")
    optim = config.optim.model_dump(mode="json", exclude={"skip_nonfinite"})
    return {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "steps": total_steps,
        "training pairs": pairs,
        "pixels": frame_origin(config.data),
        **{f"optim.{key}": value for key, value in optim.items()},
        **{f"data.{key}": data[key] for key in BATCH_OPTIONS},
    }


def load_trained(strategy: Strategy, trained: dict[str, Tensor]) -> None:
    """Load a method's trained parameters into a strategy."""
    strategy.load_trained_state(_prefixed(trained))


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names in `TrainStep`."""
    return {f"{METHOD}{name}": x for name, x in tensors.items()}


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names in the method."""
    return {name.removeprefix(METHOD): x for name, x in tensors.items()}


def keep_earlier_run(directory: Path, world: World, lock: WriterLock | None) -> None:
    """Rename the directory of an earlier run to the first free `directory.N`, after a line that says so.

    The lock stays behind.
    """
    if world.first and ((directory / "checkpoints").exists() or (directory / METRICS).exists()):
        names = (directory.with_name(f"{directory.name}.{n}") for n in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        state = "a finished run" if (directory / RESULTS).is_file() else "an unfinished run"
        logger.warning(
            "%s holds %s: it is kept as %s, and a new run starts here; "
            "resume=true continues a run instead, directory=PATH starts elsewhere",
            directory,
            state,
            kept,
        )
        directory.rename(kept)
        directory.mkdir()
        if lock is not None:
            lock.move(directory, renamed=kept)
    barrier(world)
