"""Predict the time, memory and traffic of a training step on 1 to 1,024 GPUs, and count its traffic on CPUs.

    python benchmarks/scale.py                              the table, with the assumptions it rests on
    python benchmarks/scale.py --towers-ms 48 --loss-tflops 420 --bandwidth 280     with your measurements
    python benchmarks/scale.py --count 1 2 4                count the bytes of real steps on CPU processes

Time and memory are predictions.  The bytes that collectives send are counted in a real step, by wrapping them
in each process; the formula must be within 5 %.  Rows of both go to --out, one JSON object per line.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks.measure import machine, results_file, write_row
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import join_world, leave_world
from discovla.engine.memory import Sizes, TokenLayers, activation_bytes, state_bytes
from discovla.engine.optim import OptimConfig
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan, trained_size
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.testing import noise_batch, tiny_architecture
from discovla.towers.weights import initialise
from discovla.train_step import TrainStep

WORLDS = tuple(2**k for k in range(11))
SUMS = 5  # numbers per text that are summed over ranks: statistics of two matrices in both directions
FLOAT = 4  # bytes of sums and gradients, which are sent in float32
COUNTED = {"all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor"}
COUNTED |= {"all_reduce", "all_to_all_single"}
PAIRS, FRAMES = 8, 3  # of all processes together in a counted step


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes that a step's traffic and work depend on; the defaults are DiscoVLA at ViT-B/32.

    pairs: per GPU.  dim: of an embedding.  frames: per clip, each with a caption whose embedding is sent too.
    wire: bytes per number of an embedding, or of its gradient, between GPUs: 2 in bf16.
    trained, frozen: numbers of parameters.  tokens, width, layers: of the vision tower for one frame; the
    text tower counts with 12 tokens per caption and two thirds of that width."""

    pairs: int = 128
    dim: int = 512
    frames: int = 12
    wire: int = 2
    trained: int = 561_200
    frozen: int = 151_000_000
    tokens: int = 50
    width: int = 768
    layers: int = 12


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Speed of one GPU and its links; the defaults are assumptions, not measurements.

    towers_ms: forward and backward of both towers and the update, on one GPU.  loss_tflops: of the similarity
    matrices.  bandwidth: GB/s through a GPU's link in a ring.  latency: microseconds of a small all-reduce
    per doubling of GPUs.  straggler: share of a step lost to the slowest of 1,024 GPUs."""

    towers_ms: float = 52.0
    loss_tflops: float = 450.0
    bandwidth: float = 330.0
    latency: float = 20.0
    straggler: float = 0.015


def sent_bytes(model: Model, world_size: int) -> dict[str, float]:
    """Return the bytes that a rank sends in a step by ring collectives, by part.

    For W ranks with b pairs each, B = W b: embeddings of texts and frame captions and their gradients,
    (W - 1) b (1 + F) D numbers of `wire` bytes each; clip indices, 8 bytes per pair; in float32, 5 sums per
    text, 2 (W - 1) / W B each, and gradients of T parameters, 2 (W - 1) / W T.
    """
    w, b = world_size, model.pairs
    embeddings = (w - 1) * b * (1 + model.frames) * model.dim * model.wire
    ring = 2 * (w - 1) / w
    return {
        "gather": embeddings + (w - 1) * b * 8,
        "scatter": embeddings,
        "sums": ring * SUMS * w * b * FLOAT,
        "gradients": ring * model.trained * FLOAT,
    }


def step_ms(model: Model, rates: Rates, world_size: int) -> dict[str, float]:
    """Return the milliseconds of a step on `world_size` GPUs, by part, and its weak-scaling efficiency.

    The gather overlaps with the vision tower's forward (a third of the towers' time), the scatter with its
    backward (the rest); only what exceeds these counts.  Similarities: a GPU's columns of two matrices, four
    matrix products each, 8 B b (F² + 1) D operations.
    """
    transfer = {
        name: 1e3 * size / (rates.bandwidth * 1e9) for name, size in sent_bytes(model, world_size).items()
    }
    pairs = world_size * model.pairs * model.pairs
    loss = 8 * pairs * (model.frames**2 + 1) * model.dim / (rates.loss_tflops * 1e12) * 1e3
    doublings = (world_size - 1).bit_length()
    waits = 3 * rates.latency / 1e3 * doublings  # two all-reduces of sums, one of gradients
    exposed = max(0.0, transfer["gather"] - rates.towers_ms / 3)
    exposed += max(0.0, transfer["scatter"] - rates.towers_ms * 2 / 3)
    exposed += transfer["sums"] + transfer["gradients"] + waits
    straggling = rates.straggler * doublings / 10 * rates.towers_ms
    total = rates.towers_ms + loss + exposed + straggling
    alone = rates.towers_ms + 8 * model.pairs**2 * (model.frames**2 + 1) * model.dim / (
        rates.loss_tflops * 1e9
    )
    return {
        "towers": rates.towers_ms,
        "loss": loss,
        "communication": exposed,
        "straggler": straggling,
        "step": total,
        "efficiency": alone / total,
        "efficiency with the loss as work": (rates.towers_ms + loss) / total,
    }


def memory_bytes(model: Model, world_size: int) -> dict[str, float]:
    """Return the bytes on each GPU in bf16: state, activations, gathered texts and their gradients."""
    sizes = Sizes(frozen=model.frozen, trained=model.trained, world_size=world_size)
    frames = model.pairs * model.frames
    towers = [
        TokenLayers(rows=frames * model.tokens, width=model.width, layers=model.layers),
        TokenLayers(rows=(frames + model.pairs) * 12, width=model.width * 2 // 3, layers=model.layers),
    ]
    texts = 2 * world_size * model.pairs * (1 + model.frames) * model.dim * FLOAT
    return {
        "state": sum(state_bytes(EngineConfig(precision="bf16"), sizes).values()),
        "activations": activation_bytes(towers, widths=9, element=2),
        "texts of all": texts,
    }


def table(model: Model, rates: Rates) -> str:
    """Format the prediction for every number of GPUs, with its assumptions."""
    lines = [
        "Predicted, not measured. Assumed: "
        + ", ".join(f"{name} {value:g}" for name, value in asdict(rates).items()),
        "Model: " + ", ".join(f"{name} {value:,}" for name, value in asdict(model).items()),
        f"{'W':>5} {'B':>8} {'sent MB':>9} {'loss ms':>8} {'comm ms':>8} {'step ms':>8} {'eff':>6} "
        f"{'eff*':>6} {'clips/s':>10} {'GB':>6}",
    ]
    for w in WORLDS:
        ms, memory = step_ms(model, rates, w), sum(memory_bytes(model, w).values())
        efficiency = ms["efficiency"], ms["efficiency with the loss as work"]
        lines.append(
            f"{w:>5} {w * model.pairs:>8,} {sum(sent_bytes(model, w).values()) / 1e6:>9,.1f} "
            f"{ms['loss']:>8.2f} {ms['communication']:>8.2f} {ms['step']:>8.1f} "
            f"{efficiency[0]:>6.1%} {efficiency[1]:>6.1%} "
            f"{1e3 * w * model.pairs / ms['step']:>10,.0f} {memory / 1e9:>6.1f}"
        )
    return "\n".join([*lines, "eff*: with the loss's operations, which grow with B, counted as work"])


def counted(world_size: int, wire: int) -> tuple[Model, Counter[str]]:
    """Run a step on CPU processes; return its sizes and the bytes that rank 0 sent, by collective.

    wire: bytes per number of an embedding: 2 computes the towers in bf16, 4 in fp32.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    port = str(20_000 + os.getpid() % 20_000)
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, wire, (port, answers)))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        if process.exitcode != 0:
            raise RuntimeError(f"a rank of {world_size} ended with {process.exitcode}")
    return answers.get()


