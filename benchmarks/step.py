"""Time a DiscoVLA training step beside the published one in plain PyTorch, on the same batch and weights.

    python benchmarks/step.py                             ViT-B/32, two pairs, seven rounds
    python benchmarks/step.py --model ViT-B/16 --pairs 1 4 --rounds 9 --impl reference ours
    python benchmarks/step.py --profile                   time of each step by component
    python benchmarks/step.py --manifest clips.jsonl      batches from the loader

Implementations take turns, round by round, and a ratio compares two steps of one round; the median over
rounds counts, because times on a shared machine vary by a factor of two.  With the loader, and for captured
steps, each implementation has all its rounds in a row: workers read ahead, and captured steps keep their
memory.

A row has milliseconds by the clock and of CPU time, bytes kept for backward, work by `step_work.py`, and
kernels (on a CPU: ops that would start one).  An implementation that is unavailable or does not fit has a
row with the reason.  Trained parameters stay in float32; `bf16` computes in bfloat16, `fp8` multiplies by
frozen weights in 8 bits, `fp8 backward` multiplies gradients in 8 bits too.  `compiled` runs under
torch.compile, `triton` by the Triton kernels, `tuned` by what `discovla tune` measures and chooses on this
GPU, other steps in plain torch.  `captured` replays the step as a CUDA graph; with the loader, some of its
rounds record a new shape.  `whole` adds what a run does besides: the copy of the batch from pinned memory,
clipping and the update, ours as `discovla train` does them, the published step's by torch's functions; on a
GPU its time is the mean of calls in a row, so that copies overlap as in a run.  `matmul only` is the
matmul-only lower bound: products with frozen weights, nothing else.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks import step_inputs
from benchmarks.measure import (
    Launches,
    bytes_kept,
    gpu_ceilings,
    gpu_launches,
    machine,
    peak_tflops,
    results_file,
    write_row,
)
from benchmarks.step_baselines import MatmulStep, PeftStep, ReferenceStep, compiled, peft_missing
from benchmarks.step_inputs import size_of
from benchmarks.step_work import needed_flops, reference_flops
from discovla.batch import Batch
from discovla.candidates import cases_of_run
from discovla.engine.capture import make_capture
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World
from discovla.engine.optim import OptimConfig
from discovla.engine.strategy import StepPlan, TorchStrategy
from discovla.engine.transfers import BatchCopier
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.ops.dispatch import Impl, use_choices
from discovla.ops.fp8_linear import fp8_unsupported
from discovla.towers.architecture import Architecture
from discovla.train_step import TrainStep, set_precision
from discovla.tune import Measurement, chosen, measured

if TYPE_CHECKING:  # it needs decoders, which a machine that only times steps may lack
    from discovla.data.config import DataConfig

LENGTH = 32  # tokens of a padded caption
LEAST = 3  # rounds, whatever the time limit
IN_A_ROW = 8  # whole steps on a GPU that are timed as one
LEARNING_RATE = 1e-6  # of whole steps, so small that many of them compute on nearly the same weights
MODELS = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
# ms and GB to reach on an H200 at 128 pairs
TARGETS = {"ViT-B/32": (52.0, 17.0), "ViT-B/16": (192.0, None), "ViT-L/14": (830.0, None)}
FP8_TARGETS = {"ViT-B/32": (36.0, None)}
BASE = "reference"  # of the ratios
IMPLS = (
    BASE,
    "reference anomaly",
    "reference bf16 sdpa",
    "reference bf16 sdpa compiled",
    "reference bf16 sdpa whole",
    "reference bf16 sdpa compiled whole",
    "peft",
    "peft bf16 sdpa",
    "ours",
    "ours bf16",
    "ours bf16 compiled",
    "ours bf16 triton",
    "ours fp8",
    "ours bf16 captured",
    "ours bf16 compiled captured",
    "ours bf16 triton captured",
    "ours bf16 whole",
    "ours bf16 compiled whole",
    "ours bf16 triton captured whole",
    "ours bf16 tuned whole",
    "ours fp8 backward",
    "ours fp8 backward triton",
    "ours fp8 backward triton captured",
    "matmul only",
    "matmul only bf16",
)
Row = dict[str, Any]
Rounds = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One implementation with its own copy of the weights."""

    call: Callable[[Batch], object]
    """Forward and backward."""
    forward: Callable[[Batch], object]
    """The losses alone."""
    parameters: list[torch.Tensor]
    calls: int = 1
    """Number of calls until the step runs as in the long run."""
    reset: Callable[[], None] = lambda: None
    """Discards what those calls recorded."""
    measurements: Sequence[Measurement] = ()
    """Measurements of the candidates from which the implementations were chosen."""


