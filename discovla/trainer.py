"""A run from config to results: zero-shot figures, training with resume, selection on validation, test."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from discovla.batch import BadClip, Batch
from discovla.checkpoints import METHOD, CheckpointManager, TrainState, load_trained, schedule, set_aside
from discovla.config import RunConfig
from discovla.data.dataset import read_splits
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.data.manifest import Clip
from discovla.data.quarantine import Quarantine
from discovla.drawn_world.stills import Stills
from discovla.engine.capture import check_capture, make_capture
from discovla.engine.checkpoint import CheckpointWriter, selected_weights
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World, all_reduce_sum, gather_objects, join_world, leave_world
from discovla.engine.ema import make_ema
from discovla.engine.lifecycle.heartbeat import GRACE, Heartbeat
from discovla.engine.lifecycle.pace import RankTimer, describe_slow_ranks
from discovla.engine.lifecycle.peers import Peers
from discovla.engine.lifecycle.signals import STOP_REASONS, StopSignals
from discovla.engine.log import RunLog
from discovla.engine.optim import ParameterGroup, learning_rate
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan
from discovla.errors import PeerLost, RunStopped, exit_process, is_connection_lost
from discovla.evaluate import EvalOptions, evaluate
from discovla.methods import build
from discovla.methods.base import Method
from discovla.methods.clip import CLIPConfig
from discovla.nn.logit_scale import LIMIT
from discovla.ops.dispatch import KernelUnavailable, choose
from discovla.train_step import TrainStep, set_precision

logger = logging.getLogger(__name__)

Results = dict[str, Any]
SAVED = 60.0  # seconds that a checkpoint may take which is being written when another process is lost


class Trainer:
    """One run: `run` trains (or resumes), selects on validation, and returns the test split's figures."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.directory = config.directory
        self.writer = CheckpointWriter()
        self.asked: str | None = None  # what asked to stop
        self.skipped = 0  # steps left out, for their gradients were not finite

    def run(self) -> Results | None:
        """Carry the run out.

        Returns:
            Name to figures on the test split; None where the run left early at `stop_at`.

        Raises:
            ValueError, DecodeError, OSError, FloatingPointError: what stands in the way, in one line.
            PeerLost: another process of the run is gone.
            RunStopped: a signal asked for it; a checkpoint holds every step taken.
        """
        self.watch: Heartbeat | None = None
        engine = self.config.engine
        self.signals = StopSignals()  # who is above this process is to be seen before it waits for others
        try:
            self.world = join_world(
                engine.device, rendezvous_timeout=engine.rendezvous_timeout, on_peers=self._begin_watch
            )
        except RuntimeError as error:
            self._name_lost(error)
            raise
        with self.signals:
            results = self._carried_out()
            if self.watch is not None:
                self.watch.close()
            leave_world()
            if self.asked is not None:
                self.signals.ignore()
        if self.asked is not None:
            done = f"step {self.saving.step} of {self.total}"
            raise RunStopped(
                f"stopped by {self.asked} after {done}, which is saved; resume=true goes on from there"
            )
        return results

    def _carried_out(self) -> Results | None:
        """All of the run; an error leaves the process group, and the watch's connection, as they are.

        Who waits for this process in a collective shall be ended by the launcher, not by a lost connection
        before this process has said what is wrong.
        """
        try:
            self._prepare()
            rows = self._before()
            return self._after(rows) if self._train() else None
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(self.directory)) from error
        except RuntimeError as error:
            self._name_lost(error)
            raise
        finally:
            if self.watch is not None:
                self.watch.disarm()

    def _begin_watch(self, world: World, peers: Peers) -> None:
        last = partial(self.writer.finish_within, SAVED)
        self.watch = Heartbeat(
            world,
            peers,
            timeout=self.config.engine.heartbeat_timeout,
            on_lost=partial(exit_process, before_exit=last),
        )

    def _name_lost(self, error: RuntimeError) -> None:
        """Raise PeerLost where an error comes of that."""
        if self.watch is not None and (self.watch.lost is not None or is_connection_lost(error)):
            line = self.watch.wait_for_loss(GRACE)
            if line is not None:
                raise PeerLost(f"{line}; resume=true goes on from the newest checkpoint") from error

    def _prepare(self) -> None:
        """Everything that can fail before training does so here."""
        config = self.config
        self.directory.mkdir(parents=True, exist_ok=True)
        check_capture(config.engine, self.world)
        self.splits = read_splits(config.data)
        torch.manual_seed(config.seed)  # new parameters
        self.method = build(config.model, config.method)
        fingerprint = self.method.fingerprint()
        self.loader = _train_loader(config, self.method, self.splits.get("train", []), self.world)
        self.total = config.steps or config.epochs * self.loader.steps_per_epoch
        fixed = schedule(config, self.total, len(self.loader.dataset))
        self.saving = CheckpointManager(config, self.world, fingerprint, fixed, self.writer)
        self.found = self.saving.find()
        set_precision(self.method, config.engine, self.world.device)
        self.method.to(self.world.device)
        compute_as(self.method, config.engine, self.world.device)
        if not config.resume:
            set_aside(self.directory, self.world)
        quarantine = self.directory / "quarantine.jsonl"
        clips = len(self.splits["train"]) if "train" in self.splits else len(self.loader.dataset)
        self.quarantine = Quarantine(quarantine, clips=clips, share=config.data.bad_clip_share)

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
        how = EvalOptions(
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
        towers = [self.method.vision, self.method.text]
        self.pace = RankTimer(
            self.world, towers, every=config.engine.straggler_check_every, name=self._name()
        )
        how = (config.engine.grad_scale, config.engine.grad_cache_chunks, config.engine.comm_dtype)
        step = TrainStep(self.method, self.world, *how)
        self.strategy = make_strategy(step, plan)
        step.recorded = make_capture(step.losses, self.strategy.trained.values(), config.engine, self.world)
        self.average = make_ema(self.strategy, config.optim.ema)
        first = self._resume()
        self.log = RunLog(self.directory, self.world, total=self.total, start=first)
        last = min(self.total, config.stop_at or self.total)
        try:
            self.log.describe(config.to_json())
            if first == 0 and "val" in self.splits:
                self._validate(0)  # where training starts from, and that every clip can be read
                self.log.reset_clock()
            self._steps(first, last)
            self.saving.finish()
        finally:
            self.log.close()
        return last == self.total and self.asked is None

    def _steps(self, first: int, last: int) -> None:
        """Steps first .. last - 1, or until a signal asks to stop; a checkpoint holds all that were taken."""
        for step, batch in self.pace.time_loading(self._batches(first, last)):
            batch = self._agreed(step, batch)
            if self.asked is not None:
                if self.saving.step != step:
                    self._save(step, None)
                return
            self._step(step, batch)
            self._after_step(step + 1, last)

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
        losses = self.strategy(batch.to(self.world.device))
        guarded = self.config.optim.skip_nonfinite > 0
        if not guarded and not losses.total.isfinite():
            raise FloatingPointError(f"step {step}: expected a finite loss, found {losses.total.item()}")
        self.strategy.backward(losses.total)
        values = {"lr": lr}
        try:
            values["grad_norm"] = self.strategy.step(lr)
        except FloatingPointError as error:  # on every rank, for the norm is that of all
            if not guarded:
                raise
            self._skip(step, error)
        else:
            self._clip_logit_scale()
            if self.average is not None:
                self.average.update()
            terms = {name: value.item() for name, value in {"loss": losses.total, **losses.terms}.items()}
            values = terms | values
        if self.skipped:
            values["skipped_steps"] = self.skipped
        if self.quarantine.known:
            values["bad_clips"] = len(self.quarantine.known)
        self.log.step(step, clips=self.config.batch_size, values=values)

    def _skip(self, step: int, error: FloatingPointError) -> None:
        """Count a step that was left out.

        Raises:
            FloatingPointError: it is one too many.
        """
        self.skipped += 1
        allowed = self.config.optim.skip_nonfinite
        if self.skipped > allowed:
            raise FloatingPointError(
                f"step {step}: optim.skip_nonfinite: expected at most {allowed} steps to leave out, "
                f"found one more: {error}"
            ) from None
        logger.warning("step %d left out, %d of at most %d: %s", step, self.skipped, allowed, error)

    def _agreed(self, step: int, batch: Batch) -> Batch:
        """The batch with its bad clips written down, and whether a signal asks to stop: alike on all ranks.

        `valid` is None where no rank has a bad clip.  One sum over ranks, on the CPU, serves both.
        """
        self.saving.check()
        counts = all_reduce_sum(torch.tensor([len(batch.bad), *self.signals.counts()]), self.world).tolist()
        self.asked = next((name for name, count in zip(STOP_REASONS, counts[1:], strict=True) if count), None)
        if not counts[0]:
            return replace(batch, valid=None)
        bad: list[BadClip] = [clip for share in gather_objects(batch.bad, self.world) for clip in share]
        self.quarantine.add(bad, write=self.world.first)
        if len(bad) == self.config.batch_size:
            raise ValueError(f"step {step}: expected a clip that can be read, found none among {len(bad)}")
        return batch

    def _clip_logit_scale(self) -> None:
        """Keep a trained logit scale below 100, in whatever copy the strategy holds."""
        name = f"{METHOD}logit_scale.log"
        log = self.method.logit_scale.log
        if name in self.strategy.trained and log.item() > torch.tensor(LIMIT, dtype=log.dtype).item():
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
        shares = self.pace.step()
        for line in describe_slow_ranks(shares) if shares else []:
            logger.warning("step %d: %s", done, line)
            self.log.event("slow", done, {"rank": line})
        self.log.reset_clock()

    def _save(self, done: int, better: float | None) -> None:
        """Begin a checkpoint of `done` steps; `better` is its score where it is the best so far."""
        trains = TrainState(strategy=self.strategy, average=self.average)
        held = self.saving.save(trains, done, better=better, state={"skipped": self.skipped})
        self.log.event("checkpoint", done, {"held_seconds": held})

    def _resume(self) -> int:
        """Put back what the checkpoint holds; the step to go on from."""
        if self.found is None:
            return 0
        found, self.found = self.found, None
        self.saving.restore(found, TrainState(strategy=self.strategy, average=self.average))
        self.skipped = found.meta.get("state", {}).get("skipped", 0)
        logger.info("resuming at step %d of %d from %s", found.step, self.total, found.path)
        return found.step

    def _name(self) -> str:
        """Of this process, for messages."""
        return str(self.watch.members[self.world.rank]) if self.watch is not None else "the only rank"

    def _validate(self, done: int) -> float | None:
        """Figures on the validation split; their score where it is the best so far."""
        with self.strategy.gathered(), nullcontext() if self.average is None else self.average.applied():
            figures = self._evaluate(self.method, "val")["raw"]
        self.log.evaluation(done, "val", figures)
        return self.saving.better(figures["t2v"]["R@1"] + figures["v2t"]["R@1"])

    def _after(self, rows: Results) -> Results | None:
        """Figures of the selected step on the test split, beside those before training."""
        selected = self.saving.selected() if "val" in self.splits else None
        step = self.total
        if selected is not None:
            step = selected.step
            load_trained(self.strategy, selected_weights(selected))
        elif self.average is not None:
            self.strategy.load_trained_state(self.average.state())
        with self.strategy.gathered():
            figures = self._evaluate(self.method, "test", rerank=True)
        name = f"{self.config.method.name}, step {step}"
        rows[name] = figures.pop("raw")
        rows |= {f"{name} + {how}": values for how, values in figures.items()}
        if self.world.first:
            _write_json(self.directory / "results.json", rows)
        return rows if self.world.first else None


def compute_as(method: Method, engine: EngineConfig, device: torch.device) -> None:
    """Let the towers' blocks be computed as the config says.

    Raises:
        ValueError: the implementation it names cannot run here, with the reason.
    """
    like = torch.empty(1, dtype=method.compute_dtype, device=device)
    try:
        choose("block", engine.impl, device.type, operands=(like,))
    except KernelUnavailable as error:
        raise ValueError(f"engine.impl: {error}") from None
    for tower in (method.vision, method.text):
        tower.impl, tower.memory = engine.impl, engine.memory
    method.text.distinct = engine.distinct_captions


def _train_loader(config: RunConfig, method: Method, clips: list[Clip], world: World) -> TrainLoader:
    """Return the loader of the training clips, or of drawn stills if the config has them."""
    data, longest = config.data, method.architecture.context_length
    if data.context_length > longest:
        raise ValueError(f"data.context_length: expected at most {longest}, found {data.context_length}")
    spec = BatchSpec(
        batch_size=config.batch_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        image_size=method.architecture.image_size,
        context_length=data.context_length,
        frame_captions=method.needs_frame_captions,
    )
    stills = None if data.stills is None else Stills(seed=config.seed, **data.stills.model_dump())
    return TrainLoader(clips if stills is None else stills, data, spec)


def _groups(method: Method) -> list[ParameterGroup]:
    """The method's parameters with a rate or decay of their own, by their names in the train step."""
    return [
        ParameterGroup(
            names=tuple(f"{METHOD}{name}" for name in group.names),
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
