import pytest
import torch
from torch import Tensor

from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.layer_norm import _layer_norm, layer_norm
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["layer_norm"]
SIZES = [1, 7, 16, 63, 64, 130]
# fp16: the sum, y and gradients are rounded to 11 bits
BUDGET = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3}
# the dtypes of the residual stream and of what is added to it
STREAMS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
]
NAMES = ("x", "u")


def leaves(rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], parts: int) -> list[Tensor]:
    """x, or x and u, as `parts` says."""
    generator = torch.Generator().manual_seed(rows)
    noise = [torch.randn(rows, width, generator=generator, dtype=torch.float64) + 0.5 for _ in range(parts)]
    return [x.to(DEVICE, dtype).requires_grad_() for x, dtype in zip(noise, dtypes, strict=False)]


def assert_close(got: Tensor, want: Tensor, budget: float, name: str) -> None:
    assert (got.double() - want).abs().max() <= budget * max(1, want.abs().max()), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", STREAMS, ids=str)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("parts", [1, 2], ids=["alone", "sum"])
def test_values_and_gradients_are_those_of_the_formula(rows, parts, dtypes, impl):
    skip_what_no_gpu_kernel_takes(impl, dtypes[0])
    width = 33 if rows > 1 else 70
    x = leaves(rows, width, dtypes, parts)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    directions = [torch.randn(rows, width, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    want, got = layer_norm(*truth, impl="reference"), layer_norm(*x, impl=impl)
    assert (got[0].dtype, got[1].dtype) == (dtypes[0], dtypes[1 if parts > 1 else 0])
    budget = max(BUDGET[dtype] for dtype in dtypes)
    for name, g, w in zip(("sum", "y"), got, want, strict=True):
        assert_close(g, w, budget, name)
    expected = torch.autograd.grad(sum((w * d).sum() for w, d in zip(want, directions, strict=True)), truth)
    actual = torch.autograd.grad(
        sum((g * d.to(g.dtype)).sum() for g, d in zip(got, directions, strict=True)), x
    )
    for name, g, w in zip(NAMES, actual, expected, strict=False):
        assert_close(g, w, 2 * budget, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", STREAMS, ids=str)
@pytest.mark.parametrize("parts", [1, 2], ids=["alone", "sum"])
def test_a_frozen_gain_and_shift_scale_the_normalised_rows(parts, dtypes, impl):
    skip_what_no_gpu_kernel_takes(impl, dtypes[0])
    x = leaves(7, 33, dtypes, parts)
    affine = tuple(torch.randn(33, device=DEVICE).to(dtypes[1]) for _ in "gs")
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    total, y = layer_norm(*truth, impl="reference")
    want = total, affine[0].double() * y + affine[1].double()
    got = layer_norm(*x, affine=affine, impl=impl)
    budget = max(BUDGET[dtype] for dtype in dtypes)
    for name, g, w in zip(("sum", "y"), got, want, strict=True):
        assert_close(g, w, 2 * budget, name)
    directions = [torch.randn(7, 33, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    expected = torch.autograd.grad(sum((w * d).sum() for w, d in zip(want, directions, strict=True)), truth)
    actual = torch.autograd.grad(
        sum((g * d.to(g.dtype)).sum() for g, d in zip(got, directions, strict=True)), x
    )
    for name, g, w in zip(NAMES, actual, expected, strict=False):
        assert_close(g, w, 4 * budget, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gain_that_trains_or_does_not_fit_is_refused(impl):
    x, one = torch.zeros(3, 4, device=DEVICE), torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"^shift: expected shape \(4,\), found \(3,\)"):
        layer_norm(x, affine=(one, one[:3]), impl=impl)
    with pytest.raises(ValueError, match=r"^gain: expected a frozen tensor, found one that requires"):
        layer_norm(x, affine=(one.clone().requires_grad_(), one), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", [0, 1], ids=["sum", "y"])
def test_one_result_alone_can_be_differentiated(which, impl):
    x = leaves(5, 12, (torch.float32, torch.float32), 2)
    got = torch.autograd.grad(layer_norm(*x, impl=impl)[which].square().sum(), x)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    out = layer_norm(*truth, impl="reference")[which]
    for g, w in zip(got, torch.autograd.grad(out.square().sum(), truth), strict=True):
        assert_close(g, w, 1e-5, "gradient")


def test_a_float32_stream_keeps_what_half_precision_would_round_away():
    x = torch.ones(1, 8, device=DEVICE)
    u = torch.full((1, 8), 2.0**-14, dtype=torch.float16, device=DEVICE)
    for impl in IMPLS:
        total, _ = layer_norm(x, u, impl=impl)
        assert torch.equal(total, x + 2.0**-14)


def test_the_reference_passes_gradcheck():
    x = leaves(4, 5, (torch.float64, torch.float64), 2)
    assert torch.autograd.gradcheck(lambda *x: layer_norm(*x, impl="reference"), x)


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    x = leaves(4, 5, (torch.float64, torch.float64), 2)
    gain, shift = torch.randn(2, 5, dtype=torch.float64, device=DEVICE)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_layer_norm, (*x, gain, shift, 1e-5, torch.float64), test_utils=tests)


def test_leading_axes_are_kept():
    x = torch.randn(2, 3, 8, device=DEVICE)
    for impl in IMPLS:
        total, y = layer_norm(x, x, impl=impl)
        assert total.shape == y.shape == x.shape
        torch.testing.assert_close(total, 2 * x)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_update_of_another_shape_is_refused(impl):
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"^u: expected shape \(3, 4\), found \(2, 4\)"):
        layer_norm(x, x[:2], impl=impl)
