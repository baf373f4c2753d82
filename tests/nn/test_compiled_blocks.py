"""Blocks under torch.compile: one graph each, the numbers of plain torch, and no compiler in evaluation."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from discovla.engine.distributed import World
from discovla.nn import block, layout
from discovla.ops import dispatch
from discovla.testing import noise_batch, relative_error, tiny_architecture
from discovla.train_step import TrainStep
from tests import steps


@pytest.fixture
def step() -> TrainStep:
    torch._dynamo.reset()
    counters.clear()
    made = TrainStep(
        steps.make("discovla").float(),
        World(rank=0, size=1, local_rank=0, device=torch.device("cpu")),
        "exact",
    )
    made.method.compute_dtype = torch.float32
    return made


def batch(seed: int):
    return replace(noise_batch(tiny_architecture(), size=4, seed=seed), valid=None)


def compare(step: TrainStep, seeds: range) -> None:
    """Compare losses and gradients with those of plain torch."""
    for seed in seeds:
        results = []
        for impl in ("torch", "compiled"):
            step.method.vision.impl = step.method.text.impl = impl
            results.append(steps.take(step, batch(seed)))
        for name, value in results[0].items():
            assert relative_error(results[1][name], value) < 1e-4 or value.abs().max() < 1e-6, name


def test_every_block_is_one_graph_with_the_numbers_of_plain_torch(step, monkeypatch):
    traced = partial(torch.compile, backend="eager", fullgraph=True)
    kept = {}
    monkeypatch.setattr(block, "compiled", lambda function: kept.setdefault(function, traced(function)))
    compare(step, range(1))
    assert counters["stats"]["unique_graphs"] >= 4, "blocks of two towers, inner and last"


@pytest.mark.slow
def test_blocks_of_other_caption_lengths_are_compiled_once_more_at_most(step):
    compare(step, range(2))
    graphs = counters["stats"]["unique_graphs"]
    compare(step, range(2, 5))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_evaluation_and_modes_that_recompute_run_without_the_compiler(monkeypatch):
    x = torch.zeros(2, 3, 8)
    compiles = layout.SequenceLayout(impl="compiled").compiles
    assert compiles(x)
    assert not layout.SequenceLayout(impl="compiled", memory="recompute_mlp").compiles(x)
    with torch.no_grad():
        assert not compiles(x)
    monkeypatch.setitem(dispatch.AUTO, "block", {"cpu": "compiled"})
    monkeypatch.setattr(layout, "compile_fails", lambda device: pytest.fail("the compiler was tried"))
    assert layout.resolve_impl(x, "auto") == "torch"


def test_a_compiler_that_fails_is_named_once_and_plain_torch_taken(monkeypatch, caplog):
    monkeypatch.setitem(dispatch.AUTO, "block", {"cpu": "compiled"})
    monkeypatch.setattr(layout, "compile_fails", lambda device: "RuntimeError: no C++ compiler")
    dispatch.warn_once.cache_clear()
    for _ in range(2):
        assert layout.choose_blocks("auto", torch.zeros(2, 8)) == "torch"
    assert caplog.text.count("blocks run without torch.compile, which fails here: RuntimeError: no C++") == 1
    assert layout.choose_blocks("compiled", torch.zeros(2, 8)) == "compiled", "asked for by name"
