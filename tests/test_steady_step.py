"""A steady training step reads nothing from the device: no number, no mask, no shape that depends on data."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from discovla.checkpoints import TrainState
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World
from discovla.engine.ema import make_ema
from discovla.engine.optim import OptimConfig
from discovla.engine.strategies import make_strategy
from discovla.engine.strategy import StepPlan
from discovla.engine.transfers import BatchCopier
from discovla.train_step import TrainStep
from discovla.trainer import Trainer, parameter_groups
from tests import steps

META = World(rank=0, size=1, local_rank=0, device=torch.device("meta"))
METHODS = ("discovla", "clip2video", "t2vparser", "seqTransf", "tightTransf", "clip", "order")
DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class ReadFromDevice(AssertionError):
    pass


class NoReads(TorchDispatchMode):
    """Raises if an op's result on the host, or its shape, depends on values of tensors on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if x.is_meta]
        if on_device and any(tag in func.tags for tag in DEPENDENT):
            name = func.overloadpacket.__name__
            by_index = name == "index" and all(x.dtype != torch.bool for x in tensors[1:])
            sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
            if not (by_index or sized):
                raise ReadFromDevice(str(func))
        if func.overloadpacket.__name__ in ("copy_", "_to_copy") and on_device:
            target = args[0] if func.overloadpacket.__name__ == "copy_" else None
            device = (
                target.device if target is not None else torch.device((kwargs or {}).get("device") or "meta")
            )
            if device.type == "cpu":
                raise ReadFromDevice(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: torch.empty(3).copy_(x),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.ones(3, device="meta").repeat_interleave(x.long()),
    ],
)
def test_the_mode_raises_on_every_kind_of_read(read):
    with NoReads(), pytest.raises(ReadFromDevice):
        read(torch.ones(3, device="meta"))


def test_the_mode_lets_reads_on_the_host_and_copies_to_the_device_pass():
    with NoReads():
        mask = torch.tensor([True, False, True])
        index = mask.nonzero()[:, 0].to("meta", non_blocking=True)
        assert torch.ones(3, device="meta")[index].shape == (2,)


def trainer_of(variant: str, optim: OptimConfig) -> tuple[Trainer, TrainState]:
    """Return a trainer and its state on "meta", whose numbers nobody can read."""
    method = steps.make(variant).float().train()
    method.compute_dtype = torch.float32
    plan = StepPlan(
        engine=EngineConfig(),
        optim=optim,
        world=META,
        batch_size=steps.BATCH,
        groups=parameter_groups(method),
    )
    strategy = make_strategy(TrainStep(method, META, "exact"), plan)
    trainer = object.__new__(Trainer)
    trainer.config = SimpleNamespace(seed=0, optim=optim)
    trainer.world, trainer.total_steps, trainer.method = META, 10, method
    trainer.quarantine = SimpleNamespace(known={})
    trainer.copy_batch = BatchCopier(META.device)
    return trainer, TrainState(strategy=strategy, ema=make_ema(strategy, optim.ema))


@pytest.mark.parametrize("bad", [False, True], ids=["all clips", "unreadable clips"])
@pytest.mark.parametrize("variant", METHODS)
def test_a_step_reads_nothing_from_the_device(variant, bad):
    trainer, state = trainer_of(variant, OptimConfig(ema=0.9))
    batch = steps.whole_batch(bad=bad)
    for _ in range(2):
        with NoReads():
            taken = trainer.take_step(state, batch, began=0.0)
    assert state.step == 2 and taken.numbers.names[0] == "loss" and taken.numbers.names[-1] == "grad_norm"


@pytest.mark.parametrize("name", ["adamw", "bert_adam"])
def test_a_step_of_every_optimiser_reads_nothing_from_the_device(name):
    trainer, state = trainer_of("clip2video", OptimConfig(name=name))
    with NoReads():
        trainer.take_step(state, replace(steps.whole_batch(bad=False)), began=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [False, True], ids=["all clips", "unreadable clips"])
@pytest.mark.parametrize("variant", METHODS)
def test_a_step_does_not_sync_with_the_gpu(variant, bad):
    method = steps.make(variant).float().train()
    method.compute_dtype = torch.float32
    world = replace(META, device=torch.device("cuda", torch.cuda.current_device()))
    plan = StepPlan(engine=EngineConfig(), optim=OptimConfig(), world=world, batch_size=steps.BATCH)
    strategy = make_strategy(TrainStep(method, world, "exact"), plan)
    batch = steps.whole_batch(bad=bad).map(lambda x: x.pin_memory())
    copy_batch = BatchCopier(world.device)
    strategy.take(copy_batch(batch), 1e-3)  # compiles, and starts the libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        strategy.take(copy_batch(batch), 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
