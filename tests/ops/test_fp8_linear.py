import pytest
import torch

from discovla.ops.dispatch import KernelUnavailable
from discovla.ops.fp8_linear import FP8, fp8_linear, fp8_unsupported, quantise_rows, quantise_weight
from discovla.testing import relative_error
from tests.ops.kernels import DEVICE

HALF_ULP, SMALLEST = 2.0**-4, 2.0**-9  # of e4m3: relative rounding error, and the least number


def made(t: int = 7, o: int = 48, i: int = 32, dtype: torch.dtype = torch.float32):
    """Rows and a weight whose rows are of very different sizes, and a bias."""
    x = torch.randn(t, i, dtype=dtype) * torch.logspace(-4, 4, t, dtype=dtype)[:, None]
    return x, torch.randn(o, i, dtype=dtype) * torch.logspace(-3, 3, o, dtype=dtype)[:, None], torch.randn(o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_weight_is_rounded_once_by_output_and_is_exact_in_bfloat16(dtype):
    _, weight, _ = made(dtype=dtype)
    actual = quantise_weight(weight)
    assert actual.bits.dtype == torch.uint8 and actual.plain.dtype == dtype
    plain = actual.bits.view(FP8).double() * actual.scale.double()[:, None]
    assert torch.equal(actual.plain.double(), plain)
    assert torch.equal(actual.plain.to(torch.bfloat16).double(), plain)
    error = (plain - weight.double()).abs()
    assert (error <= HALF_ULP * weight.double().abs() + actual.scale[:, None] * SMALLEST / 2).all()
    filled = actual.bits.view(FP8).float().abs().amax(1)
    assert (filled >= 208).all() and (filled <= 448).all(), "the range of FP8 is used"
    again = quantise_weight(actual.plain)
    assert torch.equal(again.plain, actual.plain), "what is rounded stays"


def test_rows_of_all_sizes_are_rounded_alike_and_zeros_stay():
    x, _, _ = made()
    x[3] = 0
    q, scale = quantise_rows(x)
    assert ((q.float() * scale - x).abs() <= HALF_ULP * x.abs() + scale * SMALLEST).all()
    assert torch.equal(q[3].float(), torch.zeros(32)) and (q.float().abs().amax(1)[[0, 6]] == 448).all()
    assert quantise_rows(torch.tensor([[float("nan"), 1.0]]))[0].float().isnan().any(), "a NaN is not hidden"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("t", "i"), [(1, 1), (7, 63), (130, 16), (3, 4097)])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_kernel_rounds_as_the_reference_to_the_bit(t, i, dtype, scaled):
    x = torch.randn(t, i) * torch.logspace(-4, 4, t)[:, None]
    x[t // 2, : i // 2] = 0
    x = x.to(DEVICE, dtype)
    columns = torch.logspace(-3, 3, i, device=DEVICE) if scaled else None
    want, got = (quantise_rows(x, columns, impl=impl) for impl in ("reference", "triton"))
    assert got[0].dtype == FP8 and torch.equal(got[1], want[1])
    assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))


def test_the_kernel_makes_every_number_of_e4m3_and_rounds_ties_to_even():
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    between = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, between, between.nextafter(codes[1:]), between.nextafter(codes[:-1])])
    x = torch.cat([x, -x])[None].to(DEVICE)  # the largest is 448: the scale is 1
    want, got = (quantise_rows(x, impl=impl)[0].view(torch.uint8) for impl in ("reference", "triton"))
    assert torch.equal(got, want) and torch.equal(want[0, :127].cpu().view(FP8).float(), codes)


def test_the_kernel_keeps_rows_of_zeros_and_hides_no_nan():
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]], device=DEVICE)
    q, scale = quantise_rows(x, impl="triton")
    assert q[0].float().tolist() == [0, 0] and scale[0] == 1
    assert q[1:, 0].float().isnan().all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_too_small_for_a_scale_count_as_zeros(impl):
    x = torch.tensor([[1e-37, 0.0], [1e-35, 0.0]], device=DEVICE)
    q, scale = quantise_rows(x, impl=impl)
    assert q.float().tolist() == [[0, 0], [448, 0]] and scale[0] == 1
    assert (q.float() * scale)[1, 0].item() == pytest.approx(1e-35)


@pytest.mark.parametrize("backward", [False, True])
def test_the_kernel_gives_the_results_and_gradients_of_the_reference(backward):
    x, weight, bias = (part.to(DEVICE) for part in made(t=33))
    rounded, actual = quantise_weight(weight, backward=backward), {}
    for impl in ("reference", "triton"):
        leaf = x.to(torch.float32 if DEVICE == "cpu" else torch.bfloat16, copy=True).requires_grad_()
        out = fp8_linear(leaf[:, None], rounded, bias, impl=impl)
        out.backward(out.detach().flip(0))
        actual[impl] = out.detach(), leaf.grad
    for got, want in zip(actual["triton"], actual["reference"], strict=True):
        assert relative_error(got, want) <= (0 if DEVICE == "cpu" else 2**-8)


def test_unsupported_rows_are_refused_by_the_kernel():
    with pytest.raises(KernelUnavailable, match="quantise_rows: impl='triton': float64 has no kernel"):
        quantise_rows(torch.ones(1, 2, dtype=torch.float64), impl="triton")
    with pytest.raises(KernelUnavailable, match="expected rows of at most 16384 numbers, found 16385"):
        quantise_rows(torch.ones(1, 16385), impl="triton")