def unavailable(name: str, device: str) -> str:
    """Return why an implementation cannot be timed here, in one line; empty if it can."""
    if name.startswith("peft"):
        return peft_missing()
    needs_gpu = {
        "compiled": "torch.compile's fastest mode is timed on GPUs only",
        "fp8": "a CPU emulates products in FP8",
        "triton": "its kernels run on GPUs",
        "captured": "CUDA graphs are recorded on GPUs",
        "tuned": "candidates are measured on GPUs",
    }
    if device == "cpu":
        return next((reason for word, reason in needs_gpu.items() if word in name), "")
    return fp8_unsupported(torch.device(device)) if "fp8" in name else ""


def make_step(name: str, architecture: Architecture, device: str, comparison: Comparison) -> Step:
    """Make an implementation for the sizes of a comparison; all start from equal weights.

    Raises:
        ValueError: an unknown name.
    """
    if name not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, found {name!r}")
    if name.startswith("matmul"):
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        matmuls = MatmulStep(architecture, dtype=dtype, device=device)
        return Step(call=matmuls, forward=matmuls, parameters=[])
    model = step_inputs.method(architecture, device=device)
    if name.startswith("ours"):
        return _our_step(name, model, torch.device(device), comparison)
    sdpa, autocast = "sdpa" in name, torch.bfloat16 if "bf16" in name else None
    if name.startswith("peft"):
        reference = PeftStep(model, sdpa=sdpa, autocast=autocast)
    else:
        reference = ReferenceStep(model, sdpa=sdpa, autocast=autocast, anomaly="anomaly" in name)
    call = compiled(reference) if "compiled" in name else reference
    if "whole" in name:
        call = _WholeReference(call, list(reference.trained.values()), torch.device(device))
    return Step(call=call, forward=reference.losses, parameters=list(reference.weights.values()))


def _our_step(name: str, model: DiscoVLA, device: torch.device, comparison: Comparison) -> Step:
    precisions = {"fp8 backward": "fp8_backward", "fp8": "fp8", "bf16": "bf16", "": "fp32"}
    precision = next(value for word, value in precisions.items() if word in name)
    impls: dict[str, Impl] = {"compiled": "compiled", "triton": "triton", "tuned": "auto", "": "torch"}
    impl: Impl = next(value for word, value in impls.items() if word in name)
    set_precision(model, EngineConfig.model_validate({"precision": precision, "impl": impl}), device)
    model.vision.impl = model.text.impl = impl
    parameters: list[torch.Tensor] = list(model.parameters())
    if "whole" in name:
        measurements = []
        if "tuned" in name:
            plans = cases_of_run(model, comparison.pairs, comparison.frames, LENGTH)
            measurements = measured(plans, tf32=True)
            use_choices(chosen([measurements]))
        whole = _WholeStep(model, device, captured="captured" in name)
        return Step(
            call=whole,
            forward=whole.step.losses,
            parameters=parameters,
            calls=3,
            reset=whole.reset,
            measurements=measurements,
        )
    if "captured" in name:
        captured = _CapturedStep(model, device)
        return Step(
            call=captured,
            forward=captured.step.losses,
            parameters=parameters,
            calls=2,
            reset=captured.reset,
        )
    return Step(
        call=lambda batch: step_inputs.step(model, batch),
        forward=lambda batch: model.losses(*model.encode(batch)),
        parameters=parameters,
    )


