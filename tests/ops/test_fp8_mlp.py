import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import relative_frobenius
from discovla.nn.block import ACTIVATIONS
from discovla.ops.fp8_linear import fp8_linear, quantise_weight
from discovla.ops.fp8_mlp import FP8MLPWeights, fp8_mlp
from discovla.ops.quantise_rows import FP8, quantise_rows
from tests.ops.kernels import DEVICE

T, W, M = 33, 32, 128


def made(backward: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, FP8MLPWeights, list[Tensor]]:
    """Rows, weights in FP8, and those that they were made of."""
    x = torch.randn(T, 1, W, device=DEVICE).to(dtype).requires_grad_()
    up, down = torch.randn(M, W, device=DEVICE) / W**0.5, torch.randn(W, M, device=DEVICE) / M**0.5
    biases = 0.1 * torch.randn(M, device=DEVICE), 0.1 * torch.randn(W, device=DEVICE)
    rounded = [quantise_weight(weight.to(dtype), backward=backward) for weight in (up, down)]
    weights = FP8MLPWeights(up=rounded[0], up_bias=biases[0], down=rounded[1], down_bias=biases[1])
    return x, weights, [up, biases[0], down, biases[1]]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("backward", [False, True])
def test_values_and_gradients_are_those_of_its_layers_and_near_the_true_ones(activation, backward):
    x, weights, plain = made(backward)
    out = fp8_mlp(x, weights, activation=activation, impl="reference")
    direction = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, direction)
    h = fp8_linear(x, weights.up, weights.up_bias, impl="reference")
    layers = fp8_linear(ACTIVATIONS[activation](h), weights.down, weights.down_bias, impl="reference")
    (expected,) = torch.autograd.grad(layers, x, direction)
    for got, want in ((out, layers), (gradient, expected)):
        assert relative_frobenius(got, want) <= 2e-3, "numbers between two of FP8 go either way"
    up, up_bias, down, down_bias = (part.double() for part in plain)
    wide = x.detach().double().requires_grad_()
    g = F.linear(wide, up, up_bias)
    g = F.gelu(g) if activation == "gelu" else g * (1.702 * g).sigmoid()
    truth = F.linear(g, down, down_bias)
    (true_gradient,) = torch.autograd.grad(truth, wide, direction.double())
    assert 0.01 < relative_frobenius(out, truth) < 0.06
    assert 0.01 < relative_frobenius(gradient, true_gradient) < 0.06


@pytest.mark.parametrize("backward", [False, True])
def test_only_h_is_kept_and_an_unneeded_output_is_not_computed(backward, monkeypatch):
    x, weights, _ = made(backward, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = fp8_mlp(x, weights)
    own = {id(part) for weight in (weights.up, weights.down) for part in weight.backward_tensors}
    (h,) = [t for t in kept if id(t) not in own]
    assert h.shape == (T, M) and h.dtype == out.dtype == torch.bfloat16
    (want,) = torch.autograd.grad(out, x, torch.ones_like(out))
    other = fp8_mlp(x, weights, output_needed=False)
    (got,) = torch.autograd.grad(other, x, torch.ones_like(out))
    assert other.shape == out.shape and torch.equal(got, want)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("t", "i"), [(1, 1), (7, 63), (130, 16), (3, 4097)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_rounds_after_an_activation_as_the_reference(activation, hidden, t, i, dtype):
    x = torch.randn(t, i, device=DEVICE).to(dtype)
    h = torch.randn(t, i, device=DEVICE).to(dtype) if hidden else None
    scale, options = torch.logspace(-1, 1, i, device=DEVICE), {"activation": activation, "hidden": h}
    want, got = (quantise_rows(x, scale, **options, impl=impl) for impl in ("reference", "triton"))
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0)
    codes = [q.view(torch.uint8).int() for q, _ in (want, got)]
    apart = (codes[0] - codes[1]).abs()
    assert apart.max() <= 1 and apart.float().mean() <= 2e-3, "one to the next number of FP8, in few places"
    truth = x.double() * scale
    if hidden:
        wide = h.double().requires_grad_()
        ACTIVATIONS[activation](wide).sum().backward()
        truth = truth * wide.grad
    else:
        truth = ACTIVATIONS[activation](x.double()) * scale
    assert relative_frobenius(got[0].float() * got[1], truth) <= 0.04
    assert got[0].dtype == FP8


@pytest.mark.parametrize("backward", [False, True])
def test_the_kernel_gives_the_values_and_gradients_of_the_reference(backward):
    x, weights, _ = made(backward, torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    actual = {}
    for impl in ("reference", "triton"):
        out = fp8_mlp(x, weights, impl=impl)
        actual[impl] = out, *torch.autograd.grad(out, x, out.detach().flip(0))
    for got, want in zip(actual["triton"], actual["reference"], strict=True):
        assert relative_frobenius(got, want) <= 5e-3


def test_shapes_that_do_not_fit_are_refused():
    x, weights, _ = made(False)
    with pytest.raises(ValueError, match=r"x: expected shape \(33, 1, 32\), found \(33, 1, 31\)"):
        fp8_mlp(x[..., :31], weights)
    short = FP8MLPWeights(**{**vars(weights), "down": weights.down[:16]})
    with pytest.raises(ValueError, match=r"bias: expected shape \(16,\), found \(32,\)"):
        fp8_mlp(x, short)
    with pytest.raises(ValueError, match=r"hidden: expected shape \(33, 32\), found \(33, 31\)"):
        quantise_rows(x[:, 0], activation="gelu", hidden=x[:, 0, :31])
    with pytest.raises(ValueError, match=r"column_scale: expected shape \(32,\), found \(31,\)"):
        quantise_rows(x[:, 0], torch.ones(31, device=DEVICE))