def _rank(rank: int, size: int, wire: int, where: tuple[str, Any]) -> None:
    """Run one process: a step of a tiny DiscoVLA whose collectives are counted."""
    port, answers = where
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    world, architecture = join_world("cpu"), tiny_architecture()
    method = DiscoVLA(architecture, DiscoVLAConfig(fused_vision_blocks=1, fused_text_blocks=1))
    initialise(method, architecture, seed=0)
    method.freeze()
    method.compute_dtype = torch.bfloat16 if wire == 2 else torch.float32
    engine = EngineConfig(strategy="torch")
    plan = StepPlan(engine=engine, optim=OptimConfig(), world=world, batch_size=PAIRS)
    strategy = make_strategy(TrainStep(method, world, "exact"), plan)
    own = PAIRS // size
    batch = noise_batch(architecture, size=PAIRS, frames=FRAMES)[rank * own : (rank + 1) * own]
    batch = type(batch)(**{**vars(batch), "valid": None})
    with counting(size) as sent:
        strategy.backward(strategy(batch).total)
        strategy.step(1e-3)
    model = Model(pairs=own, dim=architecture.embed_dim, frames=FRAMES, wire=wire)
    model = replace(model, trained=trained_size(method))
    leave_world()
    if rank == 0:
        answers.put((model, sent))


