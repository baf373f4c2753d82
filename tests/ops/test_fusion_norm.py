import pytest
import torch
from torch import Tensor

from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.fusion_norm import AdapterWeights, _fusion_norm, fusion_norm
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["fusion_norm"]
# fp16: the sum, y, the bottleneck and gradients are rounded to 11 bits
BUDGET = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3}
SINGLE, HALF = torch.float32, torch.float16
# rows, readout rows, dtypes of the stream and of what is added to it
CASES = [(1, 1, SINGLE, SINGLE), (7, 3, SINGLE, SINGLE), (63, 21, SINGLE, SINGLE), (130, 40, SINGLE, SINGLE)]
CASES += [(16, 16, SINGLE, SINGLE), (64, 32, SINGLE, SINGLE)]  # tiles are filled exactly
CASES += [(7, 3, torch.float64, torch.float64), (20, 4, SINGLE, HALF), (7, 2, HALF, HALF)]
NAMES = ("x", "u", "down", "down_bias", "up", "up_bias")
WIDTH, RANK, FIRST = 33, 3, 2


def leaves(rows: int, n: int, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
    """x, u and the adapter's weights, these in float32 at least."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, WIDTH), (rows + n, WIDTH), (RANK, WIDTH), (RANK,), (WIDTH, RANK), (WIDTH,)]
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    weights = torch.promote_types(dtypes[0], SINGLE)
    kinds = [*dtypes, weights, weights, weights, weights]
    return [x.to(DEVICE, kind).requires_grad_() for x, kind in zip(noise, kinds, strict=True)]


def slots(rows: int, n: int) -> Tensor:
    """The last n rows get what the adapter makes, in turned order; the first names what is before FIRST."""
    actual = torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=DEVICE)
    before = (actual == rows - 1).int() - 1  # 0 of the first row, -1 of the others
    return torch.where(actual < n, actual + FIRST, before)


def affine() -> tuple[Tensor, Tensor]:
    return torch.linspace(0.5, 2, WIDTH, device=DEVICE), torch.linspace(-1, 1, WIDTH, device=DEVICE)


def call(x: list[Tensor], places: Tensor, impl) -> tuple[Tensor, Tensor]:
    weights = AdapterWeights(down=x[2], down_bias=x[3], up=x[4], up_bias=x[5])
    return fusion_norm(x[0], x[1], weights, places, first=FIRST, affine=affine(), impl=impl)


def plain(x: list[Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `fusion_norm` in plain torch, step by step."""
    rows = len(x[0])
    h = x[1][rows:] @ x[2].T + x[3]
    added = (h * torch.sigmoid(1.702 * h)) @ x[4].T + x[5]
    total = (
        x[0]
        + x[1][:rows]
        + torch.where(places[:, None] >= FIRST, added[(places - FIRST).clamp(min=0).long()], 0)
    )
    gain, shift = (part.to(total.dtype) for part in affine())
    return total, torch.nn.functional.layer_norm(total, (WIDTH,), gain, shift)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rows", "n", "stream", "dtype"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(rows, n, stream, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, stream)
    x, places = leaves(rows, n, (stream, dtype)), slots(rows, n)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    want, got = plain(truth, places), call(x, places, impl)
    assert (got[0].dtype, got[1].dtype) == (stream, dtype)
    budget = max(BUDGET[stream], BUDGET[dtype])
    directions = [torch.randn(w.shape, dtype=torch.float64, device=DEVICE) for w in want]
    expected = torch.autograd.grad(sum((w * d).sum() for w, d in zip(want, directions, strict=True)), truth)
    actual = torch.autograd.grad(
        sum((g * d.to(g.dtype)).sum() for g, d in zip(got, directions, strict=True)), x
    )
    for name, g, w in zip(("sum", "y", *NAMES), (*got, *actual), (*want, *expected), strict=True):
        assert (g.double() - w).abs().max() <= 2 * budget * max(1, w.abs().max()), name


def test_of_u_the_kernel_keeps_only_the_adapters_input():
    x = leaves(30, 4, (SINGLE, SINGLE))
    own = {leaf.untyped_storage().data_ptr() for leaf in x}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(x, slots(30, 4), "triton")
    more = [t for t in kept if t.untyped_storage().data_ptr() not in own and t.dtype == SINGLE]
    assert sorted(tuple(t.shape) for t in more) == [(2, 30), (4, WIDTH), (30, WIDTH), (WIDTH,)], "and a gain"


def test_the_reference_passes_gradcheck():
    places = slots(3, 2)
    given = leaves(3, 2, (torch.float64, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: call(list(x), places, "reference"), given)


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    x = leaves(4, 2, (torch.float64, torch.float64))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (*x, slots(4, 2), None, None, FIRST, 1e-5, torch.float64)
    torch.library.opcheck(_fusion_norm, arguments, test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x, places = leaves(4, 2, (SINGLE, SINGLE)), slots(4, 2)
    for message, wrong in (
        ("u: expected at least 4 rows 33 wide", lambda: call([x[0], x[1][:3], *x[2:]], places, impl)),
        ("readout_index: expected shape", lambda: call(x, places[:3], impl)),
        ("down: expected shape", lambda: call([*x[:2], x[2][:, 1:], *x[3:]], places, impl)),
        ("up_bias: expected shape", lambda: call([*x[:5], x[5][1:]], places, impl)),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            wrong()


def test_a_bottleneck_too_wide_for_the_kernel_is_refused():
    x = torch.zeros(2, 4, device=DEVICE)
    weights = AdapterWeights(
        down=torch.zeros(65, 4, device=DEVICE),
        down_bias=torch.zeros(65, device=DEVICE),
        up=torch.zeros(4, 65, device=DEVICE),
        up_bias=torch.zeros(4, device=DEVICE),
    )
    with pytest.raises(KernelUnavailable, match="rank of at most 64, found 65"):
        fusion_norm(x, x, weights, torch.zeros(2, dtype=torch.int32, device=DEVICE), impl="triton")
