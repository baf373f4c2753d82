import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.dispatch import IMPLEMENTATIONS
from discovla.ops.lora_norm import lora_norm, lora_weights
from discovla.ops.readout_lora_norm import _readout_lora_norm, readout_lora_norm, readout_lora_projection
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes
from tests.ops.test_lora_norm import BUDGET, HALF, SINGLE, assert_close, leaves

IMPLS = IMPLEMENTATIONS["readout_lora_norm"]
# rows, how many are read, dtypes of the stream and of what is added to it
CASES = [(1, 1, SINGLE, SINGLE), (7, 3, SINGLE, SINGLE), (63, 9, SINGLE, SINGLE), (130, 40, SINGLE, SINGLE)]
CASES += [(7, 2, torch.float64, torch.float64), (20, 4, SINGLE, HALF), (7, 7, HALF, HALF)]


def places(rows: int, n: int) -> tuple[Tensor, Tensor]:
    """Every so-manieth row from the last on, and which of them each row is."""
    ends = torch.arange(rows - 1, -1, -(rows // n), device=DEVICE)[:n]
    slots = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    slots[ends] = torch.arange(n, dtype=torch.int32, device=DEVICE)
    return ends, slots


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rows", "n", "stream", "dtype"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_rows_of_lora_norm(rows, n, stream, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, stream)
    x, where = leaves(rows, (stream, dtype)), places(rows, n)
    truth = [leaf.detach().double().requires_grad_() for leaf in x]
    total, z, _ = lora_norm(*truth, impl="reference")
    want = total[where[0]], z, z[where[0]]
    read, found_z, low, z_read = readout_lora_norm(*x, *where, impl=impl)
    assert torch.equal(low, found_z[:, 33:36]) and not low.requires_grad
    got, budget = (read, found_z, z_read), max(BUDGET[stream], BUDGET[dtype])
    directions = [torch.randn(w.shape, dtype=torch.float64, device=DEVICE) for w in want]
    expected = torch.autograd.grad(sum((w * d).sum() for w, d in zip(want, directions, strict=True)), truth)
    actual = torch.autograd.grad(
        sum((g * d.to(g.dtype)).sum() for g, d in zip(got, directions, strict=True)), x
    )
    names = ("read", "z", "z of the rows read", "x", "a", "u")
    for name, g, w in zip(names, (*got, *actual), (*want, *expected), strict=True):
        assert_close(g, w, 2 * budget, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_update_is_optional_and_each_output_can_be_used_alone(impl):
    x, a, _ = leaves(7, (SINGLE, SINGLE))
    where = places(7, 2)
    for which in range(3):
        total, z, _ = lora_norm(x, a, impl="reference")
        want = (total[where[0]], z, z[where[0]])[which]
        read, found_z, _, z_read = readout_lora_norm(x, a, None, *where, impl=impl)
        got = (read, found_z, z_read)[which]
        assert_close(got, want, BUDGET[SINGLE], "value")
        (expected,) = torch.autograd.grad(want.sin().sum(), x)
        (actual,) = torch.autograd.grad(got.sin().sum(), x)
        assert_close(actual, expected, 2 * BUDGET[SINGLE], "gradient")


@pytest.mark.parametrize("impl", IMPLS)
def test_with_its_projection_it_gives_the_queries_of_readout_rows(impl):
    x, a, u = leaves(20, (SINGLE, SINGLE))
    generator = torch.Generator().manual_seed(0)
    shapes = (99, 33), (99,), (99, 3)
    weight, bias, b = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    b.requires_grad_()
    where = places(20, 5)
    weights = lora_weights([(weight, bias)], [(a, b)], x=x.detach(), dtype=SINGLE, impl=impl)[0]
    _, z, low, z_read = readout_lora_norm(x, weights.a, u, *where, impl=impl)
    got = readout_lora_projection(z, low, z_read, weights)
    y = F.layer_norm(x + u, (33,))
    qkv = F.linear(y, weight, bias) + y @ a.T @ b.T
    want = qkv[where[0], :33], qkv[:, 33:]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)
    actual, expected = (
        torch.autograd.grad(sum(o.sin().sum() for o in out), (x, a, b)) for out in (got, want)
    )
    for g, w in zip(actual, expected, strict=True):
        torch.testing.assert_close(g, w, atol=2e-4, rtol=1e-3)


def test_the_op_is_registered_soundly():
    skip_what_no_gpu_kernel_takes("triton", torch.float64)
    x, a, u = leaves(4, (torch.float64, torch.float64))
    a = a.detach()[None].clone().requires_grad_()
    arguments = (x, a, u, None, None, places(4, 2)[1], 2, 1e-5, torch.float64)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_readout_lora_norm, arguments, test_utils=tests)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x, a, u = leaves(4, (SINGLE, SINGLE))
    ends, slots = places(4, 2)
    for name, call in (
        ("u", lambda: readout_lora_norm(x, a, u[:2], ends, slots, impl=impl)),
        ("a", lambda: readout_lora_norm(x, a[:, :3], u, ends, slots, impl=impl)),
        ("readout_index", lambda: readout_lora_norm(x, a, u, ends, slots[1:], impl=impl)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            call()