class _CapturedStep:
    """Our step with engine.capture = "graph"."""

    def __init__(self, model: DiscoVLA, device: torch.device) -> None:
        self.step = TrainStep(model, World(rank=0, size=1, local_rank=0, device=device), "exact")
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.reset()

    def reset(self) -> None:
        """Discard the recorded graphs."""
        engine = EngineConfig(capture="graph")
        self.capture = make_capture(self.step.losses, self.trained, engine, self.step.world)

    def __call__(self, batch: Batch) -> None:
        for parameter in self.trained:
            parameter.grad = None
        assert self.capture is not None, "the config enables it"
        self.capture(batch).total.backward()


class _WholeStep:
    """Our step as a run takes it: copies, forward, losses, backward, clipping and update."""

    def __init__(self, model: DiscoVLA, device: torch.device, *, captured: bool) -> None:
        self.world = World(rank=0, size=1, local_rank=0, device=device)
        self.engine = EngineConfig(capture="graph" if captured else "none")
        self.step = TrainStep(model, self.world, "exact")
        plan = StepPlan(engine=self.engine, optim=OptimConfig(), world=self.world, batch_size=1)
        self.strategy = TorchStrategy(self.step, plan)
        self.copy = BatchCopier(device)
        self.reset()

    def reset(self) -> None:
        """Discard the recorded graphs."""
        trained, recordable = self.strategy.trained.values(), self.strategy.recordable
        self.step.recorded = make_capture(self.step.losses, trained, self.engine, self.world, recordable)

    def __call__(self, batch: Batch) -> None:
        self.strategy.take(self.copy(_on_host(batch)), LEARNING_RATE)


class _WholeReference:
    """A step with the same additions by torch's functions, as a user would write them."""

    def __init__(
        self, step: Callable[[Batch], object], trained: list[torch.Tensor], device: torch.device
    ) -> None:
        self.step, self.trained, self.device = step, trained, device
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=LEARNING_RATE,
            weight_decay=OptimConfig().weight_decay,
            fused=device.type == "cuda",
        )

    def __call__(self, batch: Batch) -> None:
        self.step(_on_host(batch).to(self.device))
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()


_hosts: dict[int, tuple[Batch, Batch]] = {}  # the last batch on the device, and its copy in pinned memory


