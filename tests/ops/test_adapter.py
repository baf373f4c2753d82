import pytest
import torch
from torch import Tensor

from discovla.nn.fusion import Adapter
from discovla.ops.adapter import _adapter, adapter
from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["adapter"]
NAMES = ("x", "down", "down_bias", "up", "up_bias")
# fp16: the bottleneck and the gradients are rounded to 11 bits
BUDGET = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3}
CASES = [(size, torch.float32) for size in (1, 7, 63, 130)] + [(7, torch.float64), (7, torch.float16)]


def leaves(n: int, width: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = [(n, width), (rank, width), (rank,), (width, rank), (width,)]
    noise = [
        torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes
    ]
    return [x.to(DEVICE, dtype).requires_grad_() for x in noise]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(n, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    x = leaves(n, 70, 3, dtype)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    want, got = adapter(*truth, impl="reference"), adapter(*x, impl=impl)
    assert got.dtype == dtype
    direction = torch.randn(want.shape, dtype=torch.float64, device=DEVICE)
    wanted = torch.autograd.grad((want * direction).sum(), truth)
    found = torch.autograd.grad((got * direction.to(dtype)).sum(), x)
    for name, g, w in zip(("value", *NAMES), (got, *found), (want, *wanted), strict=True):
        assert (g.double() - w).abs().max() <= BUDGET[dtype] * max(1, w.abs().max()), name


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_the_adapter_of_a_fusion_block(impl):
    module = Adapter(12, 8).to(DEVICE)
    torch.nn.init.normal_(module.up.weight)
    weights = (module.down.weight, module.down.bias, module.up.weight, module.up.bias)
    x = torch.randn(2, 3, 12, device=DEVICE)
    torch.testing.assert_close(adapter(x, *weights, impl=impl), module(x), atol=1e-5, rtol=1e-5)


def test_the_reference_passes_gradcheck():
    assert torch.autograd.gradcheck(lambda *x: adapter(*x, impl="reference"), leaves(3, 5, 2, torch.float64))


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_adapter, leaves(3, 5, 2, torch.float64), test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x = leaves(3, 5, 2, torch.float32)
    for index, name in enumerate(NAMES[1:], start=1):
        wrong = list(x)
        wrong[index] = x[index][..., :-1]
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            adapter(*wrong, impl=impl)


def test_a_bottleneck_too_wide_for_the_kernel_is_refused():
    with pytest.raises(KernelUnavailable, match="rank of at most 64, found 65"):
        adapter(*leaves(1, 4, 65, torch.float32), impl="triton")
