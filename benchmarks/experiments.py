"""Experiments on the drawn world: training runs of DiscoVLA's quickstart with other options.

    discovla draw data/drawn_world
    python benchmarks/experiments.py methods       all methods and some combinations
    python benchmarks/experiments.py ablation      the parts of DiscoVLA
    python benchmarks/experiments.py fusion        fusion by the readout of a tower, on a SigLIP-like and a
                                                   PE-like tower
    python benchmarks/experiments.py precision     bf16 and FP8: errors against float64, losses of 200 steps
    python benchmarks/experiments.py stages        ZeRO stages on two processes
    python benchmarks/experiments.py rates         learning rates, compared on the validation split
    python benchmarks/experiments.py costs         time and memory of a step of each method
    python benchmarks/experiments.py time          the quickstart, its parts left out, and other methods in
                                                   the same CPU time
    python benchmarks/experiments.py tokens        merging of tokens, under several methods

Runs whose results are in the results file are not repeated.  `--share 0/2` takes every second run, so that
two processes can share an experiment.  `time --trained runs/quickstart` measures a run that is already
trained, if its options are those of the quickstart; `tokens --trained` measures it with tokens merged.
Further words (`steps=2`) are overrides of every run, for a trial.
benchmarks/tables.py makes the tables.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there

from benchmarks.drawn_figures import (
    DrawnEvaluation,
    caption_changes,
    measure,
    retrieval,
    reversal_by_event,
    still_centres,
)
from benchmarks.measure import (
    RESULTS,
    ROOT,
    bytes_kept,
    machine,
    read_rows,
    relative_frobenius,
    write_row,
)
from benchmarks.tokens import Backbone, count
from discovla.batch import Batch
from discovla.config import RunConfig, read_config
from discovla.data.dataset import read_clips
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.engine.distributed import join_world
from discovla.features import why_not_frozen
from discovla.methods import build
from discovla.methods.base import Method
from discovla.methods.clip import CLIPConfig
from discovla.model import LoadedRun, load_run
from discovla.retrieval.embed import embed_videos
from discovla.towers.configs import config_from_architecture
from discovla.towers.weights import DRAWN, DRAWN_CLIP, read_drawn_clip
from discovla.train_step import TrainStep, set_precision

Row = dict[str, Any]
QUICKSTART = "configs/quickstart_discovla.toml"
BASIS = "configs/quickstart.toml"
STILLS = "configs/pretrain_drawn.toml"
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: overrides of a recipe."""

    name: str
    words: str
    seed: int = 0
    kind: str = "run"
    processes: int = 1
    recipe: str = QUICKSTART
    tower: str = ""
    """"siglip" or "pe": start from that tower of the drawn world instead of the drawn CLIP."""
    logit_scale: float | None = None
    """Replaces the pretrained one.  No training has fitted the model's similarities to it, unlike the scale
    near 100 of OpenAI's CLIP."""

    @property
    def identity(self) -> str:
        """Return a text that is equal for equal runs, whatever their names."""
        parts = [
            "" if self.recipe == QUICKSTART else self.recipe,
            self.tower,
            self.words,
            f"seed={self.seed}",
            "" if self.logit_scale is None else f"logit_scale={self.logit_scale:g}",
            "" if self.processes == 1 else f"processes={self.processes}",
            "" if self.kind == "run" else self.kind,
        ]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Paths and further overrides of all runs."""

    manifest: Path
    shards: Path | None = None
    """Raw shards of its clips, from which runs train in place of its videos, on the same batches."""
    words: tuple[str, ...] = ()
    fresh_clips: int = 300
    """Clips of another world on which the teacher and the student of DiscoVLA are compared."""

    def overrides(self, run: Run) -> list[str]:
        """Return the overrides of a run, without its directory."""
        source = f"data.manifest={self.manifest}" if self.shards is None else f"data.shards={self.shards}"
        words = [f"seed={run.seed}", source, "engine.device=cpu"]
        if run.tower:
            words.append(f"model.pretrained=drawn_{run.tower}")
        return [*run.words.split(), *words, *self.words]

    def identity(self, run: Run) -> str:
        return " ".join([run.identity, *self.words])

    def config(self, run: Run) -> RunConfig:
        return read_config(ROOT / run.recipe, self.overrides(run))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs, their measurement, and the file of their results."""

    results: Path
    runs: Sequence[Run]
    measure: Callable[[Run, Setting], list[Row]]


def run_experiment(experiment: Experiment, setting: Setting, runs: Sequence[Run]) -> list[Row]:
    """Measure the runs that are not in the results file; append the rows of each as soon as it is done.

    Raises:
        ValueError: results in the file started from other pretrained weights.
        RuntimeError: a run failed.
    """
    written = []
    for run in runs:
        path = weights_file(run)
        weights = zlib.crc32(path.read_bytes())
        known = read_rows(experiment.results)
        if any(row.get("weights", weights) != weights for row in known if row.get("tower", "") == run.tower):
            raise ValueError(f"{experiment.results}: expected runs from {path}, found other weights")
        identity = setting.identity(run)
        if identity in {row.get("identity") for row in known}:
            continue
        common = {"kind": run.kind, "name": run.name, "seed": run.seed, "identity": identity}
        for figures in experiment.measure(run, setting):
            row = common | {"weights": weights} | ({"tower": run.tower} if run.tower else {})
            row |= machine("cpu") | figures | {"reads": "videos" if setting.shards is None else "shards"}
            write_row(experiment.results, row)
            written.append(row)
            print(summary(row), flush=True)
    return written