def test_the_product_is_that_of_the_rounded_numbers_and_near_the_true_one():
    x, weight, bias = made(t=64, i=256)
    rounded = quantise_weight(weight)
    q, scale = quantise_rows(x)
    want = (q.double() * scale.double()) @ rounded.plain.double().T + bias.double()
    got = fp8_linear(x, rounded, bias, impl="reference")
    bound = x.abs().double() @ weight.abs().double().T
    assert ((got - want).abs() <= 1e-6 * bound + 1e-6).all()
    assert ((got - (x @ weight.T + bias)).abs() <= 0.14 * bound + 1e-6).all()
    assert 0.01 < relative_error(got - bias, (x.double() @ weight.double().T)) < 0.06


def test_gradients_are_those_of_the_rounded_weight_only():
    x, weight, bias = made(dtype=torch.float64)
    x.requires_grad_()
    rounded = quantise_weight(weight)
    grad = torch.randn(7, 48, dtype=torch.float64)
    fp8_linear(x, rounded, bias).backward(grad)
    assert torch.equal(x.grad, grad @ rounded.plain)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linear(x, rounded, bias)
    assert [t.shape for t in kept] == [rounded.plain.shape], "nothing of the rows is kept"


def test_gradients_in_fp8_are_those_of_rounded_ones_and_near_the_true_ones():
    """A row's error is that of its largest parts, weighed by what they are multiplied by."""
    x, weight, bias = made(t=64, o=256)
    rounded = quantise_weight(weight, backward=True)
    assert rounded.transposed is not None and rounded.transposed.is_contiguous()
    assert torch.equal(rounded.transposed.T, rounded.bits)
    grad = torch.randn(64, 256) * torch.logspace(-6, 6, 64)[:, None] / rounded.scale
    grad[5] = 0
    x.requires_grad_()
    fp8_linear(x, rounded, bias).backward(grad)
    q, scale = quantise_rows(grad, rounded.scale)
    q_w = rounded.bits.view(FP8).double()
    want, truth = (q.double() * scale) @ q_w, grad.double() @ rounded.plain.double()
    bound = grad.abs().double() @ rounded.plain.abs().double()
    assert x.grad is not None and (x.grad[5] == 0).all()
    assert ((x.grad - want).abs() <= 1e-6 * bound).all()
    assert ((x.grad - truth).abs() <= 0.07 * bound).all()
    rows = torch.arange(64) != 5
    assert 0.01 < relative_error(x.grad[rows] / scale[rows], truth[rows] / scale[rows]) < 0.04


def test_e4m3_loses_half_as_much_of_a_gradient_as_e5m2():
    """The numbers of a row are several powers of ten apart, as in the gradients of a model."""
    _, weight, _ = made(o=256)
    rounded = quantise_weight(weight)
    grad = torch.randn(64, 256) * torch.exp(2 * torch.randn(64, 256)) / rounded.scale
    truth = grad.double() @ rounded.plain.double()
    errors = {}
    for dtype in (FP8, torch.float8_e5m2):
        wider = grad * rounded.scale
        scale = wider.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
        q_w = rounded.bits.view(FP8).double()
        actual = ((wider / scale).to(dtype).double() * scale) @ q_w
        errors[dtype] = ((actual - truth).norm() / truth.norm()).item()
    assert errors[FP8] < 0.6 * errors[torch.float8_e5m2] and errors[FP8] < 0.03


def test_backward_in_fp8_keeps_a_byte_a_weight_and_no_rows():
    x, weight, bias = made()
    rounded, kept = quantise_weight(weight, backward=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linear(x.requires_grad_(), rounded, bias)
    assert [(t.shape, t.dtype) for t in kept] == [((32, 48), torch.uint8), ((48,), torch.float32)]


@pytest.mark.parametrize("backward", [False, True])
def test_outputs_can_be_left_out(backward):
    x, weight, bias = made()
    rounded = quantise_weight(weight, backward=backward)
    parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    part = fp8_linear(parts[0][:, None], rounded[16:32], bias[16:32])
    whole = fp8_linear(parts[1], rounded, bias)[:, 16:32]
    assert torch.equal(part[:, 0], whole)
    part.sum().backward()
    whole.sum().backward()
    assert parts[0].grad is not None and torch.equal(parts[0].grad, parts[1].grad)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_product_in_fp8_is_the_reference(device):
    if reason := fp8_unsupported(torch.device(device)):
        pytest.skip(reason)
    x, weight, bias = (part.to(device, torch.bfloat16) for part in made(t=33))
    rounded = quantise_weight(weight, backward=True)
    leaves = {impl: x.clone().requires_grad_() for impl in ("reference", "torch")}
    want, got = (fp8_linear(leaf, rounded, bias, impl=impl) for impl, leaf in leaves.items())
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) <= 2**-8
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    assert relative_error(leaves["torch"].grad, leaves["reference"].grad) <= 2**-8
    part = fp8_linear(x.clone().requires_grad_(), rounded[16:48], bias[16:48], impl="torch")
    part.backward(grad[:, 16:48])


def test_a_gpu_without_fp8_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert fp8_unsupported(torch.device("cuda")) == (
        "expected a GPU of compute capability 9.0 (Hopper) or later, found NVIDIA A100 with 8.0"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8_unsupported(torch.device("cuda"), (64, 40)) == (
        "expected widths that are multiples of 16, found a weight of 64 x 40"
    )
    assert (
        fp8_unsupported(torch.device("cuda"), (64, 48))
        == fp8_unsupported(torch.device("cpu"), (64, 40))
        == ""
    )


def test_bad_shapes_and_a_bias_that_trains_are_refused():
    x, weight, bias = made()
    rounded = quantise_weight(weight)
    with pytest.raises(ValueError, match=r"x: expected shape \(7, 32\), found \(7, 31\)"):
        fp8_linear(x[:, :31], rounded, bias)
    with pytest.raises(ValueError, match="bias: expected a frozen tensor"):
        fp8_linear(x, rounded, bias.requires_grad_())
