"""A DiscoVLA training step timed against the published one in plain PyTorch, on the same batch and weights.

    python benchmarks/train_step.py                            ViT-B/32, two pairs, seven rounds
    python benchmarks/train_step.py --model ViT-B/16 --pairs 1 4 --rounds 9 --impl reference ours
    python benchmarks/train_step.py --profile                  and where the time of each goes
    python benchmarks/train_step.py --manifest clips.jsonl     each on batches that the loader brings

The steps take turns, round by round, and a ratio is of two steps of one round: its median counts, for a
shared machine's times vary by a factor of two and more.  With the loader each has its rounds one after the
other, for workers read ahead, and so have captured ones, for they keep their memory.  Rows go to
benchmarks/results/<device>/, one JSON a line: milliseconds by the clock and of the process's own CPU time;
what the step keeps for backward; work as `step_work.py` counts it; kernels, or on a CPU the ops that would
start one.  What is not there or does not fit has a row that says so.
Parameters that train stay float32; `bf16` computes in bfloat16, `fp8` multiplies by frozen weights in 8 bits,
`fp8 backward` gradients too.  `triton` takes the kernels where the rest takes what `auto` has found fastest,
`captured` replays the step as a CUDA graph: with the loader some of its rounds are those that record a shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks import step_inputs
from benchmarks.measure import gpu_ceilings, gpu_launches, machine, peak_tflops, results_file, write_row
from benchmarks.step_impls import BASE, IMPLS, Step, make_step, unavailable
from benchmarks.step_inputs import Launches, bytes_kept, size_of
from benchmarks.step_profile import by_component
from benchmarks.step_work import needed_flops, reference_flops
from discovla.batch import Batch
from discovla.data.config import DataConfig
from discovla.data.dataset import read_clips
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.methods.discovla import DiscoVLAConfig
from discovla.towers.architecture import Architecture

LENGTH = 32  # tokens of a padded caption
LEAST = 3  # rounds, before time may be up
ALONE = 5  # of a contest's time at most this part is for the rounds of one step alone
MODELS = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
# ms and GB of an H200 at 128 pairs
TARGETS = {"ViT-B/32": (52.0, 17.0), "ViT-B/16": (192.0, None), "ViT-L/14": (830.0, None)}
FP8_TARGETS = {"ViT-B/32": (36.0, None)}
Row = dict[str, Any]
Rounds = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What is timed.

    pairs: in a batch.  frames: of each.  impls: the steps that take turns.  rounds: of timing, fewer where
    `seconds` are over.  data: where batches are read from; None makes one of noise.  profile: whether a
    further step of each is taken apart.
    """

    model: str = "ViT-B/32"
    pairs: int = 2
    frames: int = 12
    impls: Sequence[str] = IMPLS
    rounds: int = 7
    seconds: float = float("inf")
    data: DataConfig | None = None
    profile: bool = False

    @property
    def name(self) -> str:
        return f"step {self.model} b{self.pairs}" + (" with loader" if self.data else "")


def run(contest: Contest, device: str, architecture: Architecture | None = None) -> list[Row]:
    """One row for each step, in the order asked for; ratios are the reference's time over the step's.

    Args:
        architecture: another than that of contest.model.

    Raises:
        ValueError: an unknown step.
    """
    architecture = architecture or step_inputs.architecture(contest.model)
    batches = _batches(contest, architecture, device)
    rows: dict[str, Row] = {}
    for names in _sittings(contest.impls):
        rows |= _timed(replace(contest, impls=names), architecture, batches, device)
        torch.cuda.empty_cache()
    return [rows[name] for name in contest.impls]


def _sittings(impls: Sequence[str]) -> list[list[str]]:
    """Steps that are timed together; a captured one keeps all its memory, so it has the GPU for itself."""
    captured = [name for name in impls if "captured" in name]
    together = [name for name in impls if name not in captured]
    return [*([together] if together else []), *([name] for name in captured)]


