import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from discovla.engine.optim import BertAdam, OptimConfig, for_partitions, learning_rate, make_optimizer

DTYPES = [pytest.param(torch.float32, 1e-6, id="fp32"), pytest.param(torch.float64, 1e-12, id="fp64")]


@pytest.fixture(scope="module")
def file(golden):
    folder = golden / "clip2video"
    return json.loads((folder / "bertadam.json").read_text())["hyper"], load_file(
        folder / "bertadam.safetensors"
    )


def schedule(hyper) -> OptimConfig:
    return OptimConfig(lr=hyper["base_lr"], warmup=hyper["warmup"], schedule="warmup_cosine")


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
def test_golden_steps_give_the_released_parameters(file, dtype, limit):
    hyper, tensors = file
    names = [key for key in hyper if key.startswith("p")]
    params = {name: nn.Parameter(tensors[f"{name}.init"].to(dtype)) for name in names}
    optimizer = BertAdam(
        [{"params": [p], "weight_decay": hyper[n]["wd"], "base": hyper[n]["lr"]} for n, p in params.items()],
        lr=hyper["base_lr"],
        betas=(hyper["b1"], hyper["b2"]),
        eps=hyper["eps"],
        clip_tensor_norm=hyper["max_grad_norm"],
    )
    steps = len(tensors["lr_factor"])
    assert any(tensors[f"{n}.grad{s}"].norm() > hyper["max_grad_norm"] for n in names for s in range(steps))
    for step in range(steps):
        factor = learning_rate(step, hyper["t_total"], schedule(hyper)) / hyper["base_lr"]
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        for name, param in params.items():
            param.grad = tensors[f"{name}.grad{step}"].to(dtype)
        optimizer.step()
        for name, param in params.items():
            error = (param.detach().double() - tensors[f"{name}.after{step}"]).abs().max().item()
            assert error <= limit, (name, step, error)


def test_golden_schedule_is_not_rebased_after_the_warm_up(file):
    hyper, tensors = file
    rates = [learning_rate(s, hyper["t_total"], schedule(hyper)) for s in range(len(tensors["lr_factor"]))]
    assert rates == pytest.approx((tensors["lr_factor"] * hyper["base_lr"]).tolist(), rel=1e-12, abs=1e-16)


def test_without_a_warm_up_the_schedule_starts_at_its_peak():
    config = OptimConfig(lr=1.0, warmup=0.0, schedule="warmup_cosine")
    assert [learning_rate(s, 2, config) for s in range(3)] == pytest.approx([1.0, 0.5, 0.0])


def test_each_tensor_is_clipped_separately():
    large, small = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    large.grad, small.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    BertAdam([large, small], lr=1.0, betas=(0.0, 0.0), eps=1.0).step()
    # worked by hand: (0.6, 0.8) after clipping, (0.3, 0.4) untouched; g / (|g| + 1)
    torch.testing.assert_close(large.detach(), torch.tensor([-0.6 / 1.6, -0.8 / 1.8]))
    torch.testing.assert_close(small.detach(), torch.tensor([-0.3 / 1.3, -0.4 / 1.4]))
    assert large.grad.tolist() == [30.0, 40.0]


def test_without_tensor_clipping_a_flat_tensor_is_updated_like_its_parts():
    parts = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7))]
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parts]))
    config = for_partitions(OptimConfig(name="bert_adam", lr=0.1, clip_grad_norm=1.0))
    apart, together = (make_optimizer(nn.ParameterList(p), config) for p in (parts, [flat]))
    for _ in range(3):
        for part in parts:
            part.grad = torch.randn_like(part)
        flat.grad = torch.cat([p.grad.flatten() for p in parts])
        apart.step()
        together.step()
    assert torch.equal(flat.detach(), torch.cat([p.detach().flatten() for p in parts]))


def test_global_clipping_to_the_same_limit_makes_tensor_clipping_redundant():
    params = [nn.Parameter(torch.randn(4)) for _ in range(2)]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    config = OptimConfig(name="bert_adam", lr=0.1, clip_grad_norm=1.0)
    whole, sliced = (
        make_optimizer(nn.ParameterList(p), c)
        for p, c in ((params, config), (copies, for_partitions(config)))
    )
    for group in (params, copies):
        for number, param in enumerate(group):
            param.grad = torch.full((4,), 3.0 + number)
        nn.utils.clip_grad_norm_(group, 1.0)
    whole.step()
    sliced.step()
    for a, b in zip(params, copies, strict=True):
        assert torch.equal(a.detach(), b.detach())


@pytest.mark.parametrize("clip", [None, 2.0])
def test_slices_are_refused_if_tensor_clipping_could_have_an_effect(clip):
    config = OptimConfig(name="bert_adam", clip_grad_norm=clip)
    with pytest.raises(ValueError, match=r"optim\.clip_tensor_norm: expected optim\.clip_grad_norm <= 1"):
        for_partitions(config)
    assert for_partitions(config.model_copy(update={"clip_tensor_norm": None})).clip_grad_norm == clip
    other = OptimConfig(clip_grad_norm=clip)
    assert for_partitions(other) is other
