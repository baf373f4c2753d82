import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from discovla.engine.optim import (
    AdamW,
    OptimConfig,
    ParameterGroup,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)


def test_golden_adamw_gives_the_released_parameters(golden):
    want = json.loads((golden / "discovla/adamw.json").read_text())
    x = nn.Parameter(torch.tensor(want["init"], dtype=torch.float64))
    optimizer = AdamW(
        [x], lr=want["lr"], betas=tuple(want["betas"]), eps=want["eps"], weight_decay=want["weight_decay"]
    )
    for step in want["steps"]:
        x.grad = torch.tensor(step["grad"], dtype=torch.float64)
        optimizer.step()
        expected = torch.tensor(step["param_after"], dtype=torch.float64)
        torch.testing.assert_close(x.detach(), expected, rtol=1e-12, atol=0)


def test_golden_schedule_gives_the_released_learning_rates(golden):
    for case in json.loads((golden / "discovla/schedule.json").read_text())["cases"]:
        config = OptimConfig(lr=case["base_lr"], warmup=case["warmup_proportion"])
        for step, expected in case["lr_at_step"].items():
            values = learning_rate(int(step), case["total_steps"], config)
            assert values == pytest.approx(expected, rel=1e-12, abs=0), (case["total_steps"], step)
        last = learning_rate(case["total_steps"], case["total_steps"], config)
        assert last == pytest.approx(case["lr_after_last_step"], rel=1e-12, abs=1e-18)


def test_a_constant_schedule_stays_after_the_warm_up():
    config = OptimConfig(lr=0.5, warmup=0.2, schedule="constant")
    assert [learning_rate(step, 10, config) for step in (0, 1, 2, 9)] == [0.0, 0.25, 0.5, 0.5]


def test_the_schedule_of_t2vparser_cycles_and_ends_at_the_peak():
    # 100 epochs of 20 steps: 10 of warm-up, then a half-period of 4.5 epochs
    config, epoch = OptimConfig(lr=2.0, warmup=0.1, schedule="t2vparser"), 20
    at = [learning_rate(int(e * epoch), 100 * epoch, config) for e in (0, 10, 12.25, 14.5, 19, 95.5, 100)]
    assert at == pytest.approx([0.1, 2.0, 1.0, 0.0, 2.0, 0.0, 2.0], abs=1e-12)
    assert learning_rate(10 * epoch - 1, 100 * epoch, config) == pytest.approx(2.0)
    assert learning_rate(1, 100 * epoch, config) == pytest.approx(2 * (0.05 + 0.95 / 199))


def test_a_flat_tensor_is_updated_like_its_parts():
    parts = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7))]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parts]))
    settings = {"lr": 0.1, "weight_decay": 0.2}
    apart, together = AdamW(parts, **settings), AdamW([flat], **settings)
    for _ in range(4):
        for part in parts:
            part.grad = torch.randn_like(part)
        flat.grad = torch.cat([p.grad.flatten() for p in parts])
        apart.step()
        together.step()
    assert torch.equal(flat.detach(), torch.cat([p.detach().flatten() for p in parts]))


def test_the_released_adamw_differs_from_torchs():
    ours, torchs = (nn.Linear(3, 3) for _ in range(2))
    torchs.load_state_dict(ours.state_dict())
    for module, name in ((ours, "adamw_released"), (torchs, "adamw")):
        optimizer = make_optimizer(module, OptimConfig(name=name, lr=0.1))
        for param in module.parameters():
            param.grad = torch.full_like(param, 1e-4)
        optimizer.step()
    assert not torch.allclose(ours.weight, torchs.weight)


def test_frozen_parameters_are_left_out():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    (group,) = make_optimizer(module, OptimConfig()).param_groups
    assert [id(p) for p in group["params"]] == [id(module.weight)]


def test_a_group_has_its_own_learning_rate_and_decay():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = (
        ParameterGroup(names=("0.*",), lr_scale=0.1, weight_decay=0.0),
        ParameterGroup(names=("*.bias",)),
    )
    optimizer = make_optimizer(module, OptimConfig(weight_decay=0.3), groups)
    set_learning_rate(optimizer, 2.0)
    values = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert values == [(2, 0.2, 0.0), (1, 2.0, 0.3), (1, 2.0, 0.3)]


def test_a_group_that_matches_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"named like \('nowhere.\*',\), found none"):
        make_optimizer(nn.Linear(2, 2), OptimConfig(), (ParameterGroup(names=("nowhere.*",)),))


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="at least one parameter that requires a gradient, found none"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


@pytest.mark.parametrize("bad", [{"lr": 0}, {"warmup": 1.5}, {"learning_rate": 1}, {"name": "sgd"}], ids=str)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValidationError):
        OptimConfig(**bad)
