import math

import pytest
import torch
from torch import Tensor

from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.sigmoid_loss import _sigmoid_loss, sigmoid_loss
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["sigmoid_loss"]
BUDGET = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 1e-3,
}  # of fp16 its gradients' own rounding
SIZES = [1, 7, 63, 130]


def leaves(n: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    rows = [torch.randn(n, 5, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in "tv"]
    wide = torch.promote_types(dtype, torch.float32)
    scalars = [torch.tensor(x, device=DEVICE, dtype=wide) for x in (7.0, -4.0)]
    return [x.requires_grad_() for x in [*rows, *scalars]]


def by_hand(text: Tensor, video: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Pair by pair."""
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    cosines = torch.nn.functional.normalize(text) @ torch.nn.functional.normalize(video).T
    for i, row in enumerate(cosines):
        sign = -torch.ones_like(row)
        sign[i] = 1
        total = total + torch.log1p(torch.exp(-sign * (scale * row + bias))).sum()
    return total / len(text)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_value_and_gradients_are_those_of_the_formula(n, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    x = leaves(n, dtype)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    want, got = by_hand(*truth), sigmoid_loss(*x, impl=impl)
    pairs = [(got, want), *zip(torch.autograd.grad(got, x), torch.autograd.grad(want, truth), strict=True)]
    for g, w in pairs:
        assert (g.double() - w).abs().max() <= BUDGET[dtype] * max(0.1, w.abs().max())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_any_cut_into_blocks_gives_the_same(impl, monkeypatch):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    x = leaves(11, torch.float64)
    whole = sigmoid_loss(*x, impl=impl)
    wanted = torch.autograd.grad(whole, x)
    for module in ("discovla.ops.streamed", "discovla_kernels"):
        monkeypatch.setattr(f"{module}.sigmoid_loss.pairs_per_block", lambda text: 24)
    cut = sigmoid_loss(*x, impl=impl)
    torch.testing.assert_close([cut, *torch.autograd.grad(cut, x)], [whole, *wanted])


@pytest.mark.parametrize("impl", IMPLS)
def test_far_logits_neither_overflow_nor_vanish(impl):
    eye, zero = torch.eye(2, device=DEVICE), torch.tensor(0.0, device=DEVICE)
    loss = sigmoid_loss(eye, -eye, torch.tensor(500.0, device=DEVICE), zero, impl=impl)
    # each of two matching pairs loses 500, each of two others log 2
    assert loss.item() == pytest.approx(500 + math.log(2), rel=1e-6)


def test_the_reference_passes_gradcheck():
    x = leaves(4, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, impl="reference"), x)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_op_is_registered_soundly(impl):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_sigmoid_loss, (*leaves(5, torch.float64), impl), test_utils=tests)
