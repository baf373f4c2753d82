import pytest
import torch
from torch import Tensor

from discovla.nn.block import MLP, BlockShape
from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.mlp import MLPWeights, _mlp, mlp
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["mlp"]
SIZES = [1, 7, 63, 64, 130]
ACTIVATIONS = ["quick_gelu", "gelu"]
# fp16: h and the gradients are rounded to 11 bits
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3}
NAMES = ("x", "up", "up_bias", "down", "down_bias")


def leaves(rows: int, width: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (hidden, width), (hidden,), (width, hidden), (width,)]
    actual = []
    for shape in shapes:
        size = shape[1] ** -0.5 if shape != (rows, width) and len(shape) == 2 else 1
        noise = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        actual.append(noise.to(DEVICE, dtype).requires_grad_())
    return actual


def call(x: list[Tensor], activation, impl: str) -> Tensor:
    weights = MLPWeights(up=x[1], up_bias=x[2], down=x[3], down_bias=x[4])
    return mlp(x[0], weights, activation=activation, impl=impl)


def assert_close(got: Tensor, want: Tensor, budget: float, name: str) -> None:
    assert (got.double() - want).abs().max() <= budget * max(1, want.abs().max()), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", SIZES)
def test_values_and_gradients_are_those_of_the_formula(rows, activation, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    x = leaves(rows, 33, 70, dtype)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    want, got = call(truth, activation, "reference"), call(x, activation, impl)
    assert got.dtype == dtype
    assert_close(got, want, BUDGET[dtype], "value")
    direction = torch.randn(want.shape, dtype=torch.float64, device=DEVICE)
    expected = torch.autograd.grad((want * direction).sum(), truth)
    actual = torch.autograd.grad((got * direction.to(dtype)).sum(), x)
    for name, g, w in zip(NAMES, actual, expected, strict=True):
        assert_close(g, w, BUDGET[dtype], name)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("impl", IMPLS)
def test_activations_far_from_zero_neither_overflow_nor_vanish(impl):
    x = torch.tensor([[-80.0, -1.0, 0.0, 1.0, 80.0]], device=DEVICE).T.requires_grad_()
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    weights = MLPWeights(up=one, up_bias=zero, down=one, down_bias=zero)
    for activation in ACTIVATIONS:
        out = mlp(x, weights, activation=activation, impl=impl)
        (slope,) = torch.autograd.grad(out.sum(), x)
        assert out[[0, 2, 4], 0].tolist() == pytest.approx([0, 0, 80], abs=1e-30)
        assert slope[[0, 2, 4], 0].tolist() == pytest.approx([0, 0.5, 1], abs=1e-30)


def test_of_frozen_weights_only_the_hidden_rows_are_kept():
    x = leaves(7, 5, 20, torch.float32)
    for leaf in x[1:]:
        leaf.requires_grad_(False)
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call(x, "quick_gelu", "triton")
    weights = {leaf.untyped_storage().data_ptr() for leaf in x[1:]}
    assert [tuple(t.shape) for place, t in kept.items() if place not in weights] == [(7, 20)]
    out.sum().backward()
    assert x[0].grad is not None and x[1].grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_the_mlp_of_a_block(impl):
    module = MLP(BlockShape(width=12, heads=2, mlp_width=20)).to(DEVICE)
    up, down = module.up, module.down
    weights = MLPWeights(up=up.weight, up_bias=up.bias, down=down.weight, down_bias=down.bias)
    x = torch.randn(2, 3, 12, device=DEVICE)
    torch.testing.assert_close(mlp(x, weights, impl=impl), module(x), atol=1e-6, rtol=1e-5)


def test_the_reference_passes_gradcheck():
    x = leaves(3, 4, 5, torch.float64)
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda *x, a=activation: call(list(x), a, "reference"), x)


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    x = leaves(4, 5, 6, torch.float64)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_mlp, (*x, "gelu", "triton", True, True), test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x = leaves(3, 4, 5, torch.float32)
    for index, name in enumerate(NAMES):
        if index:
            wrong = [leaf[:, :-1] if i == index and leaf.ndim > 1 else leaf for i, leaf in enumerate(x)]
            wrong[index] = wrong[index][:-1] if wrong[index].ndim == 1 else wrong[index]
            with pytest.raises(ValueError, match=f"^{name}: expected shape"):
                call(wrong, "gelu", impl)
    with pytest.raises(ValueError, match=r"^activation: expected quick_gelu or gelu, found 'relu'"):
        call(x, "relu", impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_unneeded_output_has_the_same_gradients(impl):
    x = leaves(7, 12, 20, torch.float32)
    weights = MLPWeights(up=x[1], up_bias=x[2], down=x[3], down_bias=x[4])
    outs = [mlp(x[0], weights, output_needed=needed, impl=impl) for needed in (True, False)]
    grads = [torch.autograd.grad(out, x, torch.ones_like(out)) for out in outs]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
