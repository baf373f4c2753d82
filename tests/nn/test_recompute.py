import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.nn.block import LayerNorm, Linear
from discovla.nn.lora import LoRA
from discovla.nn.recompute import (
    normed_lora_projection,
    pad_rows,
    quick_gelu_mlp,
    recompute_in_backward,
    take_rows,
)
from discovla.ops.short_attention import Packing

DTYPES = [
    pytest.param(torch.float64, 1e-12, id="fp64"),
    pytest.param(torch.float32, 1e-5, id="fp32"),
    pytest.param(torch.bfloat16, 3e-2, id="bf16"),
]


def compare(got, want, leaves: list[Tensor], limit: float) -> None:
    """Values and gradients by a random direction, relative to the largest."""
    direction = torch.randn(want().shape, dtype=torch.float64)
    found = []
    for call in (got, want):
        out = call()
        grads = torch.autograd.grad((out.double() * direction).sum(), leaves)
        found.append([out.detach(), *grads])
    for one, two in zip(*found, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        error = (one.double() - two.double()).abs().max() / two.double().abs().max()
        assert error <= limit, error.item()


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5)], ids=str)
def test_quick_gelu_mlp_equals_its_formula(dtype, limit, rows):
    up, down = Linear(6, 24).requires_grad_(False), Linear(24, 6).requires_grad_(False)
    x = torch.randn(*rows, 6).to(dtype).requires_grad_()
    exact = dtype if dtype != torch.bfloat16 else torch.float32

    def want() -> Tensor:
        up_weight, up_bias, down_weight, down_bias = (
            p.to(dtype).to(exact) for p in (up.weight, up.bias, down.weight, down.bias)
        )
        h = F.linear(x.to(exact), up_weight, up_bias)
        return F.linear(h * torch.sigmoid(1.702 * h), down_weight, down_bias).to(dtype)

    compare(lambda: quick_gelu_mlp(x, up.weights(dtype), down.weights(dtype)), want, [x], limit)


def test_an_mlp_without_output_has_the_same_gradient():
    up, down = Linear(6, 24).requires_grad_(False), Linear(24, 6).requires_grad_(False)
    x = torch.randn(5, 6, requires_grad=True)
    weights = up.weights(x.dtype), down.weights(x.dtype)
    grads = [
        torch.autograd.grad(quick_gelu_mlp(x, *weights, output_needed=needed), x, torch.ones(5, 6))[0]
        for needed in (True, False)
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("first", [False, True], ids=["inner", "first"])
def test_normed_lora_projection_equals_its_formula(dtype, limit, first):
    norm, linear, lora = LayerNorm(6), Linear(6, 18), LoRA(6, 18, 2)
    with torch.no_grad():
        for p in (norm.weight, norm.bias, lora.b):
            p.normal_()
    norm.requires_grad_(False), linear.requires_grad_(False), lora.to(dtype)
    x = (3 * torch.randn(3, 5, 6)).to(dtype).requires_grad_(not first)
    exact = dtype if dtype != torch.bfloat16 else torch.float32
    a, b = lora.a, lora.b

    def got() -> Tensor:
        return normed_lora_projection(x, (norm.weight, norm.bias, norm.eps), linear.weights(dtype), (a, b))

    def want() -> Tensor:
        y = F.layer_norm(x.to(exact), (6,), norm.weight.to(exact), norm.bias.to(exact), norm.eps)
        weight, bias = (p.to(exact) for p in linear.weights(dtype))
        return (F.linear(y, weight, bias) + (y @ a.to(exact).T) @ b.to(exact).T).to(dtype)

    compare(got, want, [a, b] if first else [x, a, b], limit)


def test_recompute_in_backward_keeps_only_its_inputs():
    x, y, fixed = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True), torch.randn(3)

    def function(x: Tensor, y: Tensor, fixed: Tensor, absent: None) -> tuple[Tensor, Tensor]:
        assert absent is None
        return (x * y).exp().sum(1), (x + fixed).tanh()

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = recompute_in_backward(function, x, y, fixed, None)
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (x, y, fixed))
    want = function(x, y, fixed, None)
    weights = [torch.randn_like(t) for t in want]
    grads = [torch.autograd.grad(outs, [x, y], weights) for outs in (found, want)]
    for one, two in zip((*found, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(one, two)


def test_recompute_in_backward_allows_outputs_of_frozen_inputs():
    frozen, trained = torch.randn(3), torch.randn(3, requires_grad=True)
    fixed, product = recompute_in_backward(lambda x, y: (2 * x, x * y), frozen, trained)
    (fixed.sum() + product.sum()).backward()
    assert torch.equal(trained.grad, frozen)


def test_padding_and_packing_rows_are_inverse():
    kept = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0]]).bool()
    packing = Packing.from_mask(kept)
    assert packing.mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    padded = pad_rows(x, packing.pad_index, packing.pack_index)
    assert (
        torch.equal(padded[0], x[:3])
        and torch.equal(padded[1, 0], x[3])
        and torch.equal(padded[2, :2], x[4:])
    )
    assert torch.equal(take_rows(padded.flatten(0, 1), packing.pack_index), x)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, torch.tensor([4, 0, 2])), x)
    real = packing.mask[..., None].double()
    assert torch.autograd.gradcheck(lambda x: pad_rows(x, packing.pad_index, packing.pack_index) * real, x)
