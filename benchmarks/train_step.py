"""A DiscoVLA training step timed against the published one in plain PyTorch, on the same batch and weights.

    python benchmarks/train_step.py                            ViT-B/32, two pairs, seven rounds
    python benchmarks/train_step.py --model ViT-B/16 --pairs 4 --rounds 9 --impl reference ours

The steps take turns, round by round, and a ratio is of two steps of one round: its median counts, for a
shared machine's times vary by a factor of two and more.  Rows go to benchmarks/results/<device>/, one JSON a
line: milliseconds by the clock and of the process's own CPU time; what the step keeps for backward; work as
`step_work.py` counts it.  Parameters that train stay float32; `bf16` computes in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks import step_inputs
from benchmarks.measure import gpu_launches, machine, results_file, write_row
from benchmarks.reference_step import ReferenceStep, compiled
from benchmarks.step_inputs import bytes_kept, size_of
from benchmarks.step_work import needed_flops, reference_flops
from discovla.batch import Batch
from discovla.engine.strategy import cast_frozen
from discovla.methods.discovla import DiscoVLAConfig

IMPLS = (
    "reference",
    "reference anomaly",
    "reference bf16 sdpa",
    "reference bf16 sdpa compiled",
    "ours",
    "ours bf16",
)
BASE = "reference"


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What is timed: a model's name, pairs in a batch, frames of each, the steps that take turns, rounds."""

    model: str = "ViT-B/32"
    pairs: int = 2
    frames: int = 12
    impls: Sequence[str] = IMPLS
    rounds: int = 7


def run(contest: Contest, device: str) -> list[dict[str, Any]]:
    """One row for each step, the reference's first; ratios are the reference's time over the step's.

    Raises:
        ValueError: an unknown step, or one without the reference to compare it with.
    """
    unknown = [name for name in contest.impls if name not in IMPLS]
    if unknown or BASE not in contest.impls:
        raise ValueError(f"impls: expected {BASE} and others of {', '.join(IMPLS)}, found {contest.impls}")
    architecture = step_inputs.architecture(contest.model)
    batch = step_inputs.noise(architecture, contest.pairs, frames=contest.frames)
    size, config = size_of(batch), DiscoVLAConfig()
    batch = batch.to(device)
    names = [name for name in contest.impls if "compiled" not in name or device == "cuda"]
    steps = {name: _step(name, architecture, batch, device) for name in names}
    rounds = {name: [] for name in names}
    for number in range(contest.rounds + 1):
        for name in names if number % 2 else reversed(names):
            found = _time(steps[name], device)
            if number:  # the first warms up
                rounds[name].append(found)
    work = needed_flops(architecture, config, size), reference_flops(architecture, config, size)
    fixed = {"op": "step", "model": contest.model, "pairs": contest.pairs, "frames": contest.frames}
    rows = [
        {"name": f"step {contest.model} b{contest.pairs}", "impl": name, **fixed}
        | _figures(rounds[name], rounds[BASE], contest.pairs, work)
        | {"caption_tokens": size.tokens, "caption_length": size.length, "threads": torch.get_num_threads()}
        for name in names
    ]
    for row in rows:
        row |= _counts(steps[row["impl"]], device)
    return rows


@dataclass(frozen=True, kw_only=True)
class _Step:
    """call: forward and backward.  forward: without backward.  parameters: what is there anyway."""

    call: Callable[[], object]
    forward: Callable[[], object]
    parameters: list[torch.Tensor]


def _step(name: str, architecture: Any, batch: Batch, device: str) -> _Step:
    """The step of that name, with weights of its own, equal in all."""
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    if name.startswith("ours"):
        model = step_inputs.method(architecture, dtype=dtype, device=device)
        cast_frozen(model, dtype)
        return _Step(
            call=lambda: step_inputs.step(model, batch),
            forward=lambda: model.losses(*model.encode(batch)),
            parameters=list(model.parameters()),
        )
    model = step_inputs.method(architecture, device=device)
    reference = ReferenceStep(
        model, sdpa="sdpa" in name, autocast=dtype if "bf16" in name else None, anomaly="anomaly" in name
    )
    call = compiled(reference) if "compiled" in name else reference
    weights = list(reference.weights.values())
    return _Step(call=lambda: call(batch), forward=lambda: reference.losses(batch), parameters=weights)


def _time(step: _Step, device: str) -> tuple[float, float]:
    """Milliseconds of one call: by the clock, and of this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    step.call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)


def _figures(
    found: list[tuple[float, float]],
    base: list[tuple[float, float]],
    pairs: int,
    work: tuple[float, float],
) -> dict[str, Any]:
    """Medians, spread, and ratios to the reference, round by round."""
    wall = sorted(ms for ms, _ in found)
    middle = statistics.median(wall)
    ratios = [[b[kind] / f[kind] for b, f in zip(base, found, strict=True)] for kind in (0, 1)]
    return {
        "ms_p50": middle,
        "ms_p20": wall[int(0.2 * (len(wall) - 1))],
        "ms_p80": wall[int(0.8 * (len(wall) - 1))],
        "cpu_ms_p50": statistics.median(ms for _, ms in found),
        "n": len(found),
        "ratio_p50": statistics.median(ratios[0]),
        "cpu_ratio_p50": statistics.median(ratios[1]),
        "ratios": [round(ratio, 3) for ratio in ratios[0]],
        "cpu_ratios": [round(ratio, 3) for ratio in ratios[1]],
        "samples_s": 1000 * pairs / middle,
        "tflops_needed": work[0] / middle / 1e9,
        "tflops_ref": work[1] / middle / 1e9,
    }


def _counts(step: _Step, device: str) -> dict[str, Any]:
    """What is kept for backward, and on a GPU its peak and launches."""
    counts: dict[str, Any] = {"kept_mb": bytes_kept(step.forward, step.parameters) / 1e6}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        counts["launches"] = gpu_launches(step.call)
        counts["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return counts


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['name']} {row['impl']:30} {row['ms_p50']:10.1f} ms  {row['samples_s']:8.2f} pairs/s "
        f"{row['ratio_p50']:6.2f}x ({row['cpu_ratio_p50']:.2f}x of CPU time)  {row['kept_mb']:9.1f} MB kept",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--model", choices=["ViT-B/32", "ViT-B/16", "ViT-L/14"], default="ViT-B/32")
    parser.add_argument("--pairs", type=int, nargs="+", default=[2])
    parser.add_argument("--impl", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    where = machine(device)
    path = results_file(where, "train-step")
    for pairs in options.pairs:
        contest = Contest(model=options.model, pairs=pairs, impls=options.impl, rounds=options.rounds)
        for row in run(contest, device):
            write_row(path, {**where, **row})
            show(row)


if __name__ == "__main__":
    main()
