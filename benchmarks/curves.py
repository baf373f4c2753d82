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
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.measure import machine, read_rows, relative_frobenius, write_row
from discovla.batch import Batch
from discovla.config import RunConfig, read_config
from discovla.data.loader import TrainLoader
from discovla.data.source import LoaderShape, read_clips
from discovla.methods import build
from discovla.methods.base import Method
from discovla.precision import set_precision
from discovla.trainer import Trainer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu/precision-drawn-world.jsonl"
PRECISIONS: dict[str, tuple[str, ...]] = {
    "fp32": ("engine.precision=fp32",),
    "bf16": ("engine.precision=bf16",),
    "bf16, residual fp32": ("engine.precision=bf16", "engine.residual=fp32"),
    "fp8": ("engine.precision=fp8",),
}
STEPS = 200
LAST = 20  # steps whose mean loss is the end of a curve
Row = dict[str, Any]


def config_of(precision: str, words: Sequence[str], directory: Path) -> RunConfig:
    """Quickstart in a precision, by plain torch on the CPU."""
    fixed = ("engine.device=cpu", "engine.strategy=torch", f"steps={STEPS}", f"evaluate_every={STEPS}")
    more = (*PRECISIONS[precision], f"directory={directory}", *words)
    return read_config(ROOT / "configs/quickstart.toml", [*fixed, *more])


def curve(precision: str, words: Sequence[str]) -> Row:
    """One run: its losses step by step, and R@1 on the test split before and after."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(precision, words, Path(folder) / "run")
        begin = time.process_time()
        results = Trainer(config).run()
        seconds = time.process_time() - begin
        records = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    assert results is not None, "no signal, no stop_at"
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    before = next(_first(row) for name, row in results.items() if name.endswith("untrained"))
    after = next(_first(row) for name, row in results.items() if ", step " in name and "+" not in name)
    found = {"losses": losses, "before": before, "after": after, "cpu_seconds": round(seconds, 1)}
    return {"kind": "curve", "precision": precision, **found}


def _first(metrics: Row) -> dict[str, float]:
    """R@1 both ways."""
    return {way: metrics[way]["R@1"] for way in ("t2v", "v2t")}


def errors(precision: str, words: Sequence[str]) -> Row:
    """‖error‖ / ‖truth‖ of features, loss and gradients of one batch."""
    config = config_of(precision, words, Path("unused"))
    method = _method(config)
    batch = _batch(config, method)
    truth = copy.deepcopy(method).double()
    truth.compute_dtype = torch.float64
    wanted = _outputs(truth, batch)
    set_precision(method, config.engine, torch.device("cpu"))
    found = _outputs(method, batch)
    pairs = zip(wanted.items(), found.values(), strict=True)
    return {"kind": "errors", "precision": precision} | {
        name: relative_frobenius(got, want) for (name, want), got in pairs
    }


def _method(config: RunConfig) -> Method:
    """The method before training; trained parameters are moved: zeros hide the gradients of others."""
    torch.manual_seed(config.seed)
    method = build(config.model, config.method)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return method


def _batch(config: RunConfig, method: Method) -> Batch:
    shape = LoaderShape(
        batch_size=config.batch_size,
        rank=0,
        world_size=1,
        seed=config.seed,
        image_size=method.architecture.image_size,
        context_length=config.data.context_length,
        frame_captions=method.needs_frame_captions,
    )
    data = config.data.model_copy(update={"workers": 0})
    batch = next(iter(TrainLoader(read_clips(data, data.train_split), data, shape).epoch(0)))
    return replace(batch, valid=None)


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
    heads += ("curve, first step", "mean of steps", f"end ({LAST} steps)", "R@1 t2v / v2t")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    base = by_kind["curve"].get("fp32")
    for precision in PRECISIONS:
        found, run = by_kind["errors"].get(precision), by_kind["curve"].get(precision)
        if found is None or run is None or base is None:
            continue
        names = ("captions", "frames", "frame_captions", "loss", "gradients")
        cells = [precision, *(f"{found[name]:.1e}" for name in names)]
        if precision == "fp32":
            cells += ["-"] * 3
        else:
            apart = difference(run["losses"], base["losses"])
            cells += [f"{apart['first']:.2%}", f"{apart['mean']:.2%}", f"{apart['end']:+.2%}"]
        cells.append(f"{run['after']['t2v']:.1f} / {run['after']['v2t']:.1f}")
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