@contextmanager
def counting(size: int) -> Iterator[Counter[str]]:
    """Count the bytes that each of torch's collectives would send in a ring."""
    sent: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COUNTED if hasattr(dist, name)}

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counts(*tensors: Any, **options: Any) -> Any:
            sent_tensor = tensors[0] if name == "all_reduce" else tensors[1]
            factor = size - 1 if name.startswith("all_gather") else (size - 1) / size  # also for all_to_all
            factor *= 2 if name == "all_reduce" else 1
            sent[name] += round(factor * sent_tensor.numel() * sent_tensor.element_size())
            return call(*tensors, **options)

        return counts

    for name, call in originals.items():
        setattr(dist, name, wrap(name, call))
    try:
        yield sent
    finally:
        for name, call in originals.items():
            setattr(dist, name, call)


def main(words: Sequence[str] | None = None) -> int:
    """Print the table, or count bytes; write rows."""
    parser = argparse.ArgumentParser(
        description="Predict a training step on many GPUs, or count its traffic."
    )
    for name, value in asdict(Rates()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, metavar="X")
    for name, value in asdict(Model()).items():
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N")
    parser.add_argument(
        "--count", type=int, nargs="+", metavar="W", help="count the bytes of steps of W processes"
    )
    parser.add_argument("--out", type=Path, help="file of results; default: one of the day and commit")
    options = vars(parser.parse_args(words))
    where = machine("cpu")
    out = options["out"] or results_file(where, "scale")
    if options["count"]:
        right = [_check(w, wire, where, out) for w in options["count"] for wire in (4, 2)]
        return 0 if all(right) else 1
    rates = Rates(**{name: options[name] for name in asdict(Rates())})
    model = Model(**{name: options[name] for name in asdict(Model())})
    print(table(model, rates))
    for w in WORLDS:
        row = {"name": "scale", "kind": "predicted", "world_size": w, "ms": step_ms(model, rates, w)}
        row |= {"sent": sent_bytes(model, w), "memory": memory_bytes(model, w)}
        write_row(out, row | {"model": asdict(model), "rates": asdict(rates), **where})
    return 0


def _check(world_size: int, wire: int, where: dict[str, Any], out: Path) -> bool:
    """Count a step and print the formula's error; return True if it is at most 5 %."""
    model, sent = counted(world_size, wire)
    predicted, counted_bytes = sum(sent_bytes(model, world_size).values()), sum(sent.values())
    off = abs(predicted - counted_bytes) / counted_bytes if counted_bytes else predicted
    print(
        f"{world_size} processes, {wire} bytes per number: {counted_bytes:,} bytes sent by a rank, "
        f"predicted {predicted:,.0f}, off {off:.2%}"
    )
    row = {"name": "scale", "kind": "counted", "world_size": world_size, "sent": dict(sent)}
    write_row(out, row | {"predicted": predicted, "off": off, "model": asdict(model), **where})
    return off <= 0.05


if __name__ == "__main__":
    sys.exit(main())