def summary(row: Row) -> str:
    """Return one line for a row."""
    figures = row.get("figures", row)
    if "test" in figures:
        scores = [f"{way} R@1 {figures['test'][way]['R@1']:.1f}" for way in ("t2v", "v2t")]
        return f"{row['name']}, seed {row['seed']}: {', '.join(scores)}"
    left_out = ("identity", "losses", "time", "torch", "device", "cuda", "dirty", "weights", "commit")
    return json.dumps({key: value for key, value in row.items() if key not in left_out})


def train(run: Run, setting: Setting, directory: Path) -> dict[str, float]:
    """Train by the command that users type; return CPU seconds and the largest resident set.

    A run that already ended in the directory is not repeated, an interrupted one is resumed.

    Raises:
        RuntimeError: the command failed; the message has the end of its output.
    """
    words = [*setting.overrides(run), f"directory={directory}", "resume=true"]
    if run.logit_scale is not None:
        words += drawn_clip_with_scale(directory.parent, run.logit_scale)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = ["deepspeed", "-q", "--num_accelerators", str(run.processes), "--master_port", port]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as log:
        command = [*launcher, "train.py", run.recipe, *words]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(words)}: {log.read()[-2000:]}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"cpu_seconds": round(cpu_seconds, 1), "peak_rss_mb": round(usage.ru_maxrss / 1024)}


def weights_file(run: Run) -> Path:
    """Return the file of the weights that a run starts from."""
    return DRAWN[f"drawn_{run.tower}" if run.tower else "drawn"]


def drawn_clip_with_scale(folder: Path, scale: float) -> list[str]:
    """Write the drawn CLIP with another logit scale; return the overrides that load it."""
    pretrained = read_drawn_clip(DRAWN_CLIP)
    assert pretrained.weights is not None
    weights = pretrained.weights | {"logit_scale": torch.tensor(math.log(scale))}
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "drawn.safetensors")
    sizes = json.dumps(config_from_architecture(pretrained.architecture))
    (folder / "drawn.json").write_text(sizes)
    return [f"model.pretrained={folder}/drawn.safetensors", f"model.architecture={folder}/drawn.json"]


def records(directory: Path, kind: str) -> list[Row]:
    """Read the records of one kind in a run's metrics."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def without_optimistic(metrics: Row) -> Row:
    """Return retrieval metrics without those that resolve ties in the query's favour."""
    return {way: {k: v for k, v in metrics[way].items() if k != "optimistic"} for way in ("t2v", "v2t")}


MEAN_POOLING = "CLIP4Clip meanP"  # the base of `costs`
_LAYERS = "method.head_layers=2"  # the drawn CLIP has three text layers to start a head from
_FULL = "optim.lr=1e-3 method.clip_lr_scale=0.3"  # CLIP itself trains at 0.3 times the rate of new parameters
_LORA = "method.tune=lora"  # at the quickstart's rate, 4e-3
_ALIGN = "method.alpha=0.3 method.beta=0.25 method.kl_norm=fixed method.exclude_same_video=true"
_TIGHT = "method.head=tightTransf method.head_layers=1"  # one block: it reads every caption with every video
METHODS = {
    MEAN_POOLING: f"method=clip4clip {_FULL}",
    "CLIP4Clip seqLSTM": f"method=clip4clip method.head=seqLSTM {_FULL}",
    "CLIP4Clip seqTransf": f"method=clip4clip method.head=seqTransf {_LAYERS} {_FULL}",
    "CLIP4Clip tightTransf": f"method=clip4clip {_TIGHT} {_FULL}",
    "CLIP2Video": f"method=clip2video {_LAYERS} {_FULL}",
    "T2VParser": f"method=t2vparser method.stan_layers=2 method.decomposition_layers=2 {_FULL}",
    "DiscoVLA": "method=discovla",
    "CLIP4Clip seqTransf, LoRA": f"method=clip4clip method.head=seqTransf {_LAYERS} {_LORA}",
    "CLIP2Video, LoRA": f"method=clip2video {_LAYERS} {_LORA}",
    "CLIP4Clip seqTransf, alignment": f"method=clip4clip method.head=seqTransf {_LAYERS} {_FULL} {_ALIGN}",
    "DiscoVLA, token similarity": "method=discovla method.similarity=tokens",
    "DiscoVLA, frame positions": "method=discovla method.frame_position=true",
}
METHOD_RUNS = [Run(name=name, words=words, seed=seed) for seed in SEEDS for name, words in METHODS.items()]
RATES = {
    MEAN_POOLING: ("optim.lr=1e-4", "optim.lr=4e-4", "optim.lr=1e-3"),
    "CLIP4Clip seqTransf": ("optim.lr=4e-4", "optim.lr=1e-3"),
    "CLIP4Clip seqTransf, LoRA": ("optim.lr=1e-3", "optim.lr=4e-3"),
}
RATE_RUNS = [
    Run(name=f"{name}: {rate}", words=f"{METHODS[name]} {rate}", kind="rate")
    for name, rates in RATES.items()
    for rate in rates
]


