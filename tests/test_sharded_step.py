"""A step on several processes, each with its own columns of the similarity matrix, equals that of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discovla.batch import Batch
from discovla.engine.distributed import CommDtype, World, start_gather
from discovla.train_step import TrainStep
from tests import steps

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
LOSS, GRADIENT = 1e-12, 1e-10
SIZES = (2, pytest.param(4, marks=pytest.mark.slow))
CHUNKS = {1: 3, 2: 3, 4: 2}  # of 8, 4 and 2 clips per rank
COUNTED, OFFICIAL = "discovla", "clip"


def every_step(world: World) -> dict[Any, Any]:
    """Compute losses and gradients of every variant with and without bad rows, and count work and bytes."""
    found: dict[Any, Any] = {}
    batches = {bad: steps.share(steps.whole_batch(bad=bad), world) for bad in (False, True)}
    for variant in steps.VARIANTS:
        step = TrainStep(steps.make(variant), world, "exact")
        found |= {(variant, bad): steps.take(step, batch) for bad, batch in batches.items()}
        step = TrainStep(step.method, world, "exact", grad_cache_chunks=CHUNKS[world.size])
        found["chunks", variant] = steps.take(step, batches[True])
    found["official"] = steps.take(TrainStep(steps.make(OFFICIAL), world, "official"), batches[False])
    losses = [result["loss"].item() for result in found.values()]
    step = TrainStep(steps.make(COUNTED), world, "exact")
    with steps.Sent(world.size) as sent:
        record_order(step.method.vision, "vision", sent.order)
        step(batches[False]).total.backward()
    found |= {"bytes": dict(sent.bytes), "order": list(sent.order)}
    found["work"] = steps.counted_losses(step, batches[False])
    for dtype in ("compute", "fp32"):
        found["bf16", dtype], found["bf16 bytes", dtype] = in_bf16(world, batches[True], dtype)
    return {**found, "sum": bf16_gradient_sum(world), "loss": losses}


def in_bf16(world: World, batch: Batch, comm_dtype: CommDtype) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Take a step whose towers compute in bf16; return it with the bytes it sends."""
    step = TrainStep(steps.make(COUNTED).float(), world, "exact", comm_dtype=comm_dtype)
    step.method.compute_dtype = torch.bfloat16
    with steps.Sent(world.size) as sent:
        step(batch).total.backward()
    return steps.take(step, batch), dict(sent.bytes)


def bf16_gradient_sum(world: World) -> tuple[Tensor, Tensor]:
    """Return the gradient of rows gathered in bf16, and its expected value from the parts of all ranks."""
    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(world.size, 3 * world.size, 5, generator=generator)
    own = torch.ones(3, 5, requires_grad=True)
    whole = start_gather(own, world, torch.bfloat16)()
    (whole * parts[world.rank]).sum().backward()
    wanted = parts.bfloat16().float().sum(0).chunk(world.size)[world.rank]
    assert own.grad is not None
    return own.grad, wanted


def record_order(tower: nn.Module, name: str, order: list[str]) -> None:
    """Record when a tower's forward begins and when its first gradient is ready."""
    tower.register_forward_pre_hook(lambda *_: order.append(f"{name}: forward"))
    last = [p for p in tower.parameters() if p.requires_grad][-1]
    last.register_hook(lambda _: order.append(f"{name}: backward"))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Callable[[int], dict[Any, Any]]:
    """Return the function that computes `every_step` on a number of processes, once each."""
    folder = tmp_path_factory.mktemp("sharded")
    return cache(lambda size: every_step(ALONE) if size == 1 else steps.on_ranks(every_step, size, folder))


