"""A run from config to results: zero-shot figures, training with resume, selection on validation, test."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from discovla.batch import BadClip, Batch
from discovla.config import RunConfig
from discovla.data.clips import check_captions
from discovla.data.loader import DataConfig, LoaderShape, TrainLoader
from discovla.data.manifest import Clip, check_clips
from discovla.data.quarantine import Quarantine, without_quarantined
from discovla.data.source import pixels, read_clips
from discovla.data.stills import Stills
from discovla.engine import checkpoint
from discovla.engine.distributed import (
    all_reduce_sum,
    barrier,
    gather_objects,
    start,
    stop,
)
from discovla.engine.log import METRICS, RunLog
from discovla.engine.optim import ParameterGroup, learning_rate
from discovla.engine.strategy import StepPlan, cast_frozen, make_strategy
from discovla.evaluate import Evaluation, evaluate
from discovla.methods import build
from discovla.methods.base import Method
from discovla.methods.clip import CLIPConfig
from discovla.nn.logit_scale import LIMIT
from discovla.train_step import TrainStep

logger = logging.getLogger(__name__)

Results = dict[str, Any]
# what of the data decides which batches a run sees; the rest may change when it is resumed
SEEN = ("frames", "sampling", "sample_rate", "sampling_divisor", "sampling_slice", "context_length")
SEEN += ("augment", "long_captions", "damaged")


class Trainer:
    """One run: `run` trains (or resumes), selects on validation, and returns the test split's figures."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.directory = config.directory
        self.checkpoints = config.directory / "checkpoints"

    def run(self) -> Results | None:
        """Carry the run out.

        Returns:
            Name to figures on the test split; None where the run left early at `stop_at`.

        Raises:
            ValueError, DecodeError, OSError, FloatingPointError: what stands in the way, in one line.
        """
        self.world = start(self.config.engine.device)
        # An error leaves the process group as it is: who waits for it in a collective shall be ended
        # by the launcher, not by a lost connection before this process has said what is wrong.
        try:
            self._prepare()
            rows = self._before()
            results = self._after(rows) if self._train() else None
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(self.directory)) from error
        stop()
        return results

    def _prepare(self) -> None:
        """Everything that can fail before training does so here."""
        config = self.config
        self.directory.mkdir(parents=True, exist_ok=True)
        self.splits = _read_splits(config)
        torch.manual_seed(config.seed)  # new parameters
        self.method = build(config.model, config.method)
        self.fingerprint = self.method.fingerprint()
        self.loader = self._loader()
        self.total = config.steps or config.epochs * self.loader.steps_per_epoch
        self.found = self._found()
        if config.engine.precision == "bf16":
            self.method.compute_dtype = torch.bfloat16
            if not config.engine.bf16_parameters:
                cast_frozen(self.method, torch.bfloat16)
        self.method.to(self.world.device)
        if not config.resume:
            self._set_aside()
        quarantine = self.directory / "quarantine.jsonl"
        clips = len(self.splits["train"]) if "train" in self.splits else len(self.loader.source)
        self.quarantine = Quarantine(quarantine, clips=clips, share=config.data.bad_clip_share)

    def _loader(self) -> TrainLoader:
        """Training batches, once the clips they come from have been checked."""
        config, data = self.config, self.config.data
        longest = self.method.architecture.context_length
        if data.context_length > longest:
            raise ValueError(f"data.context_length: expected at most {longest}, found {data.context_length}")
        shape = LoaderShape(
            batch_size=config.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=config.seed,
            image_size=self.method.architecture.image_size,
            context_length=data.context_length,
            frame_captions=self.method.needs_frame_captions,
        )
        if data.stills is not None:
            return TrainLoader(Stills(seed=config.seed, **data.stills.model_dump()), data, shape)
        return TrainLoader(self.splits["train"], data, shape)

    def _set_aside(self) -> None:
        """Keep what an earlier run left in the directory, under another name."""
        if self.world.first and (self.checkpoints.exists() or (self.directory / METRICS).exists()):
            number = next(n for n in itertools.count(1) if not _numbered(self.directory, n).exists())
            self.directory.rename(_numbered(self.directory, number))
            self.directory.mkdir()
            logger.warning(
                "%s: kept the earlier run as %s", self.directory, _numbered(self.directory, number)
            )
        barrier(self.world)

    def _before(self) -> Results:
        """Zero-shot figures on the test split: CLIP with mean pooling, and the method before training."""
        kept = self.directory / "before.json"
        if self.config.resume and kept.is_file():
            return json.loads(kept.read_text())
        rows = {}
        if self.config.method.name != "clip":
            plain = build(self.config.model, CLIPConfig(tune="frozen")).to(self.world.device)
            rows["zero-shot, mean pooling"] = self._evaluate(plain, "test")["raw"]
        rows[f"zero-shot, {self.config.method.name} untrained"] = self._evaluate(self.method, "test")["raw"]
        if self.world.first:
            _write_json(kept, rows)
        return rows

    def _evaluate(self, method: Method, split: str, *, rerank: bool = False) -> dict[str, Any]:
        bank = [text for clip in self.splits.get("train", []) for text in clip.captions] if rerank else []
        how = Evaluation(
            data=self.config.data,
            device=self.world.device,
            batch_size=self.config.eval_batch_size,
            rerank=rerank,
            bank=bank,
            rank=self.world.rank,
            world_size=self.world.size,
            gather=lambda share: gather_objects(share, self.world),
        )
        return evaluate(method, self.splits[split], how)

    def _train(self) -> bool:
        """All steps from where the last run stopped; false where it left early."""
        config = self.config
        plan = StepPlan(
            engine=config.engine,
            optim=config.optim,
            world=self.world,
            batch_size=config.batch_size,
            groups=_groups(self.method),
        )
        self.strategy = make_strategy(TrainStep(self.method, self.world, config.engine.grad_scale), plan)
        first = self._resume()
        self.log = RunLog(self.directory, self.world, total=self.total, start=first)
        last = min(self.total, config.stop_at or self.total)
        try:
            self.log.describe(config.to_json())
            if first == 0 and "val" in self.splits:
                self._validate(0)  # where training starts from, and that every clip can be read
                self.log.resume_clock()
            for step, batch in self._batches(first, last):
                self._step(step, batch)
                self._after_step(step + 1, last)
        finally:
            self.log.close()
        return last == self.total

    def _batches(self, first: int, last: int) -> Iterator[tuple[int, Batch]]:
        """Steps first .. last - 1 with their batches, over epochs."""
        step = first
        while step < last:
            epoch, done = divmod(step, self.loader.steps_per_epoch)
            for batch in self.loader.epoch(epoch, start=done):
                yield step, batch
                step += 1
                if step == last:
                    return

    def _step(self, step: int, batch: Batch) -> None:
        """One optimiser step.

        Raises:
            FloatingPointError: the loss or its gradient is not finite.
        """
        # dropout and the like depend on (seed, step, rank) alone, so nothing random needs to be saved
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 4_096 + self.world.rank)
        lr = learning_rate(step, self.total, self.config.optim)
        losses = self.strategy(self._checked(step, batch).to(self.world.device))
        if not losses.total.isfinite():
            raise FloatingPointError(f"step {step}: expected a finite loss, found {losses.total.item()}")
        self.strategy.backward(losses.total)
        norm = self.strategy.step(lr)
        self._clip_logit_scale()
        values = {name: value.item() for name, value in {"loss": losses.total, **losses.terms}.items()}
        values |= {"lr": lr, "grad_norm": norm}
        if self.quarantine.known:
            values["bad_clips"] = len(self.quarantine.known)
        self.log.step(step, clips=self.config.batch_size, values=values)

    def _checked(self, step: int, batch: Batch) -> Batch:
        """The batch with its bad clips written down; `valid` is None where no rank has any."""
        count = torch.tensor(len(batch.bad))
        if not all_reduce_sum(count, self.world).item():
            return replace(batch, valid=None)
        bad: list[BadClip] = [clip for share in gather_objects(batch.bad, self.world) for clip in share]
        self.quarantine.add(bad, write=self.world.first)
        if len(bad) == self.config.batch_size:
            raise ValueError(f"step {step}: expected a clip that can be read, found none among {len(bad)}")
        return batch

    def _clip_logit_scale(self) -> None:
        """Keep a trained logit scale below 100, in whatever copy the strategy holds."""
        name = "method.logit_scale.log"
        if name in self.strategy.trained and self.method.logit_scale.log.item() > LIMIT:
            state = self.strategy.trained_state()
            state[name] = state[name].clamp(max=LIMIT)
            self.strategy.load_trained_state(state)

    def _after_step(self, done: int, last: int) -> None:
        """Evaluate and save where it is due; `done` steps have been taken."""
        config = self.config
        whole = done == self.total or done % self.loader.steps_per_epoch == 0
        better = None
        if "val" in self.splits and (whole or _every(config.evaluate_every, done)):
            better = self._validate(done)
        if whole or done == last or better is not None or _every(config.checkpoint_every, done):
            self._save(done, better)
        self.log.resume_clock()

    def _found(self) -> checkpoint.Checkpoint | None:
        """The newest whole checkpoint, where the run is to go on from one.

        Raises:
            CheckpointError: it is that of another method or other weights.
            ValueError: the run would go on otherwise than it began.
        """
        found = checkpoint.latest(self.checkpoints) if self.config.resume else None
        step = None if found is None else found.step
        steps = gather_objects(step, self.world)
        if len(set(steps)) > 1:
            raise ValueError(f"{self.checkpoints}: expected the same files for all processes, found {steps}")
        if found is None:
            return None
        checkpoint.check_fingerprint(found.meta["fingerprint"], self.fingerprint, str(found.path))
        # a checkpoint older than an option of the data began with its default
        older = {f"data.{key}": DataConfig.model_fields[key].default for key in SEEN} | {"pixels": "decoded"}
        for key, value in self._schedule().items():
            began = found.meta["schedule"].get(key, older.get(key))
            if value != began:
                raise ValueError(f"{found.path}: {key}: the run began with {began!r}, found {value!r}")
        return found

    def _resume(self) -> int:
        """Put back what the checkpoint holds; the step to go on from."""
        if self.found is None:
            return 0
        found, self.found = self.found, None
        trained = {f"method.{name}": tensor for name, tensor in found.tensors["trained"].items()}
        self.strategy.load_trained_state(trained)
        self.strategy.load_optimizer_state(found.tensors["optimizer"])
        if found.meta["better"] is not None and self.world.first:
            known = checkpoint.best(self.checkpoints)  # the run may have ended before it wrote this down
            if known is None or found.meta["better"] > known[1]:
                checkpoint.set_best(self.checkpoints, found.path, found.meta["better"])
        barrier(self.world)
        logger.info("resuming at step %d of %d from %s", found.step, self.total, found.path)
        return found.step

    def _schedule(self) -> dict[str, Any]:
        """What the rest of an interrupted run depends on besides the method, by dotted key."""
        config = self.config
        fixed: dict[str, Any] = {"seed": config.seed, "batch_size": config.batch_size, "steps": self.total}
        fixed |= {"training pairs": len(self.loader.source), "pixels": pixels(config.data)}
        fixed |= {f"optim.{key}": value for key, value in config.optim.model_dump(mode="json").items()}
        data = config.data.model_dump(mode="json")
        return fixed | {f"data.{key}": data[key] for key in SEEN}

    def _validate(self, done: int) -> float | None:
        """Figures on the validation split; their score where it is the best so far."""
        with self.strategy.whole():
            figures = self._evaluate(self.method, "val")["raw"]
        self.log.evaluation(done, "val", figures)
        score = figures["t2v"]["R@1"] + figures["v2t"]["R@1"]
        known = checkpoint.best(self.checkpoints)
        better = score if known is None or score > known[1] else None
        return gather_objects(better, self.world)[0]  # on GPUs the last bits may differ between ranks

    def _save(self, done: int, better: float | None) -> None:
        """A checkpoint of `done` steps; `better` is its score where it is the best so far."""
        trained, optimizer = self.strategy.trained_state(), self.strategy.optimizer_state()
        if self.world.first:
            tensors = {
                "trained": {name.removeprefix("method."): tensor for name, tensor in trained.items()},
                "optimizer": optimizer,
            }
            meta = {
                "fingerprint": self.fingerprint,
                "schedule": self._schedule(),
                "better": better,
                "config": json.loads(self.config.to_json()),
            }
            path = checkpoint.save(self.checkpoints, step=done, tensors=tensors, meta=meta)
            if better is not None:
                checkpoint.set_best(self.checkpoints, path, better)
            checkpoint.keep(self.checkpoints, self.config.keep_checkpoints)
        barrier(self.world)

    def _after(self, rows: Results) -> Results | None:
        """Figures of the selected step on the test split, beside those before training."""
        selected = checkpoint.best(self.checkpoints) if "val" in self.splits else None
        step = self.total
        if selected is not None:
            kept = checkpoint.load(selected[0])
            step = kept.step
            self.strategy.load_trained_state({f"method.{n}": t for n, t in kept.tensors["trained"].items()})
        with self.strategy.whole():
            figures = self._evaluate(self.method, "test", rerank=True)
        name = f"{self.config.method.name}, step {step}"
        rows[name] = figures.pop("raw")
        rows |= {f"{name} + {how}": values for how, values in figures.items()}
        if self.world.first:
            _write_json(self.directory / "results.json", rows)
        return rows if self.world.first else None