def _on_host(batch: Batch) -> Batch:
    """Return the batch in pinned memory, where the loader leaves it; copied there at its first use."""
    if not batch.frames.is_cuda:
        return batch
    if id(batch) not in _hosts:
        _hosts.clear()
        _hosts[id(batch)] = batch, batch.map(lambda x: x.cpu().pin_memory())
    return _hosts[id(batch)][1]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Implementations to time on one model and batch size."""

    model: str = "ViT-B/32"
    pairs: int = 2
    """In a batch."""
    frames: int = 12
    """Per clip."""
    impls: Sequence[str] = IMPLS
    rounds: int = 7
    """Fewer if `seconds` have passed."""
    seconds: float = float("inf")
    data: DataConfig | None = None
    """Source of the batches; None for one batch of noise."""
    full_captions: bool = False
    """Captions of noise fill all their tokens, so that packing saves nothing."""
    profile: bool = False
    """Profile one more step of each implementation."""

    @property
    def name(self) -> str:
        source = " with loader" if self.data else " full captions" if self.full_captions else ""
        return f"step {self.model} b{self.pairs}{source}"


def compare(comparison: Comparison, device: str, architecture: Architecture | None = None) -> list[Row]:
    """Return one row for each implementation, in order; ratios are the reference's time over the step's.

    Args:
        architecture: instead of that of `comparison.model`.

    Raises:
        ValueError: an unknown implementation.
    """
    architecture = architecture or step_inputs.architecture(comparison.model)
    batches = _batches(comparison, architecture, device)
    # A captured step keeps its memory, so it has the GPU for itself.
    groups = [[name for name in comparison.impls if "captured" not in name]]
    groups += [[name] for name in comparison.impls if "captured" in name]
    rows: dict[str, Row] = {}
    for names in (group for group in groups if group):
        rows |= _timed(replace(comparison, impls=names), architecture, batches, device)
        torch.cuda.empty_cache()
    return [rows[name] for name in comparison.impls]


def _timed(
    comparison: Comparison, architecture: Architecture, batches: Callable[[], Iterator[Batch]], device: str
) -> dict[str, Row]:
    """Return the rows of implementations that are timed together, by name."""
    first = next(batches())
    rows: dict[str, Row] = {n: {"name": comparison.name, "impl": n, "op": "step"} for n in comparison.impls}
    steps: dict[str, Step] = {}
    for name in comparison.impls:
        if reason := unavailable(name, device):
            rows[name]["left_out"] = reason
            continue
        try:
            step = make_step(name, architecture, device, comparison)
            for _ in range(step.calls):
                step.call(first)
        except torch.OutOfMemoryError as error:
            rows[name]["left_out"] = str(error).splitlines()[0]
            continue
        steps[name] = step
    in_a_row = comparison.data or "captured" in comparison.impls[0]
    rounds = (_rounds_in_a_row if in_a_row else _rounds_in_turns)(comparison, steps, batches, device)
    size, config = size_of(first), DiscoVLAConfig()
    common = {
        "model": comparison.model,
        "pairs": comparison.pairs,
        "frames": comparison.frames,
        "caption_tokens": size.tokens,
        "caption_length": size.length,
        "threads": torch.get_num_threads(),
        "needed_tflop": needed_flops(architecture, config, size) / 1e12,
        "reference_tflop": reference_flops(architecture, config, size) / 1e12,
    }
    for name, step in steps.items():
        rows[name] |= common | _times(rounds[name], rounds.get(BASE), comparison)
        rows[name] |= _counts(step, first, device)
        rows[name] |= _rates(rows[name], device)
        if step.measurements:
            rows[name]["candidates"] = [asdict(x) for x in step.measurements]
        if comparison.profile:
            rows[name]["profile_ms"] = by_component(partial(step.call, first), cuda=device == "cuda")
    return rows


def _batches(
    comparison: Comparison, architecture: Architecture, device: str
) -> Callable[[], Iterator[Batch]]:
    """Return a function that yields batches on the device without end: noise, or a loader started anew."""
    data = comparison.data
    if data is None:
        noise = step_inputs.noise(
            architecture,
            comparison.pairs,
            frames=comparison.frames,
            length=LENGTH,
            full=comparison.full_captions,
        )
        noise = noise.to(device)
        return lambda: (noise for _ in count())
    from discovla.data.dataset import read_clips  # here, because they need decoders
    from discovla.data.loader import BatchSpec, TrainLoader

    spec = BatchSpec(
        batch_size=comparison.pairs,
        rank=0,
        world_size=1,
        seed=0,
        image_size=architecture.image_size,
        context_length=data.context_length,
        frame_captions=True,
    )
    loader = TrainLoader(read_clips(data, data.train_split), data, spec)

    def epochs() -> Iterator[Batch]:
        for epoch in count():
            yield from (batch.to(device) for batch in loader.epoch(epoch))

    return epochs


def _rounds_in_turns(
    comparison: Comparison, steps: dict[str, Step], batches: Callable[[], Iterator[Batch]], device: str
) -> Rounds:
    """Call every step once a round, in alternating order."""
    rounds: Rounds = {name: [] for name in steps}
    begin, source = time.monotonic(), batches()
    for number in range(comparison.rounds):
        if number >= LEAST and time.monotonic() - begin > comparison.seconds:
            break
        batch = next(source)
        print(f"{comparison.name}: round {number + 1} of {comparison.rounds}", file=sys.stderr, flush=True)
        for name in list(steps) if number % 2 else list(reversed(steps)):
            rounds[name].append(_time(partial(steps[name].call, batch), device, _calls(name, device)))
    return rounds


def _calls(name: str, device: str) -> int:
    """Return how many calls in a row are timed as one: several of a whole step, whose copies overlap."""
    return IN_A_ROW if "whole" in name and device == "cuda" else 1


def _rounds_in_a_row(
    comparison: Comparison, steps: dict[str, Step], batches: Callable[[], Iterator[Batch]], device: str
) -> Rounds:
    """Call each step for all its rounds; times include the wait for the batch."""
    rounds: Rounds = {name: [] for name in steps}
    for name, step in steps.items():
        begin, source = time.monotonic(), batches()
        for _ in range(step.calls):
            step.call(next(source))
        for number in range(comparison.rounds):
            if number >= LEAST and time.monotonic() - begin > comparison.seconds / 5:
                break
            call = partial(lambda step, source: step.call(next(source)), step, source)
            rounds[name].append(_time(call, device, _calls(name, device)))
    return rounds


def _time(call: Callable[[], object], device: str, calls: int = 1) -> tuple[float, float]:
    """Return milliseconds of one call, the mean of `calls`: by the clock, and of this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    ms = 1000 / calls
    return ms * (time.perf_counter() - wall), ms * (time.process_time() - cpu)