def _timed(
    contest: Contest, architecture: Architecture, batches: Callable[[], Iterator[Batch]], device: str
) -> dict[str, Row]:
    """Rows of steps that are timed together, by name."""
    first = next(batches())
    rows: dict[str, Row] = {n: {"name": contest.name, "impl": n, "op": "step"} for n in contest.impls}
    steps: dict[str, Step] = {}
    for name in contest.impls:
        found = _warm(name, architecture, first, device)
        if isinstance(found, Step):
            steps[name] = found
        else:
            rows[name]["left_out"] = found
    take = _in_rows if contest.data or "captured" in contest.impls[0] else _in_turns
    rounds = take(contest, steps, batches, device)
    fixed = _fixed(contest, architecture, first)
    for name, step in steps.items():
        rows[name] |= fixed | _figures(rounds[name], rounds.get(BASE), contest)
        rows[name] |= _counts(step, first, device) | _rates(rows[name], device)
        if contest.profile:
            rows[name]["profile_ms"] = by_component(partial(step.call, first), cuda=device == "cuda")
    return rows


def _warm(name: str, architecture: Architecture, batch: Batch, device: str) -> Step | str:
    """A step that has been called as often as it needs, or why there is none."""
    if reason := unavailable(name, device):
        return reason
    try:
        step = make_step(name, architecture, device)
        for _ in range(step.calls):
            step.call(batch)
    except torch.OutOfMemoryError as error:
        return str(error).splitlines()[0]
    return step


def _fixed(contest: Contest, architecture: Architecture, batch: Batch) -> Row:
    """What is the same of all steps: sizes and the work by its closed forms."""
    size, config = size_of(batch), DiscoVLAConfig()
    return {
        "model": contest.model,
        "pairs": contest.pairs,
        "frames": contest.frames,
        "caption_tokens": size.tokens,
        "caption_length": size.length,
        "threads": torch.get_num_threads(),
        "needed_tflop": needed_flops(architecture, config, size) / 1e12,
        "reference_tflop": reference_flops(architecture, config, size) / 1e12,
    }


def _batches(contest: Contest, architecture: Architecture, device: str) -> Callable[[], Iterator[Batch]]:
    """Batches on the device, without end: of noise one and the same, or by a loader started anew."""
    if contest.data is None:
        noise = step_inputs.noise(architecture, contest.pairs, frames=contest.frames, length=LENGTH).to(
            device
        )
        return lambda: (noise for _ in count())
    shape = BatchSpec(
        batch_size=contest.pairs,
        rank=0,
        world_size=1,
        seed=0,
        image_size=architecture.image_size,
        context_length=contest.data.context_length,
        frame_captions=True,
    )
    loader = TrainLoader(read_clips(contest.data, contest.data.train_split), contest.data, shape)

    def epochs() -> Iterator[Batch]:
        for epoch in count():
            yield from (batch.to(device) for batch in loader.epoch(epoch))

    return epochs


def _in_turns(
    contest: Contest, steps: dict[str, Step], batches: Callable[[], Iterator[Batch]], device: str
) -> Rounds:
    """Rounds in which every step is called once, forth and back."""
    found: Rounds = {name: [] for name in steps}
    begin, source = time.monotonic(), batches()
    for number in range(contest.rounds):
        if number >= LEAST and time.monotonic() - begin > contest.seconds:
            break
        batch = next(source)
        print(f"{contest.name}: round {number + 1} of {contest.rounds}", file=sys.stderr, flush=True)
        for name in list(steps) if number % 2 else list(reversed(steps)):
            found[name].append(_time(partial(steps[name].call, batch), device))
    return found


def _in_rows(
    contest: Contest, steps: dict[str, Step], batches: Callable[[], Iterator[Batch]], device: str
) -> Rounds:
    """All rounds of a step, then those of the next; each waits for its batch."""
    found: Rounds = {name: [] for name in steps}
    for name, step in steps.items():
        begin, source = time.monotonic(), batches()
        for _ in range(step.calls):
            step.call(next(source))
        for number in range(contest.rounds):
            if number >= LEAST and time.monotonic() - begin > contest.seconds / ALONE:
                break
            found[name].append(_time(lambda step=step, source=source: step.call(next(source)), device))
    return found


def _time(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Milliseconds of one call: by the clock, and of this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)


