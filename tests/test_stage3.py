"""ZeRO's stage 3, every parameter really split: steps are those of one process, no rank waits."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from discovla.engine import deepspeed as zero_strategy
from discovla.engine.config import EngineConfig
from discovla.engine.deepspeed import deepspeed_settings
from discovla.engine.distributed import World
from discovla.engine.ema import make_ema
from discovla.engine.optim import OptimConfig
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan, Strategy
from discovla.methods import clip4clip
from discovla.methods.base import Method
from discovla.ops.dispatch import Memory
from discovla.train_step import TrainStep
from tests import steps

pytestmark = pytest.mark.slow  # seconds to start DeepSpeed on two processes

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
STEPS = 3  # DeepSpeed takes parameters as they are asked for, then notes their order, then fetches ahead
GRADIENT = 1e-10


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method's steps: options as in its configs, and whether clips could not be read."""

    variant: str
    tune: str = "lora"
    memory: Memory = "keep"
    parts: int = 1
    bad: bool = False

    def method(self) -> Method:
        """In float64, of numbers that float32 holds: DeepSpeed's masters are no wider."""
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
    "adapters, in parts": Case(variant="discovla", parts=3, bad=True),
    "full, in parts": Case(variant="discovla", tune="full", parts=2, memory="recompute_blocks"),
    "pairs in blocks, in parts": Case(variant="tightTransf", parts=4, bad=True),
    "a head, in parts": Case(variant="t2vparser", parts=3),
}


def every_case(world: World) -> dict[Any, Any]:
    """Losses and gradients of each case at stage 3, and what an evaluation of unequal length gives."""
    clip4clip.HIDDEN = 2000  # five blocks of pairs
    found: dict[Any, Any] = {name: step(world, case) for name, case in CASES.items()}
    losses = [result["loss"].item() for result in found.values()]
    found["running"] = running(world)
    found["averages"] = [averaged(world, stage) for stage in (0, 3)]
    return {**found, "evaluated": evaluated(world), "loss": losses}


def running(world: World) -> list[int]:
    """After each of some steps, in which blocks are computed again, the modules taken for running."""
    strategy = split(
        TrainStep(Case(variant="discovla", memory="recompute_blocks").method(), world, "exact"), world
    )
    batch, found = steps.share(steps.whole_batch(bad=False), world), []
    for _ in range(STEPS):
        strategy.backward(strategy(batch).total)
        strategy.step(0.0)
        found.append(len(import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK))
    return found


def averaged(world: World, stage: Literal[0, 3]) -> dict[str, Tensor]:
    """The average after some steps with half of them loaded, and embeddings with and without it."""
    method = Case(variant="discovla").method().float()
    method.compute_dtype = torch.float32
    strategy = split(TrainStep(method, world, "exact"), world, stage)
    batch = steps.share(steps.whole_batch(bad=False), world)
    average = make_ema(strategy, 0.5)
    assert average is not None
    for _ in range(2):
        for _ in range(2):
            strategy.backward(strategy(batch).total)
            strategy.step(1e-2)
            average.update()
        state, average = average.state(), make_ema(strategy, 0.5)
        assert average is not None
        average.load(state)
    with strategy.gathered() as module, torch.no_grad():
        before = module.method.encode_texts(batch).pooled
        with average.applied():
            inside = module.method.encode_texts(batch).pooled
        after = module.method.encode_texts(batch).pooled
    return {**average.state(), "before": before, "inside": inside, "after": after}


def step(world: World, case: Case) -> dict[str, Tensor]:
    """Loss and gradients, averaged over ranks, of the last of some steps that change nothing."""
    module = TrainStep(case.method(), world, "exact", case.parts)
    gradients: dict[str, Tensor] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            noted(param, name, gradients)
    strategy = split(module, world)
    for _ in range(STEPS):
        gradients.clear()
        losses = strategy(steps.share(steps.whole_batch(bad=case.bad), world))
        strategy.backward(losses.total)
        strategy.step(0.0)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= world.size
    return {"loss": losses.total.detach(), **losses.terms, **gradients}


def noted(param: torch.nn.Parameter, name: str, gradients: dict[str, Tensor]) -> None:
    """Add up a parameter's whole gradient as it comes, before DeepSpeed takes it."""

    def note(p: Tensor) -> None:
        assert p.grad is not None
        gradients[name] = gradients.get(name, 0) + p.grad.clone()

    param.register_post_accumulate_grad_hook(note)


def split(module: TrainStep, world: World, stage: Literal[0, 3] = 3) -> Strategy:
    """Stage 3 that keeps no parameter, however small, longer than its module runs."""
    plan = StepPlan(
        engine=EngineConfig(zero_stage=stage, grad_cache_chunks=module.grad_cache_chunks),
        optim=OptimConfig(clip_grad_norm=None),
        world=world,
        batch_size=steps.BATCH,
    )
    with keeping_nothing():
        return make_strategy(module, plan)


@contextmanager
def keeping_nothing():
    """DeepSpeed's settings with the thresholds at 0 under which it keeps what it gathered."""

    def strict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        settings = deepspeed_settings(*args, **kwargs)
        if settings["zero_optimization"]["stage"] == 3:
            more = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
            settings["zero_optimization"] |= more
        return settings

    zero_strategy.deepspeed_settings = strict
    try:
        yield
    finally:
        zero_strategy.deepspeed_settings = deepspeed_settings


def evaluated(world: World) -> list[Tensor]:
    """Embeddings before and after a step of a method that a rank evaluates once, another thrice."""
    strategy = split(TrainStep(Case(variant="discovla").method(), world, "exact"), world)
    batch, seen = steps.share(steps.whole_batch(bad=False), world), []
    for _ in range(2):
        with strategy.gathered() as module, torch.no_grad():
            for _ in range(1 + 2 * world.rank):
                text, video = module.method.encode(batch)
        seen.append(text.pooled @ video.pooled.T)
        for _ in range(STEPS):
            strategy.backward(strategy(batch).total)
            strategy.step(1e-2)
    return seen


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[Any, Any]:
    return steps.on_ranks(every_case, 2, tmp_path_factory.mktemp("stage3"), seconds=240)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(found, name):
    case = CASES[name]
    wanted = steps.take(TrainStep(case.method(), ALONE, "exact"), steps.whole_batch(bad=case.bad))
    got = found[name]
    assert got.keys() == wanted.keys()
    assert abs(got["loss"] - wanted["loss"]) <= 1e-12 * abs(wanted["loss"])
    largest = max(x.abs().max() for key, x in wanted.items() if key.startswith("method."))
    for key, value in wanted.items():
        size = max(value.abs().max(), 1e-4 * largest) if key.startswith("method.") else 1
        assert (got[key] - value).abs().max() <= GRADIENT * size, key


def test_an_average_of_slices_is_that_of_whole_parameters(found):
    wanted, got = found["averages"]
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
    assert torch.equal(got["before"], got["after"])
    assert (got["inside"] - got["before"]).abs().max() > 1e-3


def test_modules_that_are_computed_again_do_not_pile_up(found):
    assert len(set(found["running"])) == 1, found["running"]


def test_ranks_evaluate_as_long_as_each_has_to(found):
    before, after = found["evaluated"]
    text, video = Case(variant="discovla").method().encode(steps.whole_batch(bad=False)[:4])
    torch.testing.assert_close(before, text.pooled @ video.pooled.T, rtol=1e-12, atol=1e-12)
    assert (after - before).abs().max() > 1e-2
