"""All methods and some of their combinations on the drawn world, each trained by the command its users type.

    python benchmarks/methods.py                every run the results do not hold yet
    python benchmarks/methods.py --share 0/2    half of them, for two processes side by side
    python benchmarks/methods.py --rates        the learning rates that were tried on the validation split
    python benchmarks/methods.py --costs        time and memory of a step, all methods in turn
    python benchmarks/methods.py --table        the results as Markdown

A run is `deepspeed train.py configs/quickstart.toml method=...`: it selects a step on `val` and is measured
on `test`.  Then its checkpoint is opened again, which must give the same figures, and answers two-way
questions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.drawn_figures import Exam, measure
from benchmarks.measure import machine, read_rows, write_row
from discovla.config import RunConfig, read_config
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.data.manifest import read_manifest
from discovla.engine.distributed import join_world
from discovla.load import load_run
from discovla.methods import build
from discovla.methods.base import Method
from discovla.train_step import TrainStep

ROOT = Path(__file__).parents[1]
QUICKSTART = "configs/quickstart.toml"
RESULTS = ROOT / "benchmarks/results/cpu/methods-drawn-world.jsonl"
SEEDS = (0, 1, 2)
PLAIN = "CLIP4Clip meanP"  # what the time of a step is compared with
# the drawn CLIP has three text layers, and what starts from them has no more here
LAYERS = "method.head_layers=2"
# CLIP itself is trained at `clip_lr_scale` times the rate of what is new: quickstart's steps are few
FULL = "optim.lr=1e-3 method.clip_lr_scale=0.3"
ADAPTED = "method.tune=lora"  # at the rate of quickstart, 4e-3
ALIGNED = "method.alpha=0.3 method.beta=0.25 method.kl_norm=fixed method.exclude_same_video=true"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: the words after `deepspeed train.py configs/quickstart.toml`."""

    name: str
    words: str


PUBLISHED = (
    Row(name=PLAIN, words=f"method=clip4clip {FULL}"),
    Row(name="CLIP4Clip seqLSTM", words=f"method=clip4clip method.head=seqLSTM {FULL}"),
    Row(name="CLIP4Clip seqTransf", words=f"method=clip4clip method.head=seqTransf {LAYERS} {FULL}"),
    Row(  # one block: it reads every caption with every video
        name="CLIP4Clip tightTransf",
        words=f"method=clip4clip method.head=tightTransf method.head_layers=1 {FULL}",
    ),
    Row(name="CLIP2Video", words=f"method=clip2video {LAYERS} {FULL}"),
    Row(
        name="T2VParser",
        words=f"method=t2vparser method.stan_layers=2 method.decomposition_layers=2 {FULL}",
    ),
    Row(name="DiscoVLA", words="method=discovla"),
)
COMBINED = (
    Row(name="CLIP4Clip seqTransf, LoRA", words=f"method=clip4clip method.head=seqTransf {LAYERS} {ADAPTED}"),
    Row(name="CLIP2Video, LoRA", words=f"method=clip2video {LAYERS} {ADAPTED}"),
    Row(
        name="CLIP4Clip seqTransf, alignment",
        words=f"method=clip4clip method.head=seqTransf {LAYERS} {FULL} {ALIGNED}",
    ),
    Row(name="DiscoVLA, token similarity", words="method=discovla method.similarity=tokens"),
    Row(name="DiscoVLA, frame positions", words="method=discovla method.frame_position=true"),
)
ROWS = (*PUBLISHED, *COMBINED)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the drawn world and the results are, and more words for every run, for a trial."""

    manifest: Path
    cache: Path
    results: Path
    more: tuple[str, ...] = ()

    def words(self, row: Row, seed: int) -> list[str]:
        """The overrides of a run, without its directory."""
        return [
            *row.words.split(),
            f"seed={seed}",
            f"data.manifest={self.manifest}",
            f"data.cache={self.cache}",
            "engine.device=cpu",
            *self.more,
        ]

    def config(self, row: Row, seed: int, directory: Path) -> RunConfig:
        return read_config(ROOT / QUICKSTART, [*self.words(row, seed), f"directory={directory}"])


def identity(row: Row, seed: int, more: Sequence[str] = ()) -> str:
    """What makes two runs the same one."""
    return " ".join([*row.words.split(), f"seed={seed}", *more])


def run_all(place: Place, runs: Sequence[tuple[Row, int]]) -> Iterator[dict[str, Any]]:
    """Carry out what the results file does not hold yet, and add each run to it when it is done."""
    exam = None
    for row, seed in runs:
        name = identity(row, seed, place.more)
        if name in {r.get("identity") for r in read_rows(place.results)}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            usage = _train([*place.words(row, seed), f"directory={directory}"])
            config = place.config(row, seed, directory)
            exam = exam or Exam(manifest=place.manifest, data=config.data, image_size=64, judge_count=0)
            result = {"kind": "run", "name": row.name, "seed": seed, "identity": name, **usage}
            result |= _figures(directory, exam) | machine("cpu")
        write_row(place.results, result)
        yield result


def _train(words: Sequence[str]) -> dict[str, float]:
    """One run of the launcher; its CPU seconds and the largest resident set of its processes.

    Raises:
        RuntimeError: it did not end well; with the end of what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["deepspeed", "-q", "--num_accelerators", "1", "--master_port", port]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*launcher, "train.py", QUICKSTART, *words], cwd=ROOT, env=env, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(words)}: {log.read()[-2000:]}")
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mb": round(usage.ru_maxrss / 1024),
    }