def _groups(method: Method) -> list[ParameterGroup]:
    """The method's parameters with a rate or decay of their own, by their names in the train step."""
    return [
        ParameterGroup(
            names=tuple(f"method.{name}" for name in group.names),
            lr_scale=group.lr_scale,
            weight_decay=group.weight_decay,
        )
        for group in method.parameter_groups()
    ]


def _write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".writing-{path.name}")
    part.write_text(json.dumps(value, indent=2))
    part.replace(path)


def _every(period: int | None, done: int) -> bool:
    return period is not None and done % period == 0


def _numbered(directory: Path, number: int) -> Path:
    return directory.with_name(f"{directory.name}.{number}")


def _read_splits(config: RunConfig) -> dict[str, list[Clip]]:
    """Checked clips of the splits a run uses; the test split is never trained on nor selected by."""
    data = config.data
    names = {"train": data.train_split, "val": data.val_split, "test": data.test_split}
    if data.stills is not None:
        del names["train"]
    splits = {use: read_clips(data, name) for use, name in names.items() if name}
    chosen = list(names.values())
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"data: expected different splits to train, select and test on, found {chosen}")
    if data.quarantine is not None and "train" in splits:
        splits["train"] = without_quarantined(splits["train"], data.quarantine)
    for use in ("val", "test"):
        if use in splits:
            check_clips(splits[use], files=data.shards is None)
            check_captions(splits[use], data.context_length, long=data.long_captions)
    return splits