def _times(
    rounds: list[tuple[float, float]], base: list[tuple[float, float]] | None, comparison: Comparison
) -> Row:
    """Return medians, spread, and the ratios to the reference, round by round."""
    wall = sorted(ms for ms, _ in rounds)
    row: Row = {
        "ms_p50": statistics.median(wall),
        "ms_p20": wall[int(0.2 * (len(wall) - 1))],
        "ms_p80": wall[int(0.8 * (len(wall) - 1))],
        "cpu_ms_p50": statistics.median(ms for _, ms in rounds),
        "n": len(rounds),
    }
    # With a loader some batches are ready and others late, so the mean counts.
    ms = statistics.fmean(wall) if comparison.data else row["ms_p50"]
    row["samples_s"] = 1000 * comparison.pairs / ms
    if base is not None:
        for kind, name in enumerate(("ratio", "cpu_ratio")):
            ratios = [b[kind] / x[kind] for b, x in zip(base, rounds, strict=True)]
            row[f"{name}_p50"] = statistics.median(ratios)
            row[f"{name}s"] = [round(ratio, 3) for ratio in ratios]
    return row


def _counts(step: Step, batch: Batch, device: str) -> Row:
    """Count bytes kept for backward, and kernels: on a CPU the ops that would start one."""
    row: Row = {"kept_mb": bytes_kept(lambda: step.forward(batch), step.parameters) / 1e6}
    if device == "cpu":
        with Launches() as launches:
            step.call(batch)
        return row | {"dispatched": launches.count}
    step.reset()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    own = sum(x.numel() * x.element_size() for x in step.parameters)
    for _ in range(step.calls):
        step.call(batch)
    row["launches"] = gpu_launches(lambda: step.call(batch))
    # without the weights of the other implementations
    row["peak_gb"] = (torch.cuda.max_memory_allocated() - before + own) / 1e9
    return row | {"extra_gb": row["peak_gb"]}


def _rates(row: Row, device: str) -> Row:
    """Return TFLOP/s of needed and of reference work; on a GPU also MFU and the targets of an H200."""
    rates: Row = {
        "tflops_needed": 1000 * row["needed_tflop"] / row["ms_p50"],
        "tflops_ref": 1000 * row["reference_tflop"] / row["ms_p50"],
    }
    if device == "cpu":
        return rates
    if peak := peak_tflops(torch.cuda.get_device_name()):
        rates |= {"mfu": rates["tflops_needed"] / peak, "mfu_ref": rates["tflops_ref"] / peak}
    if row["name"].endswith(" b128"):
        targets = FP8_TARGETS if "fp8" in row["impl"] else TARGETS
        rates["target_ms"], rates["target_gb"] = targets.get(row["model"], (None, None))
    return rates


