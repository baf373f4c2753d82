"""The flat optimiser gives the numbers of one optimiser step for each tensor, and reads none on the host."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from discovla.engine.flat import FlatOptimizer
from discovla.engine.optim import OptimConfig, ParameterGroup, make_optimizer, set_learning_rate

GROUPS = (
    ParameterGroup(names=("0.*",), lr_scale=0.1, weight_decay=0.0),
    ParameterGroup(names=("*.bias",), weight_decay=0.0),
)
NAMES = ("adamw_released", "adamw", "bert_adam")


def module() -> nn.Module:
    """Return layers of odd sizes, one of them frozen and one without a gradient in some steps."""
    layers = [nn.Linear(5, 7), nn.Linear(7, 33), nn.Linear(33, 3), nn.Linear(3, 3), nn.Linear(3, 1)]
    layers[2].requires_grad_(False)
    return nn.Sequential(*layers)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gradients(module: nn.Module, step: int) -> list[Tensor | None]:
    """Return gradients from 1e-9 to 10 in size; the last layer but one has none in even steps."""
    generator = torch.Generator().manual_seed(step)
    drawn = [torch.randn(p.shape, generator=generator) for p in trained(module).values()]
    drawn = [x * 10.0 ** (-9 + 10 * i / len(drawn)) for i, x in enumerate(drawn)]
    absent = [name.startswith("3.") and step % 2 == 0 for name in trained(module)]
    return [None if without else x for without, x in zip(absent, drawn, strict=True)]


def step_tensors(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: float,
    grads: list[Tensor | None],
    limit: float | None,
) -> Tensor:
    """Take a step tensor by tensor, as a training loop in plain torch does; return the norm."""
    params = list(trained(module).values())
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.zeros_like(param) if grad is None else grad.clone()
    norm = nn.utils.clip_grad_norm_(params, float("inf") if limit is None else limit, foreach=False)
    set_learning_rate(optimizer, lr)
    optimizer.step()
    return norm


def rates() -> list[float]:
    return [0.0, 1e-3, 0.02, 0.0137, 3e-4]


@pytest.mark.parametrize("limit", [None, 0.7, 100.0])
@pytest.mark.parametrize("groups", [(), GROUPS], ids=["one group", "three groups"])
@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_moments_equal_those_of_separate_tensors_bit_for_bit(name, groups, limit):
    ours = module()
    theirs = copy.deepcopy(ours)
    config = OptimConfig(name=name, weight_decay=0.3, clip_grad_norm=limit)
    flat, separate = FlatOptimizer(ours, config, groups), make_optimizer(theirs, config, groups)
    for step, lr in enumerate(rates()):
        flat.set_learning_rate(lr)
        flat.set_gradients(gradients(ours, step))
        norm = flat.update()
        assert torch.equal(norm, step_tensors(theirs, separate, lr, gradients(theirs, step), limit))
    for name_, param in trained(theirs).items():
        assert torch.equal(trained(ours)[name_], param), name_
        for key, named in flat.moments().items():
            assert torch.equal(named[name_], separate.state[param][key]), (key, name_)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_whose_norm_is_not_finite_changes_nothing(name, value):
    config = OptimConfig(name=name, weight_decay=0.3)
    skipping, plain = module(), module()
    plain.load_state_dict(skipping.state_dict())
    optimizers = [FlatOptimizer(each, config, GROUPS) for each in (skipping, plain)]
    for step in range(4):
        for optimizer in optimizers[: 1 if step == 1 else 2]:
            optimizer.set_learning_rate(0.01)
            grads = gradients(plain, step)
            if step == 1:
                grads[0].view(-1)[3] = value
            optimizer.set_gradients(grads)
            assert optimizer.update().isfinite() == (step != 1)
    assert torch.equal(optimizers[0].flat, optimizers[1].flat)
    assert torch.equal(optimizers[0].mean, optimizers[1].mean)
    assert torch.equal(optimizers[0].square, optimizers[1].square)
    assert optimizers[0].steps == optimizers[1].steps == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_nothing_from_the_device(name):
    """Tensors on "meta" have no values to read."""
    layers = module().to("meta")
    optimizer = FlatOptimizer(layers, OptimConfig(name=name), GROUPS)
    optimizer.set_learning_rate(0.1)
    optimizer.set_gradients([None if g is None else g.to("meta") for g in gradients(layers, 0)])
    assert optimizer.update().is_meta


def test_parameters_are_views_of_one_buffer_that_start_at_multiples_of_64_bytes():
    layers = module()
    before = {name: p.detach().clone() for name, p in layers.named_parameters()}
    optimizer = FlatOptimizer(layers, OptimConfig(), GROUPS)
    for name, param in layers.named_parameters():
        assert torch.equal(param, before[name])
        if param.requires_grad:
            assert param.untyped_storage()._cdata == optimizer.flat.untyped_storage()._cdata
            assert param.data_ptr() % 64 == 0


def test_preserved_restores_what_updates_changed():
    optimizer = FlatOptimizer(module(), OptimConfig())
    optimizer.set_learning_rate(0.1)
    optimizer.grad.fill_(1.0)
    optimizer.update()
    state = [x.clone() for x in (optimizer.flat, optimizer.mean, optimizer.square, optimizer.steps)]
    with optimizer.preserved():
        optimizer.update()
        assert not torch.equal(optimizer.flat, state[0])
    now = (optimizer.flat, optimizer.mean, optimizer.square, optimizer.steps)
    assert all(torch.equal(a, b) for a, b in zip(now, state, strict=True))


def test_trained_parameters_of_two_dtypes_are_refused():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"of one dtype, found torch\.float32 and torch\.float64"):
        FlatOptimizer(layers, OptimConfig())
