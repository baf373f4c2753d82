import pytest
import torch
from torch import Tensor

from discovla.nn.block import LayerNorm
from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.layer_norm import Update, _layer_norm, fold_affine, layer_norm
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["layer_norm"]
SIZES = [1, 7, 63, 130]
# fp16: the sum, y and gradients are rounded to 11 bits
BUDGET = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3}
# the dtypes of the residual stream and of what is added to it
STREAMS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
]
NAMES = ("x", "u", "bias", "added")


def leaves(rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], parts: int) -> list[Tensor]:
    """x, u, bias and added: the first `parts` of them."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (rows, width), (width,), (max(1, rows // 3), width)]
    found = []
    for index, shape in enumerate(shapes[:parts]):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
        found.append(noise.to(DEVICE, dtypes[min(index, 1)]).requires_grad_())
    return found


def update(x: list[Tensor]) -> Update | None:
    """What `leaves` found after x; every third row but the first gets one of `added`, from the last on."""
    if len(x) == 1:
        return None
    if len(x) < 4:
        return Update(u=x[1], bias=x[2] if len(x) == 3 else None)
    slots = torch.full((len(x[0]),), -1, dtype=torch.int32, device=DEVICE)
    places = torch.arange(len(x[0]))[2::3]
    slots[places] = torch.arange(len(x[3])).flip(0)[: len(places)].to(DEVICE, torch.int32)
    return Update(u=x[1], bias=x[2], added=x[3], slots=slots)


def assert_close(got: Tensor, want: Tensor, budget: float, name: str) -> None:
    assert (got.double() - want).abs().max() <= budget * max(1, want.abs().max()), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", STREAMS, ids=str)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("parts", [1, 2, 4], ids=["alone", "sum", "all"])
def test_values_and_gradients_are_those_of_the_formula(rows, parts, dtypes, impl):
    skip_what_no_gpu_kernel_takes(impl, dtypes[0])
    width = 33 if rows > 1 else 70
    x = leaves(rows, width, dtypes, parts)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    directions = [torch.randn(rows, width, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    want, got = layer_norm(truth[0], update(truth), impl="reference"), layer_norm(x[0], update(x), impl=impl)
    assert (got[0].dtype, got[1].dtype) == (dtypes[0], dtypes[1 if parts > 1 else 0])
    budget = max(BUDGET[dtype] for dtype in dtypes)
    for name, g, w in zip(("sum", "y"), got, want, strict=True):
        assert_close(g, w, budget, name)
    wanted = torch.autograd.grad(sum((w * d).sum() for w, d in zip(want, directions, strict=True)), truth)
    found = torch.autograd.grad(
        sum((g * d.to(g.dtype)).sum() for g, d in zip(got, directions, strict=True)), x
    )
    for name, g, w in zip(NAMES, found, wanted, strict=False):
        assert_close(g, w, 2 * budget, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", STREAMS, ids=str)
@pytest.mark.parametrize("parts", [1, 4], ids=["alone", "all"])
def test_a_frozen_gain_and_shift_scale_what_is_normed(parts, dtypes, impl):
    skip_what_no_gpu_kernel_takes(impl, dtypes[0])
    x = leaves(7, 33, dtypes, parts)
    affine = tuple(torch.randn(33, device=DEVICE).to(dtypes[1]) for _ in "gs")
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    total, y = layer_norm(truth[0], update(truth), impl="reference")
    want = total, affine[0].double() * y + affine[1].double()
    got = layer_norm(x[0], update(x), affine=affine, impl=impl)
    budget = max(BUDGET[dtype] for dtype in dtypes)
    for name, g, w in zip(("sum", "y"), got, want, strict=True):
        assert_close(g, w, 2 * budget, name)
    directions = [torch.randn(7, 33, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    wanted = torch.autograd.grad(sum((w * d).sum() for w, d in zip(want, directions, strict=True)), truth)
    found = torch.autograd.grad(
        sum((g * d.to(g.dtype)).sum() for g, d in zip(got, directions, strict=True)), x
    )
    for name, g, w in zip(NAMES, found, wanted, strict=False):
        assert_close(g, w, 4 * budget, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gain_that_trains_or_does_not_fit_is_refused(impl):
    x, one = torch.zeros(3, 4, device=DEVICE), torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"^shift: expected shape \(4,\), found \(3,\)"):
        layer_norm(x, affine=(one, one[:3]), impl=impl)
    with pytest.raises(ValueError, match=r"^gain: expected a frozen one, found one that asks for a gradient"):
        layer_norm(x, affine=(one.clone().requires_grad_(), one), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", [0, 1], ids=["sum", "y"])
def test_one_result_alone_can_be_differentiated(which, impl):
    x = leaves(5, 12, (torch.float32, torch.float32), 2)
    got = torch.autograd.grad(layer_norm(x[0], update(x), impl=impl)[which].square().sum(), x)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    out = layer_norm(truth[0], update(truth), impl="reference")[which]
    for g, w in zip(got, torch.autograd.grad(out.square().sum(), truth), strict=True):
        assert_close(g, w, 1e-5, "gradient")


def test_a_float32_stream_keeps_what_half_precision_would_round_away():
    x = torch.ones(1, 8, device=DEVICE)
    u = torch.full((1, 8), 2.0**-14, dtype=torch.float16, device=DEVICE)
    for impl in IMPLS:
        total, _ = layer_norm(x, Update(u=u), impl=impl)
        assert torch.equal(total, x + 2.0**-14)


def test_a_folded_gain_and_shift_give_the_same_projection():
    norm, linear = LayerNorm(12).double(), torch.nn.Linear(12, 5).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(7, 12, dtype=torch.float64)
    weight, bias = fold_affine(linear.weight, linear.bias, norm.weight, norm.bias)
    got = torch.nn.functional.linear(layer_norm(x)[1], weight, bias)
    torch.testing.assert_close(got, linear(norm(x)), atol=1e-12, rtol=1e-12)


def test_the_reference_passes_gradcheck():
    x = leaves(4, 5, (torch.float64, torch.float64), 4)
    assert torch.autograd.gradcheck(lambda *x: layer_norm(x[0], update(list(x)), impl="reference"), x)


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    x = leaves(4, 5, (torch.float64, torch.float64), 4)
    more = update(x)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    arguments = (*x, more.slots, x[2].detach(), x[2].detach(), 1e-5, torch.float64)
    torch.library.opcheck(_layer_norm, arguments, test_utils=tests)


def test_leading_axes_are_kept():
    x = torch.randn(2, 3, 8, device=DEVICE)
    for impl in IMPLS:
        total, y = layer_norm(x, Update(u=x), impl=impl)
        assert total.shape == y.shape == x.shape
        torch.testing.assert_close(total, 2 * x)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x = torch.zeros(3, 4)
    slots = torch.zeros(2, dtype=torch.int32)
    for name, more in (
        ("u", Update(u=x[:2])),
        ("bias", Update(u=x, bias=x[0, :3])),
        ("added", Update(u=x, added=x[:, :2], slots=slots)),
        ("slots", Update(u=x, added=x, slots=slots)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            layer_norm(x, more, impl=impl)
    with pytest.raises(ValueError, match=r"^added, slots: expected both or neither"):
        layer_norm(x, Update(u=x, added=x), impl=impl)
