"""What a training step takes on 1 to 1,024 GPUs: predicted from rates given, its bytes held to counted ones.

    python benchmarks/scale.py                              the table, with the assumptions it rests on
    python benchmarks/scale.py --towers-ms 48 --loss-tflops 420 --bandwidth 280     from what was measured
    python benchmarks/scale.py --count 1 2 4                count the bytes of real runs on CPU processes

Time and memory are predictions.  What is counted is what collectives send: each process of a real run wraps
them and adds up its own; the formula must come within 5 %.  Rows of both go to --out, one JSON a line.
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
SUMS = 5  # numbers a text has summed over ranks: of the statistics of two matrices, both ways
FLOAT = 4  # bytes: sums and gradients travel in float32, embeddings in what the towers compute in
COUNTED = {"all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor"}
COUNTED |= {"all_reduce", "all_to_all_single"}
PAIRS, FRAMES = 8, 3  # of all processes together, of the runs that are counted


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes that decide what a step sends and computes; the defaults are DiscoVLA at ViT-B/32.

    pairs: of one GPU.  dim: of an embedding.  frames: a clip's, each with a caption that travels too.
    wire: bytes of a number of an embedding, or of its gradient, on its way between GPUs: 2 in bf16.
    trained, frozen: parameters.  tokens, width, layers: of the vision tower for one frame; the text tower
    counts with 12 tokens a caption, at two thirds of that width.
    """

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
    """What one GPU and its links do; none of the defaults has been measured here.

    towers_ms: forward and backward of both towers and the update, on one GPU.  loss_tflops: of the similarity
    matrices.  bandwidth: GB/s through a GPU's link in a ring.  latency: microseconds of a small all-reduce
    for each doubling of GPUs.  straggler: share of a step that the slowest of 1,024 costs.
    """

    towers_ms: float = 52.0
    loss_tflops: float = 450.0
    bandwidth: float = 330.0
    latency: float = 20.0
    straggler: float = 0.015


def sent_bytes(model: Model, world_size: int) -> dict[str, float]:
    """Bytes that a rank sends in a step, all collectives as rings.

    Of W ranks with b pairs each and B in all: texts and their frames' captions, (1 + F) D numbers a pair, and
    their gradients back, (W - 1) b (1 + F) D each, of `wire` bytes; which clip a pair shows, 8 bytes; in
    float32, 5 sums a text, twice (W - 1) / W B, and gradients of T parameters, twice (W - 1) / W T.
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
    """Milliseconds of a step on each of `world_size` GPUs, by part, and its weak-scaling efficiency.

    The gather runs beside the vision tower's forward pass (a third of the towers' time), the scatter beside
    its backward pass (the rest); what is longer shows.  Similarities: a GPU's columns of two matrices, four
    products each, 8 B b (F² + 1) D operations.
    """
    moved = {
        name: 1e3 * size / (rates.bandwidth * 1e9) for name, size in sent_bytes(model, world_size).items()
    }
    pairs = world_size * model.pairs * model.pairs
    loss = 8 * pairs * (model.frames**2 + 1) * model.dim / (rates.loss_tflops * 1e12) * 1e3
    doublings = (world_size - 1).bit_length()
    waits = 3 * rates.latency / 1e3 * doublings  # two of sums, one of gradients
    shown = max(0.0, moved["gather"] - rates.towers_ms / 3)
    shown += max(0.0, moved["scatter"] - rates.towers_ms * 2 / 3)
    shown += moved["sums"] + moved["gradients"] + waits
    straggling = rates.straggler * doublings / 10 * rates.towers_ms
    total = rates.towers_ms + loss + shown + straggling
    alone = rates.towers_ms + 8 * model.pairs**2 * (model.frames**2 + 1) * model.dim / (
        rates.loss_tflops * 1e9
    )
    return {
        "towers": rates.towers_ms,
        "loss": loss,
        "communication": shown,
        "straggler": straggling,
        "step": total,
        "efficiency": alone / total,
        "efficiency with the loss as work": (rates.towers_ms + loss) / total,
    }


def memory_bytes(model: Model, world_size: int) -> dict[str, float]:
    """Bytes on each GPU in bf16: state by engine/memory.py, activations, everyone's texts and gradients."""
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
    """The prediction for every size, under what it assumes."""
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
    return "\n".join([*lines, "eff*: the loss's operations, which grow with B, counted as work"])


def counted(world_size: int, wire: int) -> tuple[Model, Counter[str]]:
    """The sizes of a real step on CPU processes, and the bytes that its first rank sent, by collective.

    wire: bytes of a number of an embedding: 2 where towers compute in bf16, else 4.
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
    """One process: a step of a tiny DiscoVLA, whose collectives are counted."""
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
    """Count what each of torch's collectives sends as a ring would."""
    sent: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in COUNTED if hasattr(dist, name)}

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counts(*tensors: Any, **options: Any) -> Any:
            given = tensors[0] if name == "all_reduce" else tensors[1]
            factor = size - 1 if name.startswith("all_gather") else (size - 1) / size  # of an exchange too
            factor *= 2 if name == "all_reduce" else 1
            sent[name] += round(factor * given.numel() * given.element_size())
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
    """Print the table, or count; write rows."""
    parser = argparse.ArgumentParser(description="Predict and count what a step takes on many GPUs.")
    for name, value in asdict(Rates()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, metavar="X")
    for name, value in asdict(Model()).items():
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N")
    parser.add_argument("--count", type=int, nargs="+", metavar="W", help="count real runs of W processes")
    parser.add_argument("--out", type=Path, help="file of results; default: one of the day and commit")
    given = vars(parser.parse_args(words))
    where = machine("cpu")
    out = given["out"] or results_file(where, "scale")
    if given["count"]:
        right = [_check(w, wire, where, out) for w in given["count"] for wire in (4, 2)]
        return 0 if all(right) else 1
    rates = Rates(**{name: given[name] for name in asdict(Rates())})
    model = Model(**{name: given[name] for name in asdict(Model())})
    print(table(model, rates))
    for w in WORLDS:
        row = {"name": "scale", "kind": "predicted", "world_size": w, "ms": step_ms(model, rates, w)}
        row |= {"sent": sent_bytes(model, w), "memory": memory_bytes(model, w)}
        write_row(out, row | {"model": asdict(model), "rates": asdict(rates), **where})
    return 0


def _check(world_size: int, wire: int, where: dict[str, Any], out: Path) -> bool:
    """Count a run, say how far the formula is off, and whether that is at most 5 %."""
    model, sent = counted(world_size, wire)
    predicted, found = sum(sent_bytes(model, world_size).values()), sum(sent.values())
    off = abs(predicted - found) / found if found else predicted
    print(
        f"{world_size} processes, {wire} bytes a number of embeddings: {found:,} bytes sent by a rank, "
        f"predicted {predicted:,.0f}, off {off:.2%}"
    )
    row = {"name": "scale", "kind": "counted", "world_size": world_size, "sent": dict(sent)}
    write_row(out, row | {"predicted": predicted, "off": off, "model": asdict(model), **where})
    return off <= 0.05


if __name__ == "__main__":
    sys.exit(main())
