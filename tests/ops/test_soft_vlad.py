import pytest
import torch

from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.soft_vlad import soft_vlad


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


@pytest.mark.parametrize("impl", IMPLEMENTATIONS["soft_vlad"])
@pytest.mark.parametrize("tokens", [1, 7, 63, 130])
def test_values_and_gradients_are_those_of_the_formula(impl, tokens):
    truth, got = inputs(tokens, torch.float64), inputs(tokens, torch.float64)
    got = tuple(t.detach().float().requires_grad_() if t.is_floating_point() else t for t in got)
    direction = torch.randn(3, 8, dtype=torch.float64)
    want, found = plain(*truth), soft_vlad(*got, impl=impl)
    (want * direction).sum().backward()
    (found * direction.float()).sum().backward()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got, truth, strict=True):
        if theirs.requires_grad:
            limit = 2e-5 * theirs.grad.abs().max().item() + 1e-6
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=limit)


def test_the_reference_passes_gradcheck():
    x, mask, assignment, centres = inputs(5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a, c: soft_vlad(x, mask, a, c, impl="reference"), (x, assignment, centres)
    )


def test_a_kernel_that_is_not_there_is_an_error():
    with pytest.raises(KernelUnavailable, match="soft_vlad: no implementation 'cuda'"):
        soft_vlad(*inputs(3, torch.float32), impl="cuda")