def _figures(directory: Path, exam: Exam) -> dict[str, Any]:
    """What the run found, and what its checkpoint answers when opened again.

    Raises:
        RuntimeError: the checkpoint gives other figures than the run did.
    """
    rows = json.loads((directory / "results.json").read_text())
    before = next(figures for name, figures in rows.items() if name.endswith("untrained"))
    step, after = next((n, f) for n, f in rows.items() if ", step " in n and "+" not in n)
    run = load_run(directory)
    measured = measure(run.method, exam)
    for way in ("t2v", "v2t"):
        if abs(measured["test"][way]["R@1"] - after[way]["R@1"]) > 1e-9:
            raise RuntimeError(f"{directory}: expected R@1 {after[way]}, found {measured['test'][way]}")
    return {
        "step": run.step,
        "selected": step,
        "plain": _short(rows["zero-shot, mean pooling"]),
        "before": _short(before),
        "test": _short(after),
        "siblings": measured["siblings"],
        "val": measured["val"],
        "probes": measured["probes"],
        "flip": measured["flip"],
        "trained_parameters": sum(x.numel() for x in run.method.trained_state().values()),
    }


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    return {w: {k: v for k, v in metrics[w].items() if k != "optimistic"} for w in ("t2v", "v2t")}


# the learning rates that were compared on `val`: one seed each
RATES = tuple(
    Row(name=f"{row.name}: {words}", words=f"{row.words} {words}")
    for row, choices in (
        (PUBLISHED[0], ["optim.lr=1e-4", "optim.lr=4e-4", "optim.lr=1e-3"]),
        (PUBLISHED[2], ["optim.lr=4e-4", "optim.lr=1e-3"]),
        (COMBINED[0], ["optim.lr=1e-3", "optim.lr=4e-3"]),
    )
    for words in choices
)


