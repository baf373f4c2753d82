"""ZeRO stage 3 with every parameter sharded: steps equal those of one process and no rank hangs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from discovla.engine import deepspeed as engine_deepspeed
from discovla.engine.config import EngineConfig
from discovla.engine.deepspeed import deepspeed_settings
from discovla.engine.distributed import World
from discovla.engine.ema import make_ema
from discovla.engine.optim import OptimConfig
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan, Strategy
from discovla.methods import base, clip4clip
from discovla.methods.base import Method
from discovla.ops.dispatch import Memory
from discovla.train_step import TrainStep
from tests import steps

pytestmark = pytest.mark.slow  # seconds to start DeepSpeed on two processes

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
STEPS = 3  # DeepSpeed gathers on demand in the first step, records the order in the second, then prefetches
GRADIENT = 1e-10


@dataclass(frozen=True, kw_only=True)
class Case:
    """Steps of a method: options as in its config; bad: unreadable clips, as in `steps.whole_batch`."""

    variant: str
    tune: str = "lora"
    memory: Memory = "keep"
    chunks: int = 1
    bad: bool | tuple[int, ...] = False

    def method(self) -> Method:
        """Build the method in float64 with float32 values, because DeepSpeed's masters are float32."""
        config = steps.VARIANTS[self.variant] | {"tune": self.tune}
        method = steps.make(config).float().double()
        for tower in (method.vision, method.text):
            tower.memory = self.memory
        return method


CASES = {
    **{f"adapters, {m}": Case(variant="discovla", memory=m) for m in ("keep", "recompute_mlp")},
    "adapters, recompute_projections": Case(variant="discovla", memory="recompute_projections"),
    "adapters, recompute_blocks": Case(variant="discovla", memory="recompute_blocks"),
    "full, recompute_mlp": Case(variant="discovla", tune="full", memory="recompute_mlp"),
    "full, recompute_blocks": Case(variant="discovla", tune="full", memory="recompute_blocks"),
    "pairs in blocks": Case(variant="tightTransf"),
    "ranks with unequal blocks": Case(variant="tightTransf", bad=True),
    **{
        f"{variant}, ragged": Case(variant=variant, bad=True)
        for variant in ("tokens", "seqTransf", "clip2video", "t2vparser, communicating")
    },
    **{
        f"{variant}, one rank without a readable clip": Case(variant=variant, bad=(1, 4, 5, 6, 7))
        for variant in ("discovla", "tightTransf", "order, tokens", "order, pairs", "t2vparser")
    },
    "order, tokens, ranks with unequal blocks": Case(variant="order, tokens", bad=True),
    "adapters, in chunks": Case(variant="discovla", chunks=3, bad=True),
    "full, in chunks": Case(variant="discovla", tune="full", chunks=2, memory="recompute_blocks"),
    "pairs in blocks, in chunks": Case(variant="tightTransf", chunks=4, bad=True),
    "a head, in chunks": Case(variant="t2vparser", chunks=3),
}


def every_case(world: World) -> dict[Any, Any]:
    """Return losses and gradients of each case at stage 3, and the results of an uneven evaluation."""
    clip4clip.HIDDEN = 2000  # five blocks of pairs
    base.PAIRS = 1  # and as many blocks of matching pairs as pairs
    results: dict[Any, Any] = {name: step(world, case) for name, case in CASES.items()}
    losses = [result["loss"].item() for result in results.values()]
    results["running"] = running(world)
    results["averages"] = [averaged(world, stage) for stage in (0, 3)]
    return {**results, "evaluated": evaluated(world), "loss": losses}


def running(world: World) -> list[int]:
    """Return the number of modules that count as running after each step with recomputed blocks."""
    strategy = shard(
        TrainStep(Case(variant="discovla", memory="recompute_blocks").method(), world, "exact"), world
    )
    batch, counts = steps.share(steps.whole_batch(bad=False), world), []
    for _ in range(STEPS):
        strategy.backward(strategy(batch).total)
        strategy.step(0.0)
        counts.append(len(import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK))
    return counts


def averaged(world: World, stage: Literal[0, 3]) -> dict[str, Tensor]:
    """Return the EMA after some steps, saved and loaded half-way, and embeddings with and without it."""
    method = Case(variant="discovla").method().float()
    method.compute_dtype = torch.float32
    strategy = shard(TrainStep(method, world, "exact"), world, stage)
    batch = steps.share(steps.whole_batch(bad=False), world)
    ema = make_ema(strategy, 0.5)
    assert ema is not None
    for _ in range(2):
        for _ in range(2):
            strategy.backward(strategy(batch).total)
            ema.update(strategy.step(1e-2))
        state, ema = ema.state(), make_ema(strategy, 0.5)
        assert ema is not None
        ema.load(state)
    with strategy.gathered() as module, torch.no_grad():
        before = module.method.encode_texts(batch).pooled
        with ema.applied():
            inside = module.method.encode_texts(batch).pooled
        after = module.method.encode_texts(batch).pooled
    return {**ema.state(), "before": before, "inside": inside, "after": after}