def measure_method(run: Run, setting: Setting) -> list[Row]:
    """Train with selection on `val`, then measure the checkpoint, which must reproduce the run's results.

    Raises:
        RuntimeError: the reloaded checkpoint has other results than the run reported.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        usage = train(run, setting, directory)
        return [usage | measured(run, directory, *opened(setting, directory))]


def opened(setting: Setting, directory: Path) -> tuple[LoadedRun, DrawnEvaluation]:
    """Open a trained run, and the clips that it is measured on."""
    loaded = load_run(directory)
    data = loaded.config.data.model_copy(update={"manifest": setting.manifest, "shards": None})
    return loaded, DrawnEvaluation(manifest=setting.manifest, data=data, fresh_clips=0)


def measured(run: Run, directory: Path, loaded: LoadedRun, evaluation: DrawnEvaluation) -> Row:
    """Measure the selected checkpoint of a trained run; see `measure_method`."""
    results = json.loads((directory / "results.json").read_text())
    before = next(metrics for name, metrics in results.items() if name.endswith("untrained"))
    selected, after = next((n, m) for n, m in results.items() if ", step " in n and "+" not in n)
    figures = measure(loaded.method, evaluation)
    for way in ("t2v", "v2t"):
        if abs(figures["test"][way]["R@1"] - after[way]["R@1"]) > 1e-9:
            raise RuntimeError(f"{run.name}: expected R@1 {after[way]}, found {figures['test'][way]}")
    row = {
        "step": loaded.step,
        "selected": selected,
        "plain": without_optimistic(results["zero-shot, mean pooling"]),
        "before": without_optimistic(before),
        "test": without_optimistic(after),
        "trained_parameters": sum(x.numel() for x in loaded.method.trained_state().values()),
    }
    return row | {key: figures[key] for key in ("siblings", "val", "probes", "flip")}


FEATURES = ROOT / "runs/features"  # of frozen vision towers, which the runs of `time` share
_PARTS = {
    "quickstart": "method.reversed_negatives=0 steps=800",
    "all parts": "method.reversed_negatives=1 steps=1200",
    "without the basis": "method.reversed_negatives=1 steps=1200 method.temporal=none",
    "without reversed negatives": "method.reversed_negatives=0 steps=1200",
    "without swapped captions": "method.reversed_negatives=1 steps=1200 method.swapped_captions=0",
    "without reversed pairs": "method.reversed_negatives=1 steps=1200 data.reversed_pairs=false",
}
_ORDER = (
    "method.temporal=basis method.reversed_negatives=1 method.swapped_captions=1 "
    "data.reversed_pairs=true data.exchanges=places"
)
# Steps of 48 clips that take at least the CPU time of the quickstart's steps and of encoding its clips. On
# one thread, in turns with the quickstart's step of 48 clips and their reverses, a step of DiscoVLA takes 4.5
# times its CPU time, with the basis 5.1, of seqTransf 3.3, of T2VParser 8.5 times.
_PEERS = {
    "DiscoVLA": f"{METHODS['DiscoVLA']} steps=300 evaluate_every=100",
    "DiscoVLA, temporal basis": f"{METHODS['DiscoVLA']} {_ORDER} steps=250 evaluate_every=125",
    "CLIP4Clip seqTransf": f"{METHODS['CLIP4Clip seqTransf']} steps=400 evaluate_every=100",
    "T2VParser": f"{METHODS['T2VParser']} steps=150 evaluate_every=50",
}
# 150 more steps of the drawn CLIP's pretraining, on stills that show either end of a move, or its end alone
_MORE = "model.pretrained=drawn epochs=1 data.stills.count=19200 data.stills.easy_epochs=0 optim.lr=5e-4"
TIME_RUNS = [
    Run(name="captions of the drawn CLIP", words="", kind="captions", recipe=BASIS),
    Run(name="stills of the drawn CLIP", words="", kind="stills", recipe=BASIS),
    *(
        Run(name=name, words=f"{_MORE} data.stills.moment={moment}", kind="captions", recipe=STILLS)
        for name, moment in {"more stills": "start_or_end", "stills of the end": "end"}.items()
    ),
    *(
        Run(name=name, words=words, seed=seed, recipe=BASIS)
        for name, words in _PARTS.items()
        for seed in SEEDS
    ),
    *(Run(name=name, words=words, seed=seed) for seed in SEEDS for name, words in _PEERS.items()),
]


def measure_time(run: Run, setting: Setting) -> list[Row]:
    """As `measure_method`, with the reversal probes by kind of event and the seconds of training.

    A run of the kind "captions" trains on stills, if it has words, and measures what the text tower tells
    apart; one of the kind "stills" measures the stills that captions describe.
    """
    if run.kind == "stills":
        config = setting.config(run)
        return [{"cosines": still_centres(build(config.model, CLIPConfig(tune="frozen")))}]
    if run.kind == "captions":
        return [measured_captions(run, setting)]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        directory.mkdir()
        FEATURES.mkdir(parents=True, exist_ok=True)
        (directory / "features").symlink_to(FEATURES)
        usage = train(run, setting, directory)
        return [usage | measured_time(run, directory, *opened(setting, directory))]


def measured_captions(run: Run, setting: Setting) -> Row:
    """Measure the text tower of the pretrained model, or of one that a run has trained."""
    config, usage = setting.config(run), {}
    texts = [clip.captions[0] for clip in read_clips(config.data, "test")]
    if not run.words:
        method = build(config.model, config.method)
    else:
        with tempfile.TemporaryDirectory() as folder:
            usage = train(run, setting, Path(folder) / "run")
            method = load_run(Path(folder) / "run").method
    return {"cosines": caption_changes(method, texts), **usage}


def measured_time(run: Run, directory: Path, loaded: LoadedRun, evaluation: DrawnEvaluation) -> Row:
    """Measure a trained run of the quickstart; see `measure_time`."""
    seconds = records(directory, "train")[-1]["seconds"]  # since the first step, with validation
    row = {"reversal": reversal_by_event(loaded.method, evaluation), "train_seconds": round(seconds, 1)}
    row["steps"] = len(records(directory, "train"))
    return measured(run, directory, loaded, evaluation) | row


LATER = {f"ToMe, {r} a block": r for r in (1, 2, 3, 5)}  # merges that need no training
MERGES = {  # of the drawn CLIP: 4 blocks, 16 patches and a class row, 8 frames
    "all tokens": "method.merge=none",
    **{name: f"method.merge=tome method.merging.per_block={r}" for name, r in LATER.items()},
    "TempMe": (
        "method.merge=tempme method.merging.frames=8 method.merging.layers=[1,2,3] "
        "method.merging.factors=[2,2,2]"
    ),
}
MERGES["TempMe, large shares"] = (
    f"{MERGES['TempMe']} method.merging.per_block=4 method.merging.join_share=0.5 "
    "method.merging.inner_share=0.2"
)
ALL_TOKENS, _TOME, _TEMPME, _LARGE = "all tokens", "ToMe, 2 a block", "TempMe", "TempMe, large shares"
_TIME = f"method.exclude_same_video=true {_ORDER}"
# method -> recipe, options, and the merges that it trains with, each for as many steps as take about 60 CPU
# seconds: measured in turns, a step of 48 clips took 0.22 s (LoRA, large shares) to 0.71 s (DiscoVLA)
FRONT: dict[str, tuple[str, str, dict[str, int]]] = {
    "temporal basis, frozen tower": (BASIS, "", dict.fromkeys(list(MERGES)[:4], 400)),
    "LoRA": (QUICKSTART, "method=tempme", {ALL_TOKENS: 160, _TOME: 180, _TEMPME: 215, _LARGE: 280}),
    "LoRA, temporal basis": (QUICKSTART, f"method=tempme {_TIME}", {ALL_TOKENS: 145, _TEMPME: 105}),
    "DiscoVLA": (QUICKSTART, METHODS["DiscoVLA"], {ALL_TOKENS: 85, _TOME: 100}),
    "CLIP4Clip seqTransf": (QUICKSTART, METHODS["CLIP4Clip seqTransf"], {ALL_TOKENS: 120, _TEMPME: 155}),
}
TOKEN_RUNS = [
    Run(name="CLIP, untrained", words="", kind="untrained"),
    Run(name="costs", words="", kind="cost"),
    *(
        Run(
            name=f"{method}: {merge}",
            words=f"{words} {MERGES[merge]} steps={steps} evaluate_every={math.ceil(steps / 4)}",
            seed=seed,
            recipe=recipe,
        )
        for seed in SEEDS
        for method, (recipe, words, merges) in FRONT.items()
        for merge, steps in merges.items()
    ),
]


def measure_merging(run: Run, setting: Setting) -> list[Row]:
    """As `measure_time`, with the work and the vectors of a clip.

    A run with all tokens is measured again with tokens merged after training, in rows of the kind "merged
    later".  A run of the kind "untrained" trains nothing and merges tokens of the drawn CLIP; one of the kind
    "cost" times a step of every run, and the encoding of clips with each merge.
    """
    if run.kind == "untrained":
        return measure_untrained(setting)
    if run.kind == "cost":
        return measure_merge_costs(setting)
    method, merge = run.name.split(": ")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        directory.mkdir()
        FEATURES.mkdir(parents=True, exist_ok=True)
        (directory / "features").symlink_to(FEATURES)
        usage = train(run, setting, directory)
        loaded, evaluation = opened(setting, directory)
        row = usage | measured_time(run, directory, loaded, evaluation)
        rows = [row | {"method": method, "merge": merge} | work_of_a_clip(loaded.method, evaluation)]
        return rows + (merged_later(directory, method, evaluation, LATER) if merge == ALL_TOKENS else [])


def merged_later(
    directory: Path, method: str, evaluation: DrawnEvaluation, merges: Mapping[str, int | None]
) -> list[Row]:
    """Measure a run that was trained with all tokens, as `load_run` merges them."""
    rows = []
    for name, merge in merges.items():
        merged = load_run(directory, merge=merge).method
        row = {"kind": "merged later", "method": method, "merge": name, "name": f"{method}: {name}, later"}
        row |= {"test": retrieval(merged, evaluation.galleries["test"])}
        row |= {"reversal": reversal_by_event(merged, evaluation)}
        rows.append(row | work_of_a_clip(merged, evaluation))
    return rows


def measure_merge_costs(setting: Setting, rounds: int = 7) -> list[Row]:
    """Time steps, relative to LoRA with all tokens, and the encoding of 48 clips, relative to all tokens."""
    runs = [run for run in TOKEN_RUNS if run.kind == "run" and run.seed == SEEDS[0]]
    steps = cpu_rounds({run.name: first_step(setting.config(run)).run for run in runs}, rounds)
    clips = cpu_rounds({merge: encoding(setting, words) for merge, words in MERGES.items()}, rounds)
    rows = []
    for part, times, base in (("step", steps, f"LoRA: {ALL_TOKENS}"), ("clips", clips, ALL_TOKENS)):
        for name, seconds in times.items():
            row = {"name": name, "part": part, "cpu_seconds": statistics.median(seconds)}
            rows.append(row | ratios_to(seconds, times[base], "ratio"))
    return rows


def encoding(setting: Setting, words: str) -> Callable[[], None]:
    """Return the encoding of the clips of one batch by the drawn CLIP, with options of merging."""
    step = first_step(setting.config(Run(name="", words=f"method=clip method.tune=frozen {words}")))

    @torch.no_grad()
    def encode() -> None:
        step.method.encode_video(step.batch.frames, step.batch.frame_mask)

    return encode


def measure_untrained(setting: Setting) -> list[Row]:
    """Measure the drawn CLIP, by the mean of its frames, with tokens merged."""
    rows, data = [], setting.config(Run(name=ALL_TOKENS, words="")).data
    evaluation = DrawnEvaluation(manifest=setting.manifest, data=data)
    for merge, words in MERGES.items():
        config = setting.config(Run(name=merge, words=f"method=clip method.tune=frozen {words}"))
        method = build(config.model, config.method)
        row = {"method": "CLIP, untrained", "merge": merge, "name": f"CLIP, untrained: {merge}"}
        row |= {"test": retrieval(method, evaluation.galleries["test"])}
        row |= {"reversal": reversal_by_event(method, evaluation)}
        rows.append(row | work_of_a_clip(method, evaluation))
    return rows


def work_of_a_clip(method: Method, evaluation: DrawnEvaluation) -> Row:
    """Return tokens of a clip after the last block, operations of its encoding, and bytes of its vectors.

    Operations are those of the vision tower without heads, all rows of its last block included
    (benchmarks/tokens.py).  The bytes are those of an index in float32: the vectors that scores compare, and
    features of the frames in float16 unless they are among these.
    """
    (frames, mask), *_ = evaluation.galleries["test"].videos
    frames, mask = frames[:1], mask[:1]
    merging, tokens = method.vision.merging, 1 + method.architecture.patches
    left = frames.shape[1] * tokens
    if merging is not None:
        last = merging.plan(frames.shape[1])[-1]
        left = last.sequences * last.attended  # the last block merges nothing that is read
    architecture, config = method.architecture, method.config
    counted = count(
        Backbone(
            grid=architecture.side,
            patch=architecture.patch_size,
            width=architecture.vision.width,
            heads=architecture.vision.heads,
            blocks=architecture.vision.layers,
            embed_dim=architecture.embed_dim,
        ),
        config.merge,
        config.merging.model_dump(),
        frames=frames.shape[1],
        rank=config.lora_rank if config.tune == "lora" else 0,
    )
    video = embed_videos(method, [(frames, mask)], "cpu", frames=True)
    compared = [x for x in (video.pooled, video.tokens) if x is not None]
    size = sum(4 * x.numel() for x in compared)
    if video.frames is not None and not any(torch.equal(x, video.frames) for x in compared):
        size += 2 * video.frames.numel()
    return {"tokens": left, "gflop": counted["gflop"], "vector_bytes": size}


def measure_trained(directory: Path) -> Callable[[Run, Setting], list[Row]]:
    """Return a measurement of the run that is trained in a directory, for the run with its options."""

    def measure_run(run: Run, setting: Setting) -> list[Row]:
        expect_options(directory, setting.config(run))
        loaded, evaluation = opened(setting, directory)
        if run.kind == "merged later":
            return merged_later(directory, run.name, evaluation, {ALL_TOKENS: None, **LATER})
        return [measured_time(run, directory, loaded, evaluation)]

    return measure_run


def expect_options(directory: Path, expected: RunConfig) -> None:
    """Refuse a trained run with other options than a run that is measured.

    Raises:
        ValueError: the directory has other options.
    """
    config = load_run(directory).config
    for part in ("method", "optim", "model", "batch_size", "steps", "seed"):
        if getattr(expected, part) != getattr(config, part):
            raise ValueError(
                f"{directory}: {part}: expected {getattr(expected, part)}, found {getattr(config, part)}"
            )


def merged_quickstart(directory: Path) -> Run:
    """Return the run of `tokens` that merges tokens of a trained quickstart, of any number of steps."""
    config = load_run(directory).config
    return Run(
        name=f"temporal basis, {config.steps:,} steps",
        words=f"steps={config.steps}",
        seed=config.seed,
        kind="merged later",
        recipe=BASIS,
    )


def measure_rate(run: Run, setting: Setting) -> list[Row]:
    """Train once and return the figures on `val`; the test split is not evaluated."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        train(replace(run, words=f"{run.words} data.test_split=siblings"), setting, directory)
        val = records(directory, "val")
    scores = [{"step": x["step"], **{way: x[way]["R@1"] for way in ("t2v", "v2t")}} for x in val]
    return [{"val": scores}]


