from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from discovla.nn import memory
from discovla.nn.block import Block, BlockShape
from discovla.nn.layout import SequenceLayout
from discovla.nn.memory import WIDTHS, MemoryPlan, choose_memory
from tests.nn.test_block import made, results

MODES = list(WIDTHS)[1:]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("case", ["published", "fine-tuned in full", "branch"])
def test_every_memory_mode_gives_the_same_losses_and_gradients_bit_for_bit(case, impl):
    method, batch = made(case, torch.float32)
    method.vision.memory = method.text.memory = "keep"
    want = results(method, batch, impl)
    for mode in MODES:
        method.vision.memory = method.text.memory = mode
        got = results(method, batch, impl)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], value) for name, value in want.items()), mode


@pytest.mark.parametrize(
    "mode", ["recompute_blocks", pytest.param("recompute_projections", marks=pytest.mark.slow)]
)
def test_fused_blocks_of_kernels_are_recomputed(mode):
    method, batch = made("every block fused, positions, masks", torch.float32)
    method.vision.memory = method.text.memory = "keep"
    kept = results(method, batch[:2], "triton")
    method.vision.memory = method.text.memory = mode
    recomputed = results(method, batch[:2], "triton")
    assert all(torch.equal(recomputed[name], value) for name, value in kept.items())


@pytest.mark.parametrize("mode", MODES)
def test_without_backward_nothing_is_checkpointed(mode, monkeypatch):
    monkeypatch.delattr(memory, "checkpoint")
    block = Block(BlockShape(width=8, heads=2, mlp_width=16))
    with torch.no_grad():
        block(torch.randn(2, 3, 8), SequenceLayout(memory=mode))


def test_the_first_memory_mode_that_fits_is_chosen():
    found = [choose_memory(100, free) for free in (1125, 1124, 625, 624, 250, 249, 1)]
    keep, mlp, projections, blocks = WIDTHS
    assert found == [keep, mlp, mlp, projections, projections, blocks, blocks]


def test_the_memory_mode_is_chosen_again_only_for_a_larger_batch(monkeypatch):
    free = iter([3 * 600 * 4 * 9 * 10 / 8, 3 * 1200 * 4 * 5 * 10 / 8])
    monkeypatch.setattr(memory, "free_bytes", lambda device: next(free))
    plan = MemoryPlan(layers=3)

    def rows(count: int) -> Tensor:
        x = torch.zeros(count, 6)
        given = {"numel": x.numel, "element_size": x.element_size, "device": torch.device("cuda")}
        return cast(Tensor, SimpleNamespace(is_cuda=True, **given))

    found = [plan.choose("auto", rows(count)) for count in (100, 50, 100, 200, 200, 100)]
    assert found == ["keep"] * 3 + ["recompute_mlp"] * 3
    assert plan.choose("recompute_blocks", rows(1000)) == "recompute_blocks"
    with torch.no_grad():
        assert plan.choose("auto", rows(1000)) == "keep"


def test_on_a_cpu_everything_is_kept():
    assert MemoryPlan(layers=12).choose("auto", torch.zeros(1 << 20, 1)) == "keep"
