import pytest
import torch

from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.soft_vlad import _soft_vlad, soft_vlad
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["soft_vlad"]
STREAMED = [impl for impl in IMPLS if impl != "reference"]


def inputs(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, 8, generator=generator, dtype=dtype)
    centres = torch.randn(2, 4, 8, generator=generator, dtype=dtype)
    mask = torch.arange(tokens) < torch.tensor([[1], [max(1, tokens // 2)], [tokens]])
    return x.requires_grad_(), mask, centres[0].requires_grad_(), centres[1].requires_grad_()


def plain(x, mask, assignment, centres):
    """The formula, residual by residual."""
    rows = []
    for n in range(len(x)):
        total = torch.zeros(centres.shape, dtype=x.dtype)
        for token in x[n][mask[n]]:
            share = torch.softmax(assignment @ token, 0)
            total = total + share[:, None] * (token - centres)
        mean = (total / total.norm(dim=1, keepdim=True)).mean(0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


CASES = [(torch.float64, n) for n in (1, 7, 63, 130)]
CASES += [(torch.float32, 7), (torch.float32, 130), (torch.float16, 63)]
CASES += [(torch.float32, n) for n in (16, 32, 64, 128)]  # tiles are filled exactly
# of parts in a million: rounding of residuals, which cancel where a centre gets little
BUDGET = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-5}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "tokens"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(impl, dtype, tokens):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    given = [x.detach() for x in inputs(tokens, torch.float64)]
    given[0] = given[0].to(dtype).double()
    truth = [x.clone().requires_grad_(x.is_floating_point()) for x in given]
    work = torch.promote_types(dtype, torch.float32)
    dtypes = (dtype, torch.bool, work, work)
    got = [
        x.to(DEVICE, kind).requires_grad_(kind != torch.bool) for x, kind in zip(given, dtypes, strict=True)
    ]
    want, actual = plain(*truth), soft_vlad(*got, impl=impl)
    direction = torch.randn(3, 8, dtype=torch.float64)
    (want * direction).sum().backward()
    (actual * direction.to(actual)).sum().backward()
    assert (actual.cpu().double() - want).abs().max() <= BUDGET[dtype]
    for ours, theirs in zip(got, truth, strict=True):
        if theirs.grad is not None:
            assert ours.grad.dtype == ours.dtype
            # what comes back in fp16 is rounded to it
            budget = 1e-3 if ours.dtype == torch.float16 else 10 * BUDGET[dtype]
            error = (ours.grad.cpu().double() - theirs.grad).abs().max()
            assert error <= budget * theirs.grad.abs().max().clamp(min=0.1)


@pytest.mark.parametrize("impl", STREAMED)
def test_a_masked_token_has_no_part_and_no_gradient(impl):
    x, mask, assignment, centres = (y.detach().to(DEVICE) for y in inputs(7, torch.float32))
    other = torch.where(mask[..., None], x, 5.0).requires_grad_()
    got = soft_vlad(other, mask, assignment, centres, impl=impl)
    torch.testing.assert_close(got, soft_vlad(x, mask, assignment, centres, impl=impl))
    got.sum().backward()
    assert not other.grad[~mask].any() and other.grad[mask].any()


@pytest.mark.parametrize("impl", STREAMED)
def test_samples_in_blocks_give_the_result_of_all_at_once(impl, monkeypatch):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    x = [y.detach().to(DEVICE).requires_grad_(y.is_floating_point()) for y in inputs(5, torch.float64)]
    whole = soft_vlad(*x, impl=impl)
    expected = torch.autograd.grad(whole.square()[:, 0].sum(), (x[0], *x[2:]))
    monkeypatch.setattr("discovla.ops.streamed.soft_vlad.ELEMENTS", 2 * (5 + 16) * 8)
    monkeypatch.setattr("discovla_kernels.soft_vlad.BLOCK_ELEMENTS", 2 * 5 * 8)  # two samples, then one
    cut = soft_vlad(*x, impl=impl)
    actual = torch.autograd.grad(cut.square()[:, 0].sum(), (x[0], *x[2:]))
    torch.testing.assert_close([cut, *actual], [whole, *expected], atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("impl", STREAMED)
def test_the_op_is_registered_soundly(impl):
    skip_what_no_gpu_kernel_takes(impl, torch.float64)
    rows = [x.detach().to(DEVICE).requires_grad_(x.is_floating_point()) for x in inputs(5, torch.float64)]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_soft_vlad, (*rows, impl), test_utils=tests)


def test_more_centres_than_the_kernel_holds_are_refused_by_name():
    x, mask, table = torch.ones(1, 300, 4), torch.ones(1, 300, dtype=torch.bool), torch.ones(20, 4)
    with pytest.raises(KernelUnavailable, match=r"at most 8192 tokens x centres.*found 512 x 32"):
        soft_vlad(x, mask, table, table, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_that_do_not_fit_are_refused_by_name(impl):
    x, mask, assignment, centres = inputs(3, torch.float32)
    for name, call in {
        "mask": (x, mask[:, :2], assignment, centres),
        "assignment": (x, mask, assignment[:, :5], centres),
        "centres": (x, mask, assignment, centres[:2]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            soft_vlad(*call, impl=impl)


def test_the_reference_passes_gradcheck():
    x, mask, assignment, centres = inputs(5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a, c: soft_vlad(x, mask, a, c, impl="reference"), (x, assignment, centres)
    )


def test_a_missing_kernel_is_refused():
    with pytest.raises(KernelUnavailable, match="soft_vlad: no implementation 'cuda'"):
        soft_vlad(*inputs(3, torch.float32), impl="cuda")