@pytest.mark.parametrize("bad", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("variant", steps.VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_losses_and_gradients_equal_those_of_one_process(found, size, variant, bad):
    check(found(size)[variant, bad], found(1)[variant, bad])


@pytest.mark.parametrize("variant", steps.VARIANTS)
@pytest.mark.parametrize("size", (1, *SIZES))
def test_gradient_caching_equals_the_step_of_the_complete_batch(found, size, variant):
    check(found(size)["chunks", variant], found(1)[variant, True])


def check(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare loss, terms and gradients."""
    assert got.keys() == wanted.keys()
    assert abs(got["loss"] - wanted["loss"]) <= LOSS * abs(wanted["loss"])
    largest = max(x.abs().max() for name, x in wanted.items() if name.startswith("method."))
    for name, value in wanted.items():
        # some gradients are zero in exact arithmetic, so that only rounding errors remain
        size = max(value.abs().max(), 1e-4 * largest) if name.startswith("method.") else 1
        assert (got[name] - value).abs().max() <= GRADIENT * size, name


def test_bad_rows_would_change_the_loss(found):
    for variant in steps.VARIANTS:
        whole, ragged = (found(1)[variant, bad]["loss"] for bad in (False, True))
        assert abs(whole - ragged) > 1e-3 * abs(whole)


@pytest.mark.parametrize("size", SIZES)
def test_official_gradients_are_one_over_the_processes_for_embeddings_only(found, size):
    got, wanted = found(size)["official"], found(1)[OFFICIAL, False]
    assert abs(got["loss"] - wanted["loss"]) <= LOSS * abs(wanted["loss"])
    assert wanted["method.logit_scale.log"].abs() > 1e-4
    for name, value in wanted.items():
        factor = size if name.startswith(("method.vision", "method.text")) else 1
        assert (factor * got[name] - value).abs().max() <= GRADIENT * max(1e-4, value.abs().max()), name


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_computes_its_share_of_the_losses(found, size):
    assert found(1)["work"] == size * found(size)["work"] > 0


@pytest.mark.parametrize("size", SIZES)
def test_bytes_sent_follow_the_formula(found, size):
    """Per rank 2 (W - 1) b (D + F D) s for embeddings and their gradients, 10 (W - 1) / W B s for sums.

    b texts of D numbers and their F frame captions per rank, B over all ranks, s bytes per number.
    """
    dim, s, own = 16, 8, steps.BATCH // size
    embeddings = 2 * (size - 1) * own * (dim + steps.FRAMES * dim) * s
    sums = 10 * (size - 1) / size * steps.BATCH * s
    sent = found(size)["bytes"]
    assert sent.keys() == {"all_gather_single", "reduce_scatter_single", "all_reduce"}
    assert sum(sent.values()) == pytest.approx(embeddings + sums, rel=0.05)
    assert found(1)["bytes"] == {}


@pytest.mark.parametrize("size", SIZES)
def test_in_bf16_embeddings_and_their_gradients_need_half_the_bytes(found, size):
    dim, own = 16, steps.BATCH // size
    embeddings = (size - 1) * own * (dim + steps.FRAMES * dim)
    short, full = (found(size)["bf16 bytes", dtype] for dtype in ("compute", "fp32"))
    assert full["reduce_scatter_single"] == 4 * embeddings
    assert short["all_to_all_single"] == 2 * embeddings
    assert full["all_gather_single"] - short["all_gather_single"] == 2 * embeddings
    assert short["all_reduce"] == full["all_reduce"]
    assert "reduce_scatter_single" not in short


@pytest.mark.parametrize("size", SIZES)
def test_sending_embeddings_of_bf16_towers_in_bf16_loses_nothing(found, size):
    short, full = (found(size)["bf16", dtype] for dtype in ("compute", "fp32"))
    assert short["loss"] == full["loss"]
    exact = found(1)[COUNTED, True]
    assert off(short, exact) <= 1.05 * off(full, exact), "more than the rounding of the towers"


def off(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the relative distance of all gradients together."""
    names = [name for name in wanted if name.startswith("method.")]
    found, exact = (torch.cat([x[name].double().flatten() for name in names]) for x in (got, wanted))
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("size", SIZES)
def test_gradients_sent_in_bf16_are_summed_in_fp32(found, size):
    got, wanted = found(size)["sum"]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_texts_are_gathered_while_videos_are_encoded(found, size):
    texts = 3  # tensors of the text side: pooled, frame captions, tells_order
    order = found(size)["order"]
    begin, end = ["all_gather_single"] * texts, ["waited: all_gather_single"] * texts
    assert order[: 2 * texts + 1] == [*begin, "vision: forward", *end]
    texts -= 1  # tells_order has no gradient
    begin, end = ["reduce_scatter_single"] * texts, ["waited: reduce_scatter_single"] * texts
    assert order[-2 * texts - 1 :] == [*begin, "vision: backward", *end]
    assert order.count("all_reduce") == 2