LOW_RANK = 16  # a product with a smaller size belongs to a low-rank update
COMPONENTS = {  # the first pattern that matches counts
    "attention": r"scaled_dot_product|flash|fmha|softmax|bmm|(short|readout)_attention|temporal_fusion",
    "layer norms": r"layer_?norm|lora_norm|fusion_norm",
    "activations": r"silu|gelu|sigmoid|quick",
    "products": r"(^|::|_)(add)?mm(_|$)|linear|gemm|cutlass|xmma|cublas|nvjet|conv|matmul",
    "copies, casts, rows": r"copy|memcpy|memset|cat|clone|contiguous|index|gather|scatter|embed|fill|zero",
    "sums and products of elements": r"add|sub|mul|div|pow|exp|log|sum|mean|max|elementwise|reduce|norm|neg",
}


def component(name: str, shapes: Any = ()) -> str:
    """Return the component of an op or kernel; "other" is torch's work between them."""
    if "Backward" in name or name.startswith("autograd::"):
        return "other"
    for label, pattern in COMPONENTS.items():
        if re.search(pattern, name, re.IGNORECASE):
            sizes = [size for shape in shapes if isinstance(shape, list) for size in shape]
            low_rank = label == "products" and sizes and min(sizes) <= LOW_RANK
            return "low-rank products" if low_rank else label
    return "other"


def by_component(call: Callable[[], object], *, cuda: bool) -> dict[str, float]:
    """Return milliseconds of one call by component, the largest first.

    A GPU's kernels do not show the sizes of their products, so low-rank products are among the others.
    """
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], record_shapes=not cuda) as recorded:
        call()
        if cuda:
            torch.cuda.synchronize()
    ms: dict[str, float] = {}
    for event in recorded.key_averages(group_by_input_shape=not cuda):
        name = component(event.key, event.input_shapes or ())
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        ms[name] = ms.get(name, 0.0) + spent / 1000
    return dict(sorted(ms.items(), key=lambda item: -item[1]))


def show(row: Row) -> None:
    """Print one line, and the profile below it."""
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


def main(words: Sequence[str] | None = None) -> int:
    """Time every model at every size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["ViT-B/32"])
    parser.add_argument("--pairs", type=int, nargs="+", default=[2])
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--impl", nargs="+", choices=IMPLS, default=list(IMPLS))
    parser.add_argument(
        "--captions",
        choices=["short", "full"],
        nargs="+",
        default=["short", "full"],
        help="captions of noise with 12 tokens on average, or with all 32; default: both",
    )
    parser.add_argument("--rounds", type=int, help="default: 7 on a CPU, 50 on a GPU")
    parser.add_argument("--profile", action="store_true", help="profile one more step of each")
    parser.add_argument(
        "--manifest", type=Path, help="clips with frame captions, for batches from the loader"
    )
    parser.add_argument("--workers", type=int, default=2, help="reading processes, with --manifest")
    options = parser.parse_args(words)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    where = machine(device) | ({"ceilings": gpu_ceilings()} if device == "cuda" else {})
    path = results_file(where, "train-step")
    data = None
    if options.manifest:
        from discovla.data.config import DataConfig

        data = DataConfig(
            manifest=options.manifest,
            frames=options.frames,
            workers=options.workers,
            context_length=LENGTH,
        )
    captions = ["short"] if data else options.captions
    for model, pairs, length in product(options.model, options.pairs, captions):
        comparison = Comparison(
            model=model,
            pairs=pairs,
            frames=options.frames,
            impls=options.impl,
            rounds=options.rounds or (50 if device == "cuda" else 7),
            data=data,
            full_captions=length == "full",
            profile=options.profile,
        )
        for row in compare(comparison, device):
            write_row(path, {**where, **row})
            show(row)
    print(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
