import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.nn.block import LayerNorm
from discovla.nn.lora import LoRA
from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.lora_norm import (
    LoRAWeights,
    _lora_norm,
    lora_norm,
    lora_projection,
    lora_weights,
)
from discovla_kernels import lora_norm as lora_norm_kernels
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["lora_norm"]
# fp16: the sum, y, H and gradients are rounded to 11 bits
BUDGET = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3}
SINGLE, HALF = torch.float32, torch.float16
CASES = [
    (rows, SINGLE, SINGLE) for rows in (1, 7, 63, 130)
]  # rows, dtypes of the stream and of what is added
CASES += [(16, SINGLE, SINGLE), (64, SINGLE, SINGLE)]  # tiles are filled exactly
CASES += [(7, torch.float64, torch.float64), (20, SINGLE, HALF), (7, HALF, HALF)]


def leaves(
    rows: int, dtypes: tuple[torch.dtype, torch.dtype], *, width: int = 33, rank: int = 3
) -> list[Tensor]:
    """x, a and u."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, width), (rank, width), (rows, width))
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    noise[1] /= width**0.5
    return [x.to(DEVICE, dtypes[i > 0]).requires_grad_() for i, x in enumerate(noise)]


def assert_close(got: Tensor, want: Tensor, budget: float, name: str) -> None:
    assert (got.double() - want).abs().max() <= budget * max(1, want.abs().max()), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rows", "stream", "dtype"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(rows, stream, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, stream)
    x = leaves(rows, (stream, dtype))
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    directions = [torch.randn(rows, n, dtype=torch.float64, device=DEVICE) for n in (33, 33 + 16)]
    want, got = lora_norm(*truth, impl="reference"), lora_norm(*x, impl=impl)
    assert (got[0].dtype, got[1].dtype) == (stream, dtype)
    budget = max(BUDGET[stream], BUDGET[dtype])
    assert torch.equal(got[2], got[1][:, 33:36]) and not got[2].requires_grad
    want, got = want[:2], got[:2]
    for name, g, w in zip(("sum", "z"), got, want, strict=True):
        assert_close(g, w, budget, name)
    expected = torch.autograd.grad(sum((w * d).sum() for w, d in zip(want, directions, strict=True)), truth)
    actual = torch.autograd.grad(
        sum((g * d.to(g.dtype)).sum() for g, d in zip(got, directions, strict=True)), x
    )
    for name, g, w in zip(("x", "a", "u"), actual, expected, strict=True):
        assert_close(g, w, 2 * budget, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_update_is_optional(impl):
    x, a, _ = leaves(7, (SINGLE, SINGLE))
    total, z, _ = lora_norm(x, a, impl=impl)
    assert total is x
    want = lora_norm(x.double(), a.double(), impl="reference")[1]
    assert_close(z, want, BUDGET[SINGLE], "z")
    for g, w in zip(
        torch.autograd.grad(z.sin().sum(), (x, a)), torch.autograd.grad(want.sin().sum(), (x, a)), strict=True
    ):
        assert_close(g, w.double(), 2 * BUDGET[SINGLE], "gradient")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("columns", [64, 16], ids=["one chunk", "three chunks"])
def test_many_rows_are_shared_among_programs(impl, columns, monkeypatch):
    monkeypatch.setattr("discovla_kernels.lora_norm.PROGRAMS", 2)
    for tile in (lora_norm_kernels.FORWARD, lora_norm_kernels.BACKWARD):
        monkeypatch.setitem(tile, "BLOCK_W", columns)
    x = leaves(70, (SINGLE, SINGLE))
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    actual = torch.autograd.grad(lora_norm(*x, impl=impl)[1].sin().sum(), x)
    expected = torch.autograd.grad(lora_norm(*truth, impl="reference")[1].sin().sum(), truth)
    for g, w in zip(actual, expected, strict=True):
        assert_close(g, w, 2 * BUDGET[SINGLE], "gradient")


def of_one(weight: Tensor, bias: Tensor, lora: LoRA) -> LoRAWeights:
    """The weights of one projection."""
    given = [(weight, bias)], [(lora.a, lora.b)]
    return lora_weights(*given, x=weight, dtype=weight.dtype, impl="reference")[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_assembled_together_have_the_gradients_of_each(impl, monkeypatch):
    monkeypatch.setattr("discovla_kernels.lora_norm.PROGRAMS", 3)
    linears = [(torch.randn(6, 5, device=DEVICE), torch.randn(6, device=DEVICE)) for _ in range(2)]
    loras = [LoRA(5, 6, 3).to(DEVICE) for _ in range(2)]
    x = torch.randn(70, 5, device=DEVICE)
    for lora in loras:
        torch.nn.init.normal_(lora.b)
    factors = [(lora.a, lora.b) for lora in loras]
    trained = [factor for pair in factors for factor in pair]
    y = F.layer_norm(x, (5,))
    first, second = (F.linear(y, w, bias) + lora(y) for (w, bias), lora in zip(linears, loras, strict=True))
    want = [first, second]
    every = lora_weights(linears, factors, x=x, dtype=torch.float32, impl=impl)
    one, other = (lora_norm(x, weights.a, impl=impl)[1:] for weights in every)
    got = [lora_projection(*one, every[0]), lora_projection(*other, every[1])]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    actual, expected = (torch.autograd.grad(sum(o.sin().sum() for o in out), trained) for out in (got, want))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("folded", [False, True], ids=["given", "folded"])
@pytest.mark.parametrize("impl", IMPLS)
def test_with_its_projection_it_is_norm_and_projection_and_lora(impl, folded):
    norm, linear, lora = (
        LayerNorm(12).to(DEVICE),
        torch.nn.Linear(12, 9).to(DEVICE),
        LoRA(12, 9, 3).to(DEVICE),
    )
    for parameter in (norm.weight, norm.bias, lora.b):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 12, device=DEVICE, requires_grad=True)
    trained = (x, lora.a, lora.b)
    y = norm(x)
    want = linear(y) + lora(y)
    gain, shift = norm.weight.detach(), norm.bias.detach()
    if folded:
        weight, bias = linear.weight.detach() * gain, (linear.bias + linear.weight @ shift).detach()
        _, z, low = lora_norm(x, lora.a * gain, impl=impl)
        got = lora_projection(z, low, of_one(weight, bias, lora)) + lora.b @ (lora.a @ shift)
    else:
        _, z, low = lora_norm(x, lora.a, affine=(gain, shift), impl=impl)
        got = lora_projection(z, low, of_one(linear.weight.detach(), linear.bias.detach(), lora))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    expected, actual = (torch.autograd.grad(out.sin().sum(), trained) for out in (want, got))
    for g, w in zip(actual, expected, strict=True):
        torch.testing.assert_close(g, w, atol=5e-5, rtol=1e-4)


def test_the_reference_and_the_projection_pass_gradcheck():
    x, a, u = leaves(3, (torch.float64, torch.float64), width=5, rank=2)
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    b = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, a: Tensor, u: Tensor, b: Tensor) -> Tensor:
        weights = lora_weights([(weight, bias)], [(a, b)], x=x, dtype=x.dtype, impl="reference")[0]
        return lora_projection(*lora_norm(x, weights.a, u, impl="reference")[1:], weights)

    assert torch.autograd.gradcheck(call, [x.cpu(), a.cpu(), u.cpu(), b])


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    gain, shift = torch.randn(2, 33, dtype=torch.float64, device=DEVICE)
    x, a, u = leaves(4, (torch.float64, torch.float64))
    a = a.detach()[None].clone().requires_grad_()
    arguments = (x, a, u, gain, shift, 1e-5, torch.float64)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_lora_norm, arguments, test_utils=tests)


def test_shapes_that_do_not_fit_are_refused_by_name():
    x, a, u = leaves(3, (SINGLE, SINGLE))
    weight, bias, b = torch.zeros(4, 33), torch.zeros(4), torch.zeros(4, 3)

    def weights(bias=bias, b=b):
        return lora_weights([(weight, bias)], [(a, b)], x=x, dtype=SINGLE)[0]

    z, low = torch.zeros(3, 49), torch.zeros(3, 3)
    for name, call in (
        ("u", lambda: lora_norm(x, a, u[:2])),
        ("a", lambda: lora_norm(x, a[:, :3])),
        ("z", lambda: lora_projection(z[:, :-1], low, weights())),
        ("low", lambda: lora_projection(z, low[:, :2], weights())),
        ("bias", lambda: weights(bias[:2])),
        ("b", lambda: weights(b=b[:2])),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            call()
    with pytest.raises(ValueError, match=r"^weight, bias: expected frozen tensors"):
        weight.requires_grad_()
        weights()
    with pytest.raises(KernelUnavailable, match="rank and width of at most 16 and 1024"):
        lora_norm(x, torch.zeros(65, 33, device=DEVICE), impl="triton")
