"""The paper's ablation on the drawn world: what each part of DiscoVLA adds, and what distillation does.

    python benchmarks/ablation.py                every run the results do not hold yet, the telling ones first
    python benchmarks/ablation.py --share 0/2    half of them, for two processes side by side
    python benchmarks/ablation.py --table        the results as Markdown

A run trains for a fixed number of steps and is measured once, at its last step; nothing is selected.  Runs
share data order, learning rate and number of steps, and differ in what their name says.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.drawn_figures import Exam, measure
from benchmarks.measure import read_rows, write_row
from discovla.config import RunConfig, parse_config
from discovla.engine.distributed import join_world
from discovla.engine.log import versions
from discovla.methods import build
from discovla.methods.base import Method
from discovla.towers.weights import DRAWN_CLIP
from discovla.trainer import Trainer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu/ablation-drawn-world.jsonl"
BATCH, STEPS, LONG, LR = 48, 150, 450, 4e-3  # the rate that was best for `+ fusion` on val
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: `method` (its options), what else differs, and with which seeds it is run.

    logit_scale: put in place of the pretrained one before training.  It is an option of this script alone: no
    training has made the model's similarities fit it, unlike the scale near 100 of OpenAI's CLIP.
    """

    name: str
    method: dict[str, Any]
    steps: int = STEPS
    batch_size: int = BATCH
    lr: float = LR
    logit_scale: float | None = None
    seeds: tuple[int, ...] = (0,)


def _discovla(fused: bool = True, alpha: float = 0.3, w: float = 0.0, **more: Any) -> dict[str, Any]:
    """DiscoVLA's options; w is the weight of the distillation's mean over rows: 100/128 beta when fixed."""
    return {
        "name": "discovla",
        "fused_vision_blocks": 2 if fused else 0,
        "fused_text_blocks": 1 if fused else 0,
        "alpha": alpha,
        "beta": w * 1.28,
        "kl_norm": "fixed",
        "mask_padded_frames": True,
        "exclude_same_video": True,
        **more,
    }


OFFICIAL = _discovla(beta=1.0, kl_norm="official")  # w = 100 / batch
FUSION = _discovla(alpha=0)
LADDER = (
    Row(name="zero-shot, mean pooling", method={"name": "clip", "tune": "frozen"}, steps=0),
    Row(name="zero-shot, fusion untrained", method=FUSION, steps=0),
    Row(name="LoRA + mean pooling", method=_discovla(fused=False, alpha=0), seeds=SEEDS),
    Row(name="+ fusion", method=FUSION, seeds=SEEDS),
    Row(name="+ alignment", method=_discovla(), seeds=SEEDS),
    Row(name="+ distillation, official (w 2.08)", method=OFFICIAL, seeds=SEEDS),
    Row(name="+ distillation, w 0.78", method=_discovla(w=0.78), seeds=SEEDS),
    Row(name="+ distillation, w 0.2", method=_discovla(w=0.2), seeds=SEEDS),
)
WHY = (
    Row(name="fusion, scale 100", method=FUSION, logit_scale=100),
    Row(name="official, scale 100", method=OFFICIAL, logit_scale=100),
    Row(name="official, teacher detached", method={**OFFICIAL, "detach_teacher": True}, seeds=SEEDS),
    Row(name="official, learning rate 2e-3", method=OFFICIAL, lr=2e-3),
    Row(name="w 0.78, teacher detached", method=_discovla(w=0.78, detach_teacher=True), seeds=SEEDS),
)
LONGER = (
    Row(name="fusion, 450 steps", method=FUSION, steps=LONG),
    Row(name="fusion, 450 steps, scale 100", method=FUSION, steps=LONG, logit_scale=100),
    Row(name="official, 450 steps", method=OFFICIAL, steps=LONG),
    Row(name="official, 450 steps, scale 100", method=OFFICIAL, steps=LONG, logit_scale=100),
)
ROWS = (*LADDER, *WHY, *LONGER)