def _figures(
    found: list[tuple[float, float]], base: list[tuple[float, float]] | None, contest: Contest
) -> Row:
    """Medians, spread, and ratios to the reference where that was timed, round by round."""
    wall = sorted(ms for ms, _ in found)
    row: Row = {
        "ms_p50": statistics.median(wall),
        "ms_p20": wall[int(0.2 * (len(wall) - 1))],
        "ms_p80": wall[int(0.8 * (len(wall) - 1))],
        "cpu_ms_p50": statistics.median(ms for _, ms in found),
        "n": len(found),
    }
    # what workers read ahead comes at once, the rest late: with a loader the mean counts
    row["samples_s"] = 1000 * contest.pairs / (statistics.fmean(wall) if contest.data else row["ms_p50"])
    if base is not None:
        for kind, name in enumerate(("ratio", "cpu_ratio")):
            ratios = [b[kind] / f[kind] for b, f in zip(base, found, strict=True)]
            row[f"{name}_p50"] = statistics.median(ratios)
            row[f"{name}s"] = [round(ratio, 3) for ratio in ratios]
    return row


def _counts(step: Step, batch: Batch, device: str) -> Row:
    """What is kept for backward; on a GPU peak and launches, on a CPU the ops that would start a kernel."""
    found: Row = {"kept_mb": bytes_kept(lambda: step.forward(batch), step.parameters) / 1e6}
    if device == "cpu":
        with Launches() as launches:
            step.call(batch)
        return found | {"dispatched": launches.count}
    step.anew()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    own = sum(x.numel() * x.element_size() for x in step.parameters)
    for _ in range(step.calls):
        step.call(batch)
    found["launches"] = gpu_launches(lambda: step.call(batch))
    found["peak_gb"] = (torch.cuda.max_memory_allocated() - before + own) / 1e9  # others' weights left out
    return found | {"extra_gb": found["peak_gb"]}


def _rates(row: Row, device: str) -> Row:
    """TFLOP/s on needed and on reference work, on a GPU MFU on both and the targets of an H200."""
    found: Row = {
        "tflops_needed": 1000 * row["needed_tflop"] / row["ms_p50"],
        "tflops_ref": 1000 * row["reference_tflop"] / row["ms_p50"],
    }
    if device == "cpu":
        return found
    if peak := peak_tflops(torch.cuda.get_device_name()):
        found |= {"mfu": found["tflops_needed"] / peak, "mfu_ref": found["tflops_ref"] / peak}
    if row["name"].endswith(" b128"):
        targets = FP8_TARGETS if "fp8" in row["impl"] else TARGETS
        found["target_ms"], found["target_gb"] = targets.get(row["model"], (None, None))
    return found


def show(row: Row) -> None:
    """One line, and the profile below it."""
    if "left_out" in row:
        print(f"{row['name']} {row['impl']}: left out: {row['left_out']}", flush=True)
        return
    ratio = (
        f"{row['ratio_p50']:6.2f}x ({row['cpu_ratio_p50']:.2f}x of CPU time)" if "ratio_p50" in row else ""
    )
    print(
        f"{row['name']} {row['impl']:30} {row['ms_p50']:10.1f} ms  {row['samples_s']:8.2f} pairs/s "
        f"{ratio}  {row['kept_mb']:9.1f} MB kept",
        flush=True,
    )
    spent = row.get("profile_ms", {})
    for name, ms in spent.items():
        print(f"    {name:34} {ms:10.1f} ms {ms / sum(spent.values()):6.1%}", flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["ViT-B/32"])
    parser.add_argument("--pairs", type=int, nargs="+", default=[2])
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--impl", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument("--rounds", type=int, help="7 on a CPU, 50 on a GPU")
    parser.add_argument("--profile", action="store_true", help="take one more step of each apart")
    parser.add_argument("--manifest", type=Path, help="clips with frame captions, for batches by the loader")
    parser.add_argument("--workers", type=int, default=2, help="processes that read, with --manifest")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Time every model at every size."""
    options = parse(words)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    where = machine(device) | ({"ceilings": gpu_ceilings()} if device == "cuda" else {})
    path = results_file(where, "train-step")
    data = None
    if options.manifest:
        data = DataConfig(
            manifest=options.manifest,
            frames=options.frames,
            workers=options.workers,
            context_length=LENGTH,
        )
    for model, pairs in ((model, pairs) for model in options.model for pairs in options.pairs):
        contest = Contest(
            model=model,
            pairs=pairs,
            frames=options.frames,
            impls=options.impl,
            rounds=options.rounds or (50 if device == "cuda" else 7),
            data=data,
            profile=options.profile,
        )
        for row in run(contest, device):
            write_row(path, {**where, **row})
            show(row)
    print(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