def measure_costs(_: Run, setting: Setting, rounds: int = 7) -> list[Row]:
    """Time a step of each method, relative to CLIP4Clip meanP in the same round, and count what it saves."""
    configs = {name: setting.config(Run(name=name, words=words)) for name, words in METHODS.items()}
    steps = {name: first_step(config) for name, config in configs.items()}
    times = cpu_rounds({name: step.run for name, step in steps.items()}, rounds)
    rows = []
    for name, step in steps.items():
        row = {"name": name} | ratios_to(times[name], times[MEAN_POOLING], "step_over_meanP")
        rows.append(row | {"saved_mb": bytes_kept(step.loss, list(step.method.parameters())) / 1e6})
    return rows


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """Method, module and batch of the first step of a run."""

    method: Method
    module: TrainStep
    batch: Batch

    def loss(self) -> Tensor:
        """Compute the loss."""
        return self.module(self.batch).total

    def run(self) -> None:
        """Compute the loss and its gradients, and drop these."""
        self.loss().backward()
        self.method.zero_grad()


def first_step(config: RunConfig) -> FirstStep:
    """Return the first step of a run; its batch holds features of the frames if the run reads those."""
    method, loader = method_and_loader(config)
    batch = replace(next(iter(loader.epoch(0))), valid=None)
    if method.frozen_frames and not why_not_frozen(config, method, loader):
        with torch.no_grad():
            batch = replace(batch, frames=method.encode_frames(batch.frames, batch.frame_mask))
    module = TrainStep(method, join_world("cpu"), "exact")
    return FirstStep(method=method, module=module, batch=batch)