def plan() -> list[tuple[Row, int]]:
    """All runs, so ordered that what is there early already says something."""
    order = [(LADDER, 0), (LADDER, 1), (WHY, 0), (LADDER, 2), (WHY, 1), (WHY, 2), (LONGER, 0)]
    return [(row, seed) for rows, seed in order for row in rows if seed in row.seeds]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the drawn world and the results are; fewer `judges` make a trial small."""

    manifest: Path
    results: Path
    cache: Path
    judges: int = 300

    def config(self, row: Row, seed: int, directory: Path) -> RunConfig:
        """The run of a row, as the engine takes it."""
        values = {
            "directory": directory,
            "seed": seed,
            "batch_size": row.batch_size,
            "steps": max(1, row.steps),
            "model": {"pretrained": "drawn"},
            "method": row.method,
            "data": {
                "manifest": self.manifest,
                "val_split": "",
                "frames": 8,
                "augment": "light",
                "cache": self.cache,
                "workers": 0,
            },
            "optim": {"lr": row.lr},
            "engine": {"strategy": "torch", "device": "cpu"},
        }
        return parse_config(values, row.name)


class Run(Trainer):
    """A training run without selection, whose figures are taken outside."""

    def __init__(self, config: RunConfig, logit_scale: float | None) -> None:
        super().__init__(config)
        self.scale = logit_scale

    def _prepare(self) -> None:
        super()._prepare()
        if self.scale is not None:
            with torch.no_grad():
                self.method.logit_scale.log.fill_(math.log(self.scale))

    def _before(self) -> dict[str, Any]:
        return {}

    def _after(self, rows: dict[str, Any]) -> dict[str, Any]:
        return rows


def adapted(row: Row, config: RunConfig) -> tuple[Method, dict[str, float]]:
    """The method of a row after its steps, and the means of its loss terms over the last ten of them."""
    if not row.steps:
        torch.manual_seed(config.seed)
        return build(config.model, config.method), {}
    run = Run(config, row.logit_scale)
    run.run()
    lines = (config.directory / "metrics.jsonl").read_text().splitlines()
    records = [record for line in lines if (record := json.loads(line))["kind"] == "train"][-10:]
    terms = [name for name in ("video", "frame", "distill", "grad_norm") if name in records[0]]
    return run.method, {name: sum(r[name] for r in records) / len(records) for name in terms}


def identity(row: Row, seed: int) -> str:
    """What makes two runs the same one, whatever the row is called."""
    return json.dumps({**asdict(row), "name": None, "seeds": None, "seed": seed}, sort_keys=True)


def run_all(place: Place, runs: Iterable[tuple[Row, int]]) -> Iterator[dict[str, Any]]:
    """Carry out what the results file does not hold yet, and add each run to it when it is done.

    Raises:
        ValueError: the results there are of other pretrained weights.
    """
    weights = zlib.crc32(DRAWN_CLIP.read_bytes())
    exam: Exam | None = None
    for row, seed in runs:
        there = read_rows(place.results)
        if any(r["weights"] != weights for r in there):
            raise ValueError(f"{place.results}: its runs started from other weights than {DRAWN_CLIP}")
        if identity(row, seed) in {r["identity"] for r in there}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = place.config(row, seed, Path(folder) / "run")
            began, cpu = time.monotonic(), time.process_time()
            method, last = adapted(row, config)
            seconds = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
        exam = exam or Exam(
            manifest=place.manifest,
            data=config.data,
            image_size=method.architecture.image_size,
            judge_count=place.judges,
        )
        result = {
            "name": row.name,
            "seed": seed,
            **{name: round(value, 1) for name, value in seconds.items()},
            "threads": torch.get_num_threads(),
            "last steps": last,
            "figures": measure(method, exam),
            "config": config.model_dump(
                mode="json", exclude={"directory": True, "data": {"manifest", "cache"}}
            ),
            "logit_scale": method.logit_scale().item(),
            "versions": versions(join_world("cpu")),
            "weights": weights,
            "identity": identity(row, seed),
        }
        write_row(place.results, result)
        yield result


TABLES = {  # name -> heading -> where the number is in a result
    "retrieval": {
        "test t2v": "figures/test/t2v/R@1",
        "R@5": "figures/test/t2v/R@5",
        "test v2t": "figures/test/v2t/R@1",
        "R@5 ": "figures/test/v2t/R@5",
        "siblings t2v": "figures/siblings/t2v/R@1",
        "siblings v2t": "figures/siblings/v2t/R@1",
        "val t2v": "figures/val/t2v/R@1",
    },
    "choices": {
        "verb": "figures/probes/verb/clip",
        "control": "figures/probes/verb/control",
        "bind": "figures/probes/bind/clip",
        "control ": "figures/probes/bind/control",
        "reversal": "figures/probes/reversal/clip",
        "control  ": "figures/probes/reversal/control",
        "flip": "figures/flip",
    },
    "losses": {
        "video": "last steps/video",
        "frame": "last steps/frame",
        "distill": "last steps/distill",
        "gradient": "last steps/grad_norm",
        "teacher": "figures/judges/teacher R@1",
        "student": "figures/judges/student R@1",
        "teacher H": "figures/judges/teacher entropy",
        "student H": "figures/judges/student entropy",
    },
}


def tables(results: Sequence[dict[str, Any]], rows: Sequence[Row] = ROWS) -> str:
    """The results as Markdown, each table under its title."""
    return "\n\n".join(f"{title}\n\n{table(results, title, rows)}" for title in TABLES)


def table(results: Sequence[dict[str, Any]], title: str, rows: Sequence[Row] = ROWS) -> str:
    """One of TABLES: means over seeds, with the least and the largest where there are several."""
    columns = TABLES[title]
    lines = ["| | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        of = [r for r in results if r["identity"] in {identity(row, seed) for seed in row.seeds}]
        if of:
            cells = [_cell(of, path) for path in columns.values()]
            lines.append(f"| {row.name} | {len(of)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(results: Sequence[dict[str, Any]], path: str) -> str:
    values = []
    for found in results:
        for key in path.split("/"):
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            values.append(found)
    if not values:
        return "-"
    form = (
        ".0e" if path == "figures/flip" else ".2f" if path.startswith("last") or "entropy" in path else ".1f"
    )
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}}-{max(values):{form}})"


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description="The ablation of DiscoVLA on the drawn world.")
    parser.add_argument("--manifest", type=Path, default=ROOT / "data/drawn_world/manifest.jsonl")
    parser.add_argument("--cache", type=Path, default=ROOT / "data/drawn_world/cache")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the results as Markdown, run nothing")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name it matches")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every N-th run, from the I-th on")
    parser.add_argument("--steps", type=int, help="at most this many, for a trial")
    given = parser.parse_args(words)
    if given.table:
        print(tables(read_rows(given.results)))
        return 0
    if not re.fullmatch(r"\d+/[1-9]\d*", given.share):
        parser.error(f"--share: expected I/N, found {given.share!r}")
    first, shares = map(int, given.share.split("/"))
    manifest, cache = given.manifest.resolve(), given.cache.resolve()
    place = Place(manifest=manifest, results=given.results, cache=cache)
    runs = [
        (row if given.steps is None else replace(row, steps=min(row.steps, given.steps)), seed)
        for row, seed in plan()
        if re.search(given.only, row.name)
    ]
    for result in run_all(place, runs[first::shares]):
        ways = result["figures"]["test"]
        score = ", ".join(f"{way} R@1 {ways[way]['R@1']:.1f}" for way in ways)
        print(f"{result['name']}, seed {result['seed']}: {score}, {result['seconds']:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