def step(world: World, case: Case) -> dict[str, Tensor]:
    """Return loss and gradients, averaged over ranks, of the last of `STEPS` steps with learning rate 0."""
    module = TrainStep(case.method(), world, "exact", case.chunks)
    gradients: dict[str, Tensor] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            collect_gradient(param, name, gradients)
    strategy = shard(module, world)
    for _ in range(STEPS):
        gradients.clear()
        losses = strategy(steps.share(steps.whole_batch(bad=case.bad), world))
        strategy.backward(losses.total)
        strategy.step(0.0)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= world.size
    return {"loss": losses.total.detach(), **losses.terms, **gradients}


def collect_gradient(param: torch.nn.Parameter, name: str, gradients: dict[str, Tensor]) -> None:
    """Sum a parameter's gradients as they arrive, before DeepSpeed shards them."""

    def add(p: Tensor) -> None:
        assert p.grad is not None
        gradients[name] = gradients.get(name, 0) + p.grad.clone()

    param.register_post_accumulate_grad_hook(add)


def shard(module: TrainStep, world: World, stage: Literal[0, 3] = 3) -> Strategy:
    """Return a stage 3 strategy that releases every parameter after its module, however small."""
    plan = StepPlan(
        engine=EngineConfig(zero_stage=stage, grad_cache_chunks=module.grad_cache_chunks),
        optim=OptimConfig(clip_grad_norm=None),
        world=world,
        batch_size=steps.BATCH,
    )
    with no_persistence():
        return make_strategy(module, plan)


@contextmanager
def no_persistence():
    """Set the thresholds below which DeepSpeed keeps gathered parameters to 0, and let it shard float64."""

    def strict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        settings = deepspeed_settings(*args, **kwargs)
        if settings["zero_optimization"]["stage"] == 3:
            thresholds = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
            settings["zero_optimization"] |= thresholds
        return settings

    accelerator = type(import_module("deepspeed").get_accelerator())
    supported = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda self: False  # else DeepSpeed refuses float64
    engine_deepspeed.deepspeed_settings = strict
    try:
        yield
    finally:
        engine_deepspeed.deepspeed_settings = deepspeed_settings
        accelerator.is_fp16_supported = supported


def evaluated(world: World) -> list[Tensor]:
    """Return embeddings before and after steps; rank 0 evaluates once, rank 1 three times."""
    strategy = shard(TrainStep(Case(variant="discovla").method(), world, "exact"), world)
    batch, similarities = steps.share(steps.whole_batch(bad=False), world), []
    for _ in range(2):
        with strategy.gathered() as module, torch.no_grad():
            for _ in range(1 + 2 * world.rank):
                text, video = module.method.encode(batch)
        similarities.append(text.pooled @ video.pooled.T)
        for _ in range(STEPS):
            strategy.backward(strategy(batch).total)
            strategy.step(1e-2)
    return similarities


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[Any, Any]:
    return steps.on_ranks(every_case, 2, tmp_path_factory.mktemp("stage3"), seconds=240)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_those_of_one_process(found, name):
    case = CASES[name]
    wanted = steps.take(TrainStep(case.method(), ALONE, "exact"), steps.whole_batch(bad=case.bad))
    got = found[name]
    assert got.keys() == wanted.keys()
    assert abs(got["loss"] - wanted["loss"]) <= 1e-12 * abs(wanted["loss"])
    largest = max(x.abs().max() for key, x in wanted.items() if key.startswith("method."))
    for key, value in wanted.items():
        size = max(value.abs().max(), 1e-4 * largest) if key.startswith("method.") else 1
        assert (got[key] - value).abs().max() <= GRADIENT * size, key


def test_the_sharded_ema_equals_the_unsharded_one(found):
    wanted, got = found["averages"]
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
    assert torch.equal(got["before"], got["after"])
    assert (got["inside"] - got["before"]).abs().max() > 1e-3


def test_recomputed_modules_do_not_pile_up_as_running(found):
    assert len(set(found["running"])) == 1, found["running"]


def test_ranks_may_evaluate_different_numbers_of_batches(found):
    before, after = found["evaluated"]
    text, video = Case(variant="discovla").method().encode(steps.whole_batch(bad=False)[:4])
    torch.testing.assert_close(before, text.pooled @ video.pooled.T, rtol=1e-12, atol=1e-12)
    assert (after - before).abs().max() > 1e-2