def rates(place: Place, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Train each row once and note its best figures on `val`; the test split is not looked at."""
    for row in rows:
        name = identity(row, 0, place.more)
        if name in {r.get("identity") for r in read_rows(place.results)}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            _train([*place.words(row, 0), f"directory={directory}", "data.test_split=siblings"])
            lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
        found = [
            {"step": x["step"], **{way: x[way]["R@1"] for way in ("t2v", "v2t")}}
            for x in lines
            if x["kind"] == "val"
        ]
        result = {"kind": "rate", "name": row.name, "identity": name, "val": found, **machine("cpu")}
        write_row(place.results, result)
        yield result


def costs(place: Place, rounds: int = 7) -> list[dict[str, Any]]:
    """Seconds of a step over those of meanP in the same round, and what a step keeps for its backward pass.

    All methods take a step in every round, one after another on the same core, so that what else the machine
    does befalls them alike.
    """
    made = {row.name: _losses(place, row) for row in ROWS}
    times: dict[str, list[float]] = {name: [] for name in made}
    for round_ in range(rounds + 1):
        for name, (losses, method) in made.items():
            gc.collect()
            began = time.process_time()
            losses().backward()
            if round_:  # the first one warms up
                times[name].append(time.process_time() - began)
            method.zero_grad()
    found = []
    for name, (losses, method) in made.items():
        ratios = sorted(a / b for a, b in zip(times[name], times[PLAIN], strict=True))
        row = {"kind": "cost", "name": name, "step_over_meanP": statistics.median(ratios)}
        row |= {"least": ratios[0], "most": ratios[-1], "rounds": rounds}
        row["saved_mb"] = saved_bytes(losses, method.parameters()) / 1e6
        found.append(row | machine("cpu"))
    return found


def _losses(place: Place, row: Row) -> tuple[Callable[[], torch.Tensor], Method]:
    """A function that computes the loss of the first batch, and the method it trains."""
    world = join_world("cpu")
    config = place.config(row, 0, Path("unused"))
    torch.manual_seed(0)
    method = build(config.model, config.method)
    shape = BatchSpec(
        batch_size=config.batch_size,
        rank=0,
        world_size=1,
        seed=0,
        image_size=method.architecture.image_size,
        context_length=config.data.context_length,
        frame_captions=method.needs_frame_captions,
    )
    data = config.data.model_copy(update={"workers": 0})
    batch = next(
        iter(TrainLoader(read_manifest(place.manifest, split="train"), data, shape).epoch(0, start=0))
    )
    module = TrainStep(method, world, "exact")
    return lambda: module(replace(batch, valid=None)).total, method


def saved_bytes(losses: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors autograd holds once the losses are there, without the parameters among them."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    held: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        graph = losses()
    assert graph.requires_grad, "else nothing would be held"
    return sum(held.values())


SHORT = ("zero-shot t2v", "t2v", "t2v R@5", "zero-shot v2t", "v2t", "v2t R@5", "verb", "reversal")
COLUMNS = {
    "zero-shot t2v": ("before", "t2v", "R@1"),
    "t2v": ("test", "t2v", "R@1"),
    "t2v R@5": ("test", "t2v", "R@5"),
    "zero-shot v2t": ("before", "v2t", "R@1"),
    "v2t": ("test", "v2t", "R@1"),
    "v2t R@5": ("test", "v2t", "R@5"),
    "verb": ("probes", "verb", "clip"),
    "bind": ("probes", "bind", "clip"),
    "reversal": ("probes", "reversal", "clip"),
    "on another clip": ("probes", "reversal", "control"),
}


def table(results: Sequence[dict[str, Any]], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """The results as Markdown: means over seeds, with the least and the largest."""
    cost = {r["name"]: r for r in results if r["kind"] == "cost"}
    heads = ["", "seeds", "trained", "step", "kept", "peak", *columns]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in ROWS:
        wanted = {identity(row, seed) for seed in SEEDS}
        of = [r for r in results if r["kind"] == "run" and r["identity"] in wanted]
        if not of:
            continue
        cells = [row.name, str(len(of)), f"{of[0]['trained_parameters'] / 1e3:,.0f} k"]
        known = cost.get(row.name)
        cells += [f"{known['step_over_meanP']:.2f}x", f"{known['saved_mb']:,.0f} MB"] if known else ["-", "-"]
        cells += [
            f"{max(r['peak_rss_mb'] for r in of):,} MB",
            *(_cell(of, COLUMNS[name]) for name in columns),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(results: Sequence[dict[str, Any]], path: Sequence[str]) -> str:
    values = []
    for found in results:
        for key in path:
            found = found[key]
        values.append(float(found))  # type: ignore[arg-type]
    mean = f"{statistics.mean(values):.1f}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):.1f}-{max(values):.1f})"


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description="All methods on the drawn world.")
    parser.add_argument("--manifest", type=Path, default=ROOT / "data/drawn_world/manifest.jsonl")
    parser.add_argument("--cache", type=Path, default=ROOT / "data/drawn_world/cache")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name it matches")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th run, from the I-th on")
    what = parser.add_mutually_exclusive_group()
    for name in ("table", "costs", "rates"):
        what.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(words)
    if given.table:
        print(table(read_rows(given.results)))
        return 0
    if not re.fullmatch(r"\d+/[1-9]\d*", given.share):
        parser.error(f"--share: expected I/N, found {given.share!r}")
    first, shares = map(int, given.share.split("/"))
    place = Place(manifest=given.manifest.resolve(), cache=given.cache.resolve(), results=given.results)
    if given.costs:
        torch.set_num_threads(1)
        for result in costs(place):
            write_row(place.results, result)
            print(f"{result['name']}: {result['step_over_meanP']:.2f} of a meanP step", flush=True)
        return 0
    if given.rates:
        for result in rates(place, [r for r in RATES if re.search(given.only, r.name)][first::shares]):
            print(f"{result['name']}: {result['val']}", flush=True)
        return 0
    runs = [(row, seed) for seed in SEEDS for row in ROWS if re.search(given.only, row.name)]
    for result in run_all(place, runs[first::shares]):
        score = ", ".join(f"{way} R@1 {result['test'][way]['R@1']:.1f}" for way in ("t2v", "v2t"))
        print(f"{result['name']}, seed {result['seed']}: {score}, {result['cpu_seconds']:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
