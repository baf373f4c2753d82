import pytest
import torch
from torch import Tensor

from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.unit_mean import _unit_mean, unit_mean
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["unit_mean"]
# fp16: the mean and its gradient are rounded to 11 bits
BUDGET = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
CASES = [(size, torch.float32) for size in (1, 2, 17)] + [(7, torch.float64), (7, torch.float16)]


def leaves(n: int, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows, and a mask of which the second sample has none."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, rows, width, generator=generator, dtype=torch.float64)
    mask = torch.arange(rows) <= torch.arange(n)[:, None] % rows
    mask[1:2] = False
    return x.to(DEVICE, dtype).requires_grad_(), mask.to(DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(n, dtype, masked, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    x, mask = leaves(n, 5, 9, dtype)
    truth = x.detach().double().requires_grad_()
    weight = mask.double() if masked else torch.ones_like(mask, dtype=torch.float64)
    units = torch.nn.functional.normalize(truth, dim=-1)
    want = torch.einsum("nkd,nk->nd", units, weight / weight.sum(1, keepdim=True).clamp(min=1))
    got = unit_mean(x, mask if masked else None, impl=impl)
    assert got.dtype == dtype
    direction = torch.randn(want.shape, dtype=torch.float64, device=DEVICE)
    (expected,) = torch.autograd.grad((want * direction).sum(), truth)
    (actual,) = torch.autograd.grad((got * direction.to(dtype)).sum(), x)
    for name, g, w in zip(("value", "gradient"), (got, actual), (want, expected), strict=True):
        assert (g.double() - w).abs().max() <= BUDGET[dtype] * max(1, w.abs().max()), name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_of_zeros_gives_nan(impl):
    assert unit_mean(torch.zeros(1, 2, 3, device=DEVICE), impl=impl).isnan().all()


def test_the_reference_passes_gradcheck():
    x, mask = leaves(3, 2, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: unit_mean(x, mask, impl="reference"), x)


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_unit_mean, leaves(3, 2, 4, torch.float64), test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x = torch.ones(2, 3, 4)
    for message, wrong in (
        ("x: expected n k d, found", lambda: unit_mean(x[0], impl=impl)),
        ("mask: expected shape", lambda: unit_mean(x, x[0, :2] > 0, impl=impl)),
        ("mask: expected bool", lambda: unit_mean(x, x[..., 0], impl=impl)),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            wrong()


def test_rows_too_long_for_the_kernel_are_refused():
    with pytest.raises(KernelUnavailable, match="rows of at most 8192 numbers, found 8193"):
        unit_mean(torch.ones(1, 1, 8193), impl="triton")
