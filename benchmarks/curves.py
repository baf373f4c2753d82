"""What a precision costs: errors against float64, and the loss over 200 steps beside that of float32.

    python benchmarks/curves.py --manifest M --cache C               what the results do not hold yet
    python benchmarks/curves.py --manifest M --precision bf16        one precision
    python benchmarks/curves.py --table                              the results as Markdown

The model is quickstart's, the drawn CLIP (1.5 M parameters) under DiscoVLA.  Errors are of one batch of drawn
clips, trained parameters away from their start, against the same model in float64: ‖error‖ / ‖truth‖ of the
features of captions, frames and frame captions, of the loss, and of all gradients as one vector.  A curve is
a run of configs/quickstart.toml with 200 steps, the same seed and batches for each precision.  On a CPU fp8
is emulated: the same 8-bit numbers are multiplied in float32.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.measure import machine, read_rows, relative_frobenius, write_row
from discovla.batch import Batch
from discovla.config import RunConfig, read_config
from discovla.data.dataset import BatchSpec, read_clips
from discovla.data.loader import TrainLoader
from discovla.engine.distributed import join_world
from discovla.engine.optim import learning_rate
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan
from discovla.methods import build
from discovla.methods.base import Method
from discovla.train_step import TrainStep, set_precision

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu/precision-drawn-world.jsonl"
PRECISIONS: dict[str, tuple[str, ...]] = {
    "fp32": ("engine.precision=fp32",),
    "bf16": ("engine.precision=bf16",),
    "bf16, residual fp32": ("engine.precision=bf16", "engine.residual_dtype=fp32"),
    "fp8": ("engine.precision=fp8",),
    "fp8, backward too": ("engine.precision=fp8_backward",),
}
STEPS = 200
LAST = 20  # steps whose mean loss is the end of a curve
Row = dict[str, Any]


def config_of(precision: str, words: Sequence[str]) -> RunConfig:
    """Quickstart in a precision, in this one process on the CPU."""
    fixed = ("engine.device=cpu", "engine.strategy=torch", f"steps={STEPS}", "data.workers=0")
    return read_config(ROOT / "configs/quickstart.toml", [*fixed, *PRECISIONS[precision], *words])


def curve(precision: str, words: Sequence[str]) -> Row:
    """The loss of every step of one run, as the trainer takes them."""
    config = config_of(precision, words)
    begin = time.process_time()
    method, loader = _parts(config)
    assert not method.parameter_groups(), "under LoRA all that trains has one rate"
    world = join_world("cpu")
    set_precision(method, config.engine, world.device)
    plan = StepPlan(engine=config.engine, optim=config.optim, world=world, batch_size=config.batch_size)
    strategy = make_strategy(TrainStep(method, world, config.engine.grad_scale), plan)
    steps = config.steps or STEPS
    batches = (batch for epoch in count() for batch in loader.epoch(epoch))
    losses = []
    for step, batch in enumerate(islice(batches, steps)):
        found = strategy(replace(batch, valid=None)).total
        strategy.backward(found)
        strategy.step(learning_rate(step, steps, config.optim))
        losses.append(found.item())
        print(f"{precision}: step {step + 1} of {steps}, loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
    seconds = round(time.process_time() - begin, 1)
    return {"kind": "curve", "precision": precision, "losses": losses, "cpu_seconds": seconds}


def errors(precision: str, words: Sequence[str]) -> Row:
    """‖error‖ / ‖truth‖ of features, loss and gradients of one batch."""
    config = config_of(precision, words)
    method, loader = _parts(config)
    _move(method)
    batch = replace(next(iter(loader.epoch(0))), valid=None)
    truth = copy.deepcopy(method).double()
    truth.compute_dtype = torch.float64
    wanted = _outputs(truth, batch)
    set_precision(method, config.engine, torch.device("cpu"))
    found = _outputs(method, batch)
    pairs = zip(wanted.items(), found.values(), strict=True)
    return {"kind": "errors", "precision": precision} | {
        name: relative_frobenius(got, want) for (name, want), got in pairs
    }


def _parts(config: RunConfig) -> tuple[Method, TrainLoader]:
    """The method before training, and the batches of a run."""
    torch.manual_seed(config.seed)
    method = build(config.model, config.method)
    shape = BatchSpec(
        batch_size=config.batch_size,
        rank=0,
        world_size=1,
        seed=config.seed,
        image_size=method.architecture.image_size,
        context_length=config.data.context_length,
        frame_captions=method.needs_frame_captions,
    )
    clips = read_clips(config.data, config.data.train_split)
    return method, TrainLoader(clips, config.data, shape)


def _move(method: Method) -> None:
    """Move what trains away from its start, where zeros hide the gradients of others."""
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))


def _outputs(method: Method, batch: Batch) -> dict[str, Tensor]:
    """Features, loss and gradients of a batch."""
    text, video = method.encode(batch)
    loss = method.losses(text, video).total
    loss.backward()
    gradients = [p.grad.flatten().double() for p in method.parameters() if p.grad is not None]
    assert text.frames is not None and video.frames is not None, "quickstart's recipe aligns frames"
    features = {"captions": text.pooled, "frames": video.frames, "frame_captions": text.frames}
    return {k: x.detach() for k, x in features.items()} | {
        "loss": loss.detach(),
        "gradients": torch.cat(gradients),
    }


def difference(losses: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """How a curve stands to another: relative, at the first step, on average, and of the ends' means."""
    each = [abs(x / y - 1) for x, y in zip(losses, base, strict=True)]
    end = statistics.fmean(losses[-LAST:]) / statistics.fmean(base[-LAST:]) - 1
    return {"first": each[0], "mean": statistics.fmean(each), "end": end}


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each precision."""
    by_kind = {kind: {r["precision"]: r for r in rows if r["kind"] == kind} for kind in ("errors", "curve")}
    heads = ("precision", "captions", "frames", "frame captions", "loss", "gradients")
    heads += ("loss of the first step", "of all steps, mean", f"of the last {LAST}, mean")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    base = by_kind["curve"].get("fp32", {}).get("losses")
    for precision in PRECISIONS:
        if (found := by_kind["errors"].get(precision)) is None:
            continue
        names = ("captions", "frames", "frame_captions", "loss", "gradients")
        cells = [precision, *(f"{found[name]:.1e}" for name in names)]
        run = by_kind["curve"].get(precision)
        if run is None or base is None or precision == "fp32":
            cells += ["-"] * 3
        else:
            apart = difference(run["losses"], base)
            cells += [f"{apart['first']:.2%}", f"{apart['mean']:.2%}", f"{apart['end']:+.2%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manifest", type=Path, help="of the drawn world: discovla draw data/drawn_world")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args(words)
    if given.table:
        print(table(read_rows(RESULTS)))
        return 0
    asked = {"data.manifest": given.manifest, "data.cache": given.cache}
    more = [f"{key}={path}" for key, path in asked.items() if path is not None]
    known = {(row["kind"], row["precision"]) for row in read_rows(RESULTS)}
    for precision in given.precision:
        for kind, measure in (("errors", errors), ("curve", curve)):
            if (kind, precision) not in known:
                row = measure(precision, more)
                write_row(RESULTS, row | machine("cpu"))
                print(kind, precision, {k: v for k, v in row.items() if k != "losses"}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