def cpu_rounds(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of calls that take turns on one core: a noisy machine affects all alike."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            gc.collect()
            begin = time.process_time()
            call()
            if number:  # the first round warms up
                times[name].append(time.process_time() - begin)
    return times


def ratios_to(times: Sequence[float], base: Sequence[float], name: str) -> Row:
    """Return the median, the least and the largest ratio of times of the same round."""
    ratios = sorted(a / b for a, b in zip(times, base, strict=True))
    return {name: statistics.median(ratios), "rounds": len(ratios), "least": ratios[0], "most": ratios[-1]}


def method_and_loader(config: RunConfig) -> tuple[Method, TrainLoader]:
    """Build the method of a run before training, and its training loader."""
    torch.manual_seed(config.seed)
    method = build(config.model, config.method)
    spec = BatchSpec(
        batch_size=config.batch_size,
        rank=0,
        world_size=1,
        seed=config.seed,
        image_size=method.architecture.image_size,
        context_length=config.data.context_length,
        frame_captions=method.needs_frame_captions,
        order=method.needs_order_words,
    )
    data = config.data.model_copy(update={"workers": 0})
    return method, TrainLoader(read_clips(data, data.train_split), data, spec)


_FIXED = "engine.strategy=torch data.val_split= data.workers=0"  # nothing is selected
_BLOCKS = "method.fused_vision_blocks={} method.fused_text_blocks={}"


def _discovla(fused: bool = True, alpha: float = 0.3, w: float = 0.0, more: str = "") -> str:
    """Return the overrides of a DiscoVLA; `w` is the weight of the distillation's mean over rows."""
    blocks = _BLOCKS.format(*((2, 1) if fused else (0, 0)))
    beta = f"{w * 1.28:.4g}"  # with kl_norm=fixed, the weight is 100 / 128 beta
    words = f"method=discovla {blocks} method.alpha={alpha} method.beta={beta} method.kl_norm=fixed {more}"
    return f"{words.strip()} {_FIXED}"


_DETACHED = "method.detach_teacher=true"
_ALIGNED, _FUSION = _discovla(), _discovla(alpha=0)
_OFFICIAL = _discovla(more="method.beta=1.0 method.kl_norm=official")  # w = 100 / batch
_FROZEN = f"method=clip method.tune=frozen steps=0 {_FIXED}"
LADDER = (
    "zero-shot, mean pooling",
    "zero-shot, fusion untrained",
    "LoRA + mean pooling",
    "+ fusion",
    "+ alignment",
    "+ distillation, official (w 2.08)",
    "+ distillation, w 0.78",
    "+ distillation, w 0.2",
)


def _ablation_runs() -> list[Run]:
    """Return the runs of the ablation, the most informative first."""
    several = {
        "LoRA + mean pooling": _discovla(fused=False, alpha=0),
        "+ fusion": _FUSION,
        "+ alignment": _ALIGNED,
        "+ distillation, official (w 2.08)": _OFFICIAL,
        "+ distillation, w 0.78": _discovla(w=0.78),
        "+ distillation, w 0.2": _discovla(w=0.2),
        "official, teacher detached": f"{_OFFICIAL} {_DETACHED}",
        "w 0.78, teacher detached": _discovla(w=0.78, more=_DETACHED),
    }
    longer = "steps=450"
    return [
        Run(name="zero-shot, mean pooling", words=_FROZEN),
        Run(name="zero-shot, fusion untrained", words=f"{_FUSION} steps=0"),
        *(Run(name=name, words=words, seed=seed) for seed in SEEDS for name, words in several.items()),
        Run(name="fusion, scale 100", words=_FUSION, logit_scale=100),
        Run(name="official, scale 100", words=_OFFICIAL, logit_scale=100),
        Run(name="official, learning rate 2e-3", words=f"{_OFFICIAL} optim.lr=2e-3"),
        Run(name="fusion, 450 steps", words=f"{_FUSION} {longer}"),
        Run(name="fusion, 450 steps, scale 100", words=f"{_FUSION} {longer}", logit_scale=100),
        Run(name="official, 450 steps", words=f"{_OFFICIAL} {longer}"),
        Run(name="official, 450 steps, scale 100", words=f"{_OFFICIAL} {longer}", logit_scale=100),
    ]


ABLATION_RUNS = _ablation_runs()


def measure_part(run: Run, setting: Setting) -> list[Row]:
    """Train for a fixed number of steps and measure once, at the last; nothing is selected."""
    if " steps=0" in run.words:
        config = setting.config(replace(run, words=run.words.replace(" steps=0", "")))
        torch.manual_seed(config.seed)
        method, usage, last = build(config.model, config.method), {}, {}
    else:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "run"
            usage = train(run, setting, directory)
            loaded = load_run(directory)
            method, config = loaded.method, loaded.config
            steps = records(directory, "train")[-10:]
        terms = [name for name in ("video", "frame", "distill", "grad_norm") if name in steps[0]]
        last = {name: statistics.fmean(step[name] for step in steps) for name in terms}
    evaluation = DrawnEvaluation(manifest=setting.manifest, data=config.data, fresh_clips=setting.fresh_clips)
    scale = method.logit_scale().item()
    return [usage | {"last steps": last, "figures": measure(method, evaluation), "logit_scale": scale}]


def _fusion_runs() -> list[Run]:
    """Return the runs of fusion by readout: of the pool, and with a class row in the last blocks too."""
    runs = []
    for tower, most in (("siglip", 1), ("pe", 2)):
        fused = {
            f"fusion, {n} block{'s' * (n > 1)}": f"{_FUSION} method.fused_vision_blocks={n}"
            for n in range(1, most + 1)
        }
        trained = {"LoRA + mean pooling": _discovla(fused=False, alpha=0), **fused}
        alternatives = {"frame positions": "frame_position=true", "shared query": "fused_pool=shared_query"}
        if tower == "pe":
            alternatives["class row alone"] = "fused_pool=none"
        for name, word in alternatives.items():
            trained[f"fusion, 1 block, {name}"] = f"{fused['fusion, 1 block']} method.{word}"
        runs.append(Run(name="zero-shot, mean pooling", words=_FROZEN, tower=tower))
        runs += [
            Run(name=f"zero-shot, {name} untrained", words=f"{words} steps=0", tower=tower)
            for name, words in fused.items()
        ]
        runs += [
            Run(name=name, words=words, seed=seed, tower=tower)
            for seed in SEEDS
            for name, words in trained.items()
        ]
    return [replace(run, name=f"{run.tower}: {run.name}") for run in runs]


FUSION_RUNS = _fusion_runs()


def measure_fusion(run: Run, setting: Setting) -> list[Row]:
    """As `measure_part`, without the comparison of teacher and student, which these runs do not have."""
    return measure_part(run, replace(setting, fresh_clips=0))


PRECISIONS = {
    "fp32": "engine.precision=fp32",
    "bf16": "engine.precision=bf16",
    "bf16, residual fp32": "engine.precision=bf16 engine.residual_dtype=fp32",
    "fp8": "engine.precision=fp8",
    "fp8, backward too": "engine.precision=fp8_backward",
}
PRECISION_RUNS = [
    Run(name=name, words=f"{words} steps=200 {_FIXED}", kind=kind)
    for name, words in PRECISIONS.items()
    for kind in ("errors", "curve")
]


def measure_precision(run: Run, setting: Setting) -> list[Row]:
    """Measure the losses of a training run, or errors against float64; on a CPU, FP8 is emulated."""
    if run.kind == "errors":
        return [{"precision": run.name} | precision_errors(setting.config(run))]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        usage = train(run, setting, directory)
        losses = [record["loss"] for record in records(directory, "train")]
    return [{"precision": run.name, "losses": losses, "cpu_seconds": usage["cpu_seconds"]}]


def precision_errors(config: RunConfig) -> dict[str, float]:
    """Return ‖error‖ / ‖truth‖ of features, loss and gradients of one batch; the truth is in float64."""
    method, loader = method_and_loader(config)
    with torch.no_grad():  # parameters that start at zero would hide the gradients of others
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    batch = replace(next(iter(loader.epoch(0))), valid=None)
    truth = copy.deepcopy(method).double()
    truth.compute_dtype = torch.float64
    expected = _outputs(truth, batch)
    set_precision(method, config.engine, torch.device("cpu"))
    outputs = _outputs(method, batch)
    return {name: relative_frobenius(outputs[name], want) for name, want in expected.items()}


def _outputs(method: Method, batch: Batch) -> dict[str, Tensor]:
    """Compute features, loss and all gradients as one vector."""
    text, video = method.encode(batch)
    loss = method.losses(text, video).total
    loss.backward()
    gradients = [p.grad.flatten().double() for p in method.parameters() if p.grad is not None]
    assert text.frames is not None and video.frames is not None, "the quickstart's recipe aligns frames"
    return {
        "captions": text.pooled.detach(),
        "frames": video.frames.detach(),
        "frame_captions": text.frames.detach(),
        "loss": loss.detach(),
        "gradients": torch.cat(gradients),
    }


ONE_PROCESS = Run(name="one process", words="engine.zero_stage=auto")
STAGE_RUNS = [
    ONE_PROCESS,
    *(
        Run(name=f"2 processes, zero_stage {stage}", words=f"engine.zero_stage={stage}", processes=2)
        for stage in range(4)
    ),
]
STAGES = RESULTS / "cpu/stages-drawn-world.jsonl"


def measure_stage(run: Run, setting: Setting) -> list[Row]:
    """Train and compare the losses, step by step, with those of one process.

    The order of samples depends on seed and epoch alone, so the losses differ by the rounding of sums.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        train(run, setting, directory)
        results = json.loads((directory / "results.json").read_text())
        losses = [record["loss"] for record in records(directory, "train")]
    selected, metrics = next((n, m) for n, m in results.items() if ", step " in n and "+" not in n)
    row = {"processes": run.processes, "selected": selected, "losses": losses}
    row |= {way: {k: metrics[way][k] for k in ("R@1", "R@5")} for way in ("t2v", "v2t")}
    base = next((x for x in read_rows(STAGES) if x["identity"] == setting.identity(ONE_PROCESS)), None)
    return [row | (loss_differences(losses, base["losses"]) if base is not None else {})]


def loss_differences(losses: Sequence[float], base: Sequence[float]) -> Row:
    """Return the largest relative difference of a loss and its step, and the largest of the first ten steps.

    Raises:
        ValueError: the numbers of steps differ.
    """
    if len(losses) != len(base) or not base:
        raise ValueError(f"losses: expected those of {len(base)} steps, found {len(losses)}")
    relative = [abs(x - y) / abs(y) for x, y in zip(losses, base, strict=True)]
    largest = max(relative)
    return {
        "largest": largest,
        "at_step": relative.index(largest),
        "largest_of_first_ten": max(relative[:10]),
    }


EXPERIMENTS = {
    "methods": Experiment(
        results=RESULTS / "cpu/methods-drawn-world.jsonl", runs=METHOD_RUNS, measure=measure_method
    ),
    "rates": Experiment(
        results=RESULTS / "cpu/methods-drawn-world.jsonl", runs=RATE_RUNS, measure=measure_rate
    ),
    "costs": Experiment(
        results=RESULTS / "cpu/methods-drawn-world.jsonl",
        runs=[Run(name="costs", words="", kind="cost")],
        measure=measure_costs,
    ),
    "ablation": Experiment(
        results=RESULTS / "cpu/ablation-drawn-world.jsonl", runs=ABLATION_RUNS, measure=measure_part
    ),
    "fusion": Experiment(
        results=RESULTS / "cpu/fusion-drawn-world.jsonl", runs=FUSION_RUNS, measure=measure_fusion
    ),
    "precision": Experiment(
        results=RESULTS / "cpu/precision-drawn-world.jsonl", runs=PRECISION_RUNS, measure=measure_precision
    ),
    "stages": Experiment(results=STAGES, runs=STAGE_RUNS, measure=measure_stage),
    "time": Experiment(results=RESULTS / "cpu/time-drawn-world.jsonl", runs=TIME_RUNS, measure=measure_time),
    "tokens": Experiment(
        results=RESULTS / "cpu/tokens-drawn-world.jsonl", runs=TOKEN_RUNS, measure=measure_merging
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run an experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("words", nargs="*", metavar="a.b=c", help="overrides of every run")
    parser.add_argument("--manifest", type=Path, default=ROOT / "data/drawn_world/manifest.jsonl")
    parser.add_argument("--shards", type=Path, help="train from raw shards of the manifest's clips")
    parser.add_argument("--results", type=Path, help="default: the experiment's file of benchmarks/results")
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose name matches")
    parser.add_argument("--seed", type=int, help="runs with this seed alone; default: all")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th run, from the I-th on")
    parser.add_argument(
        "--trained", type=Path, metavar="RUN", help="`time`, `tokens`: measure a trained quickstart"
    )
    options = parser.parse_args(words)
    if not re.fullmatch(r"\d+/[1-9]\d*", options.share):
        parser.error(f"--share: expected I/N, found {options.share!r}")
    first, shares = map(int, options.share.split("/"))
    experiment = EXPERIMENTS[options.experiment]
    if options.results is not None:
        experiment = replace(experiment, results=options.results)
    shards = None if options.shards is None else options.shards.resolve()
    setting = Setting(manifest=options.manifest.resolve(), shards=shards, words=tuple(options.words))
    seeds = SEEDS if options.seed is None else (options.seed,)
    named = [run for run in experiment.runs if re.search(options.only, run.name) and run.seed in seeds]
    runs = named[first::shares]
    if options.trained is not None:
        seed = load_run(options.trained).config.seed
        runs = [run for run in TIME_RUNS if run.name == "quickstart" and run.seed == seed]
        if options.experiment == "tokens":
            runs = [merged_quickstart(options.trained)]
        elif options.experiment != "time" or not runs:
            parser.error(f"--trained: expected a quickstart of the seeds {SEEDS}, found seed {seed}")
        experiment = replace(experiment, measure=measure_trained(options.trained))
    run_experiment(experiment, setting, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
