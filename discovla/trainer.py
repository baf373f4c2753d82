"""A run from start to end: zero-shot metrics, training with resume, selection on validation, test metrics."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from discovla import terminal
from discovla.batch import BadClip, Batch
from discovla.checkpoints import CheckpointManager, TrainState, keep_earlier_run
from discovla.config import RunConfig
from discovla.cpu import choose_threads
from discovla.data.dataset import read_splits
from discovla.data.fingerprint import data_fingerprint, differences
from discovla.data.loader import BatchSpec, TrainLoader, read_ahead
from discovla.data.manifest import Clip
from discovla.data.quarantine import QUARANTINE_HINT, Quarantine
from discovla.data.transfer import ReadAhead, check_shared_memory
from discovla.drawn_world.stills import Stills
from discovla.engine.capture import check_capture, make_capture
from discovla.engine.checkpoint import CheckpointWriter
from discovla.engine.config import resolve_precision, set_tf32
from discovla.engine.distributed import World, all_reduce_sum, gather_objects
from discovla.engine.ema import make_ema
from discovla.engine.lifecycle.pace import RankTimer, describe_slow_ranks
from discovla.engine.lifecycle.signals import STOP_REASONS, StopSignals
from discovla.engine.log import METRICS, RunLog, has_record, log_test
from discovla.engine.optim import ParameterGroup, learning_rate
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan
from discovla.engine.transfers import BatchCopier, LateNumbers
from discovla.errors import RunStopped
from discovla.evaluate import EvalOptions, evaluate
from discovla.features import encode_alike, frozen_loader
from discovla.files import write_file
from discovla.inputs import check_inputs
from discovla.lock import WriterLock
from discovla.methods import build
from discovla.methods.base import Method
from discovla.methods.clip import CLIPConfig
from discovla.nn.logit_scale import LIMIT
from discovla.ops import dispatch
from discovla.processes import joined_processes, sole_writer
from discovla.report.data import RunFacts, SplitFacts, device_name, machine
from discovla.report.writer import FINAL_SECONDS, save_record, try_report
from discovla.retrieval.record import EvaluationRecord
from discovla.towers.weights import weights_origin
from discovla.train_step import METHOD, TrainStep, prepare_method
from discovla.tune import tune

logger = logging.getLogger(__name__)

Results = dict[str, Any]
VAL_IS_TEST = (
    "the final figures are of %r, on which the best step is selected, and so are optimistic; "
    "`discovla prepare --test N` holds out clips to test on"
)
KEPT_BYTES = 2**30  # of features of frames, in a process, for the next evaluation of a split


def run(config: RunConfig) -> Results | None:
    """Join the processes of a run, train and test, and leave them.

    Returns:
        Name of a row to metrics on the test split; None on ranks > 0, and if the run ends early at `stop_at`.

    Raises:
        ValueError, DecodeError, OSError, FloatingPointError: what is wrong, in one line.
        PeerLost: another process of the run is gone.
        RunStopped: a signal asked to stop; a checkpoint holds every step taken.
    """
    signals = StopSignals()  # notes the launcher's processes before this one waits for others
    writer = CheckpointWriter()
    with (
        joined_processes(config, signals, writer) as (world, name),
        sole_writer(config.directory, world, signals) as lock,
    ):
        trainer = Trainer(config, world, signals=signals, writer=writer, name=name, lock=lock)
        results = trainer.run()
        if trainer.stop_reason is not None:
            signals.ignore()
    if trainer.stop_reason is not None:
        steps = f"step {trainer.checkpoints.newest_step} of {trainer.total_steps}"
        raise RunStopped(
            f"stopped by {trainer.stop_reason} after {steps}, which is saved; "
            "resume=true continues from there"
        )
    return results


@dataclass(kw_only=True)
class TakenStep:
    """A step that was launched and whose numbers are read later.

    bad_clips: known when the step was taken.
    began, seconds: start by `time.perf_counter`, and length; None until the next step is launched.
    """

    step: int
    lr: float
    numbers: LateNumbers
    bad_clips: int
    began: float
    seconds: float | None = None


class Trainer:
    """Trains, selects and tests one configuration on this process and its peers.

    Everything that can fail before training fails in the constructor.

    Args:
        config: of the run.
        world: of this process.
        signals: requests to stop.
        writer: thread that writes checkpoints.
        name: of this process, in messages.
        lock: of the run directory, held by the first rank.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        *,
        signals: StopSignals,
        writer: CheckpointWriter,
        name: str,
        lock: WriterLock | None,
    ) -> None:
        self.config, self.world, self.signals, self.name = config, world, signals, name
        self.stop_reason: str | None = None
        self.copy_batch = BatchCopier(world.device)
        self.features: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # of evaluated frames
        config.directory.mkdir(parents=True, exist_ok=True)
        check_capture(config.engine, world)
        self.splits = read_splits(config.data)
        test_split = self.splits["test"][0].split
        if test_split == config.data.val_split:
            logger.warning("no test split: %s", VAL_IS_TEST % test_split)
        torch.manual_seed(config.seed)  # new parameters
        self.method = build(config.model, config.method)
        fingerprint = self.method.fingerprint()
        self.weights = weights_checksum(self.method)
        data = data_fingerprint(self.splits, config.data) if world.first else None
        self.loader = make_loader(config, self.method, self.splits.get("train", []), world)
        # with what the clips and the device have decided, so that checkpoints and config.json tell it
        data_config = config.data.model_copy(update={"test_split": test_split})
        batch_size = self.loader.spec.batch_size
        if batch_size != config.batch_size:
            logger.warning(
                "batch_size: %d in place of the default %d, because there are %d training pairs",
                batch_size,
                config.batch_size,
                len(self.loader.dataset),
            )
        engine = resolve_precision(config.engine, world.device)
        set_tf32(engine, world.device)
        resolved = {"data": data_config, "batch_size": batch_size, "engine": engine}
        self.config = config = config.model_copy(update=resolved)
        check_shared_memory(*reads_of_run(config, self.splits, self.method.architecture.image_size, world))
        self.total_steps = config.steps or config.epochs * self.loader.steps_per_epoch
        self.checkpoints = CheckpointManager(
            config,
            world,
            writer,
            fingerprint=fingerprint,
            data=gather_objects(data, world)[0],
            total_steps=self.total_steps,
            pairs=len(self.loader.dataset),
            lock=lock,
        )
        self.checkpoints.find_newest()
        if world.device.type == "cpu":
            set_threads(world, self.checkpoints.kept_threads)
        prepare_method(self.method, config.engine, world.device)
        tune(config, self.method, world)
        if not config.resume:
            keep_earlier_run(config.directory, world, lock)
        clips = len(self.splits["train"]) if "train" in self.splits else len(self.loader.dataset)
        self.quarantine = Quarantine(
            config.directory / "quarantine.jsonl", clips=clips, share=config.data.bad_clip_share
        )

    def run(self) -> Results | None:
        """Measure before training, train, and measure the selected step on the test split.

        Returns:
            Name of a row to metrics; None on ranks > 0, and if training ends early.
        """
        if self.world.first:
            facts = self.facts()
            facts.save(self.config.directory)
            self.show(facts)
        rows = self.measure_zero_shot()
        if "val" not in self.splits and self.world.first:
            try_report(self.config.directory)
        self.loader = frozen_loader(self.config, self.method, self.loader, self.world)
        towers = [self.method.vision, self.method.text]
        every = self.config.engine.straggler_check_every
        timer = RankTimer(self.world, towers, every=every, name=self.name)  # its hooks precede the strategy's
        state = self.make_state()
        complete = self.train(state, timer)
        return self.test(state, rows) if complete else None

    def facts(self) -> RunFacts:
        """Return the facts of the run that its report shows."""
        splits = {
            use: SplitFacts(
                name=clips[0].split, clips=len(clips), captions=sum(len(clip.captions) for clip in clips)
            )
            for use, clips in self.splits.items()
        }
        return RunFacts(
            splits=splits,
            pairs=len(self.loader.dataset),
            total_steps=self.total_steps,
            steps_per_epoch=self.loader.steps_per_epoch,
            parameters=sum(parameter.numel() for parameter in self.method.parameters()),
            trained_parameters=sum(parameter.numel() for parameter in self.method.trained_state().values()),
            device=device_name(self.world.device),
            weights=asdict(weights_origin(self.config.model)),
            **machine(),
        )

    def show(self, facts: RunFacts) -> None:
        """Print what is about to run."""
        config, engine = self.config, self.config.engine
        terminal.event({"kind": "start", "directory": str(config.directory), **asdict(facts)})
        processes = "" if self.world.size == 1 else f", {self.world.size} processes"
        share = 100 * facts.trained_parameters / facts.parameters
        weights = self.method.loss_weights.items()
        splits = [f"{split.name} {split.clips:,}" for split in facts.splits.values()]
        epochs = self.total_steps / self.loader.steps_per_epoch
        terminal.facts(
            {
                "run": str(config.directory),
                "model": f"{config.method.name} on {config.model.architecture or 'CLIP'}, "
                f"{config.model.pretrained}",
                "licence": facts.weights["licence"],
                "parameters": f"{facts.parameters:,}, of which {facts.trained_parameters:,} train "
                f"({share:.2g} %)",
                "device": f"{facts.device}{processes}, {engine.precision}",
                "kernels": dispatch.describe(engine.impl, self.world.device.type),
                "clips": f"{', '.join(splits)}; {facts.pairs:,} training pairs",
                "steps": f"{facts.total_steps:,} of {config.batch_size} pairs, {epochs:.3g} epochs",
                "losses": " + ".join(name if w == 1 else f"{w:g} {name}" for name, w in weights),
            }
        )

    def measure_zero_shot(self) -> Results:
        """Measure CLIP with mean pooling, and the method before training, on the test split."""
        path = self.config.directory / "before.json"
        if self.config.resume:
            kept = self.kept_zero_shot(path) if self.world.first else None
            kept = gather_objects(kept, self.world)[0]
            if kept is not None:
                return kept
        rows, name = {}, self.config.method.name
        if name != "clip":
            plain = build(self.config.model, CLIPConfig(tune="frozen")).to(self.world.device)
            title = "zero-shot, mean pooling"
            rows[title] = self.evaluate(plain, "test", "test-plain", title=title)["raw"]
        title = f"zero-shot, {name} untrained"
        rows[title] = self.evaluate(self.method, "test", "test-untrained", title=title)["raw"]
        if self.world.first:
            write_json(path, {"rows": rows, "fingerprint": self.zero_shot_fingerprint()})
        return rows

    def kept_zero_shot(self, path: Path) -> Results | None:
        """Return the rows of an earlier start; None if there are none, or if they are of other clips.

        Without a checkpoint to resume, weights and options have to be the same too.  With one, the rows
        belong to the weights that the run began with, and the checkpoint replaces those of this start.
        """
        if not path.is_file():
            return None
        stored = json.loads(path.read_text())
        if "fingerprint" not in stored:
            logger.warning("%s: written without a fingerprint of its clips: not checked", path)
            return stored
        began_with, found = stored["fingerprint"], self.zero_shot_fingerprint()
        differing = differences(began_with["data"], found["data"])
        if not self.checkpoints.resumes:
            differing += [name for name in ("weights", "options") if began_with[name] != found[name]]
        if not differing:
            return stored["rows"]
        logger.warning("%s: is measured again, because of other values: %s", path, "; ".join(differing))
        return None

    def zero_shot_fingerprint(self) -> dict[str, Any]:
        """Return what the rows before training depend on, as JSON values."""
        checkpoints = self.checkpoints
        options = {
            key: value for key, value in checkpoints.fixed.items() if key.startswith(("data.", "pixels"))
        }
        return {
            "data": {"test": checkpoints.data["test"]},
            "weights": self.weights,
            "options": json.loads(json.dumps({"method": checkpoints.fingerprint, **options})),
        }

    def make_state(self) -> TrainState:
        """Hand the method to a strategy that trains it; a resumed run continues from its checkpoint."""
        config, engine = self.config, self.config.engine
        step = TrainStep(
            self.method, self.world, engine.grad_scale, engine.grad_cache_chunks, engine.comm_dtype
        )
        plan = StepPlan(
            engine=engine,
            optim=config.optim,
            world=self.world,
            batch_size=config.batch_size,
            groups=parameter_groups(self.method),
        )
        strategy = make_strategy(step, plan)
        step.recorded = make_capture(
            step.losses, strategy.trained.values(), engine, self.world, strategy.recordable
        )
        state = TrainState(strategy=strategy, ema=make_ema(strategy, config.optim.ema))
        self.checkpoints.restore(state)
        return state

    def train(self, state: TrainState, timer: RankTimer) -> bool:
        """Take the remaining steps; return False if training ends early, after a checkpoint."""
        config, total = self.config, self.total_steps
        last = min(total, config.stop_at or total)
        with RunLog(config.directory, self.world, total=total, start=state.step) as log:
            log.describe(config.to_json())
            # at step 0 for the starting point, and as a check that every clip can be read
            unreported = None
            if self.must_validate(state.step) and not self.is_validated(state.step):
                self.validate(state, log)
                unreported = state.step
            taken, began = None, time.perf_counter()
            for batch in timer.time_loading(self.batches(state.step, last)):
                batch, self.stop_reason = self.agree(state.step, batch)
                if self.stop_reason is not None or batch is None:
                    break
                previous, taken = taken, self.take_step(state, batch, began)
                self.report(state, log, previous)  # which is complete when this step runs
                taken.seconds = time.perf_counter() - began
                if unreported is not None and previous is not None:
                    self.write_report(
                        unreported, log
                    )  # only now, so that the first step does not wait for it
                    unreported = None

                validates = self.must_validate(state.step)
                if validates or state.step == last or self.is_due(config.checkpoint_every, state.step):
                    self.report(state, log, taken)
                    taken = None
                    self.save(state, log)  # before validating, which may take long and be interrupted
                if validates:
                    self.stop_reason = self.agreed_stop()
                    if self.stop_reason is not None:
                        break
                    self.validate(state, log)
                    self.write_report(state.step, log)
                for line in describe_slow_ranks(timer.step() or []):
                    logger.warning("step %d: %s", state.step, line)
                    log.event("slow", state.step, {"rank": line})
                began = time.perf_counter()
            self.report(state, log, taken)
            if unreported is not None:
                self.write_report(unreported, log)
            if self.stop_reason is not None and self.checkpoints.newest_step != state.step:
                self.save(state, log)
            self.checkpoints.finish()
        return last == total and self.stop_reason is None

    def is_due(self, period: int | None, step: int) -> bool:
        """Return True every `period` steps, after every epoch without a period, and after the last step."""
        return step == self.total_steps or step % (period or self.loader.steps_per_epoch) == 0

    def must_validate(self, step: int) -> bool:
        """Return True if a run validates after `step` steps."""
        return "val" in self.splits and (step == 0 or self.is_due(self.config.evaluate_every, step))

    def is_validated(self, step: int) -> bool:
        """Return True if an earlier start of this run has validated after `step` steps, its last ones."""
        found = self.world.first and has_record(self.config.directory / METRICS, "val", step)
        return gather_objects(found, self.world)[0]

    def batches(self, step: int, last: int) -> Iterator[Batch | None]:
        """Yield this rank's batches of steps `step` .. `last` - 1, over epochs.

        If a stop is requested while a batch is awaited, None is yielded in its place.
        """
        while step < last:
            epoch, start = divmod(step, self.loader.steps_per_epoch)
            for batch in self.loader.epoch(epoch, start=start, should_stop=self.should_stop):
                yield batch
                step += 1
                if step == last:
                    return

    def should_stop(self) -> bool:
        """Return True if this process has been asked to stop."""
        return any(self.signals.counts())

    def agree(self, step: int, batch: Batch | None) -> tuple[Batch | None, str | None]:
        """Agree with all ranks on bad clips and on a request to stop, by one sum over ranks on the CPU.

        Returns:
            The batch, `valid` None if no rank has a bad clip, and the reason to stop, if any.

        Raises:
            ValueError: every clip of the step, or too many clips of the run, are bad.
            CheckpointError: a checkpoint could not be written.
        """
        self.checkpoints.check_writer()
        own = () if batch is None else batch.bad
        counts = torch.tensor([len(own), *self.signals.counts()])
        bad_count, *stop_counts = all_reduce_sum(counts, self.world).tolist()
        stop_reason = first_reason(stop_counts)
        if not bad_count:
            return None if batch is None else replace(batch, valid=None), stop_reason
        bad: list[BadClip] = [clip for share in gather_objects(own, self.world) for clip in share]
        self.quarantine.add(bad, write=self.world.first)
        if len(bad) == self.config.batch_size:
            raise ValueError(
                f"step {step}: expected a readable clip, found none among {len(bad)}; {QUARANTINE_HINT}"
            )
        return batch, stop_reason

    def agreed_stop(self) -> str | None:
        """Return why the run has to stop, if any rank has been asked to; the same on all ranks."""
        return first_reason(all_reduce_sum(torch.tensor(self.signals.counts()), self.world).tolist())

    def take_step(self, state: TrainState, batch: Batch, began: float) -> TakenStep:
        """Launch one optimizer step, without waiting for its numbers."""
        step, logit_scale = state.step, f"{METHOD}logit_scale.log"
        # dropout and the like depend on (seed, step, rank) only, so that no random state needs saving
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 4_096 + self.world.rank)
        lr = learning_rate(step, self.total_steps, self.config.optim)
        losses, norm = state.strategy.take(self.copy_batch(batch), lr)
        biased = self.method.logit_scale.bias is not None  # SigLIP's scale is above the bound
        if logit_scale in state.strategy.trained and not biased:
            state.strategy.bound(logit_scale, LIMIT)
        if state.ema is not None:
            state.ema.update(norm)
        state.step += 1
        numbers = LateNumbers({"loss": losses.total, **losses.terms, "grad_norm": norm})
        bad_clips = len(self.quarantine.known)
        return TakenStep(step=step, lr=lr, numbers=numbers, bad_clips=bad_clips, began=began)

    def report(self, state: TrainState, log: RunLog, taken: TakenStep | None) -> None:
        """Read the numbers of a step and log them.

        Raises:
            FloatingPointError: loss or gradient is not finite, more often than optim.skip_nonfinite allows.
        """
        if taken is None:
            return
        values, step, limit = taken.numbers.read(), taken.step, self.config.optim.skip_nonfinite
        norm = values.pop("grad_norm")
        if not limit and not math.isfinite(values["loss"]):
            raise FloatingPointError(f"step {step}: expected a finite loss, found {values['loss']}")
        if math.isfinite(norm):  # of all ranks
            values |= {"lr": taken.lr, "grad_norm": norm}
        else:
            self.count_skipped(state, step, norm)
            values = {"lr": taken.lr}
        if state.skipped_steps:
            values["skipped_steps"] = state.skipped_steps
        if taken.bad_clips:
            values["bad_clips"] = taken.bad_clips
        seconds = time.perf_counter() - taken.began if taken.seconds is None else taken.seconds
        log.step(step, clips=self.config.batch_size, seconds=seconds, values=values)

    def count_skipped(self, state: TrainState, step: int, norm: float) -> None:
        """Count a step that changed nothing because its gradient was not finite.

        Raises:
            FloatingPointError: there are more than optim.skip_nonfinite allows.
        """
        limit = self.config.optim.skip_nonfinite
        reason = f"gradient norm: expected a finite number, found {norm}; the step was not taken"
        if not limit:
            raise FloatingPointError(f"step {step}: {reason}")
        state.skipped_steps += 1
        if state.skipped_steps > limit:
            raise FloatingPointError(
                f"step {step}: optim.skip_nonfinite: expected at most {limit} steps to leave out, found one "
                f"more: {reason}"
            )
        logger.warning("step %d left out, %d of at most %d: %s", step, state.skipped_steps, limit, reason)

    def validate(self, state: TrainState, log: RunLog) -> None:
        """Measure the validation split; the score that selects a step is the sum of both R@1.

        The record is written last: a run that ends before it validates the step again when it resumes.
        """
        with state.strategy.gathered(), nullcontext() if state.ema is None else state.ema.applied():
            record = "val" if state.step else "val-start"
            title = f"{self.config.method.name}, step {state.step}"
            metrics = self.evaluate(self.method, "val", record, title=title, step=state.step)["raw"]
        recalls, note = [metrics[way]["R@1"] for way in ("t2v", "v2t")], "before training"
        if state.step:
            best = self.checkpoints.select(state.step, sum(recalls))
            note = "best so far" if best else f"best sum so far {self.checkpoints.best_score:.1f}"
        logger.info("step %d: val R@1 %.1f t2v, %.1f v2t (%s)", state.step, *recalls, note)
        log.evaluation(state.step, "val", metrics)

    def write_report(self, step: int, log: RunLog) -> None:
        """Write the run's report, and its pictures for TensorBoard."""
        if self.world.first:
            log.pictures(step, try_report(self.config.directory))

    def save(self, state: TrainState, log: RunLog) -> None:
        """Begin to write a checkpoint."""
        log.event("checkpoint", state.step, {"held_seconds": self.checkpoints.save(state)})

    def test(self, state: TrainState, rows: Results) -> Results | None:
        """Measure the selected step on the test split; write it to results.json, after the zero-shot rows."""
        step = self.checkpoints.load_selected(state) if "val" in self.splits else None
        if step is None:
            step = self.total_steps
            if state.ema is not None:
                state.strategy.load_trained_state(state.ema.state())
        with state.strategy.gathered():
            name = f"{self.config.method.name}, step {step}"
            metrics = self.evaluate(self.method, "test", "test", title=name, step=step, rerank=True)
        raw = metrics["raw"]
        rows[name] = metrics.pop("raw")
        rows |= {f"{name} + {reranking}": values for reranking, values in metrics.items()}
        if not self.world.first:
            return None
        write_json(self.config.directory / "results.json", rows)
        pictures = try_report(self.config.directory, seconds=FINAL_SECONDS)
        log_test(self.config.directory, step, raw, pictures)
        return rows

    def evaluate(
        self, method: Method, split: str, name: str, *, title: str, step: int = 0, rerank: bool = False
    ) -> Results:
        """Measure a method on a split; QB-Norm's bank is the training captions.

        Args:
            name: of the file of per-query results, `evaluation-<name>.npz`.
            title: of the row of results.  step: optimizer steps taken.
        """

        def keep(record: EvaluationRecord) -> None:
            save_record(self.config.directory, name, record, title=title, step=step)

        train_clips = self.splits.get("train", []) if rerank else []
        options = EvalOptions(
            name=title if name.startswith("test") else "validation",
            data=self.config.data,
            device=self.world.device,
            batch_size=self.config.eval_batch_size,
            rerank=rerank,
            bank=[caption for clip in train_clips for caption in clip.captions],
            rank=self.world.rank,
            world_size=self.world.size,
            gather=lambda share: gather_objects(share, self.world),
            on_record=keep if self.world.first else None,
        )
        return evaluate(method, self.splits[split], options, features=self.kept_features(method, split))

    def kept_features(self, method: Method, split: str) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return the features of a split's frames, empty before the first evaluation; None if steps change
        them, or if they need more than `KEPT_BYTES`."""
        values = len(self.splits[split]) * self.config.data.frames * method.architecture.embed_dim
        if not method.frozen_frames or 4 * values > KEPT_BYTES * self.world.size:
            return None
        if method is not self.method and not encode_alike(method, self.method):
            return None
        return self.features.setdefault(split, [])


def make_loader(config: RunConfig, method: Method, clips: list[Clip], world: World) -> TrainLoader:
    """Make the loader of the training clips, or of drawn stills if the config has them."""
    data = config.data
    check_inputs(method.architecture, data)
    spec = BatchSpec(
        batch_size=config.batch_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        image_size=method.architecture.image_size,
        context_length=data.context_length,
        frame_captions=method.needs_frame_captions,
        order=method.needs_order_words or data.reversed_pairs,
    )
    stills = None if data.stills is None else Stills(seed=config.seed, **data.stills.model_dump())
    reduce = "batch_size" not in config.model_fields_set  # the user did not ask for this size
    return TrainLoader(clips if stills is None else stills, data, spec, reduce=reduce)


def reads_of_run(
    config: RunConfig, splits: dict[str, list[Clip]], image_size: int, world: World
) -> list[ReadAhead]:
    """Return what the workers of a process read ahead: for training, and for validation in between."""
    data = config.data
    share = config.batch_size // world.size
    pairs = sum(len(clip.captions) for clip in splits.get("train", ()))
    steps = pairs // config.batch_size if data.stills is None else data.stills.count // config.batch_size
    frames = data.frames if data.stills is None else 1
    reads = [read_ahead(data, frames, image_size, share, steps)]
    if "val" in splits:
        clips = -(-len(splits["val"]) // world.size)
        batch = min(config.eval_batch_size, clips)
        reads.append(read_ahead(data, data.frames, image_size, batch, -(-clips // batch)))
    return reads


def set_threads(world: World, kept: int | None) -> None:
    """Set the number of torch's threads on a CPU, the first rank's choice on every rank."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    count, reason = gather_objects(choose_threads(processes, kept), world)[0]
    torch.set_num_threads(count)
    logger.info("cpu: %d %s (%s)", count, "thread" if count == 1 else "threads", reason)


def weights_checksum(method: Method) -> int:
    """Return a checksum of all parameters of a method on the CPU, in the order of their names."""
    checksum = 0
    for _, parameter in sorted(method.named_parameters()):
        checksum = zlib.crc32(
            parameter.detach().contiguous().flatten().view(torch.uint8).numpy().data, checksum
        )
    return checksum


def parameter_groups(method: Method) -> list[ParameterGroup]:
    """Return the parameter groups of the method, by their names in `TrainStep`."""
    return [
        ParameterGroup(
            names=tuple(f"{METHOD}{name}" for name in group.names),
            lr_scale=group.lr_scale,
            weight_decay=group.weight_decay,
        )
        for group in method.parameter_groups()
    ]


def first_reason(counts: list[int]) -> str | None:
    """Return the first of `STOP_REASONS` that occurred, by the number of times that each did."""
    return next((reason for reason, n in zip(STOP_REASONS, counts, strict=True) if n), None)


def write_json(path: Path, value: Any) -> None:
    """Write a file completely or not at all."""
    write_file(path, json.dumps(value, indent=2))
