import importlib

import pytest
import torch
import torch.nn.functional as F

from discovla.ops.attention import attention
from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable

attention_module = importlib.import_module("discovla.ops.attention")

SIZES = [1, 7, 63, 130]


def inputs(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(2, 3, size, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def plain(q, k, v, mask, causal):
    """Attention one query at a time, as a reader would do it by hand."""
    n, h, rows, c = q.shape
    out = torch.zeros(n, h, rows, c, dtype=torch.float64)
    for i in range(rows):
        scores = (q[:, :, i : i + 1] * k).sum(-1) / c**0.5  # n h j
        seen = torch.ones(n, 1, k.shape[2], dtype=torch.bool) if mask is None else mask[:, :, 0, :]
        if causal:
            seen = seen & (torch.arange(k.shape[2]) <= i)
        weights = torch.where(seen, scores, -torch.inf).softmax(-1)
        out[:, :, i] = (weights[..., None] * v).sum(2)
    return out


@pytest.mark.parametrize("impl", IMPLEMENTATIONS["attention"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_values_and_gradients_are_those_of_the_formula(impl, size, masked, causal):
    mask = None
    if masked:
        mask = torch.arange(size) < torch.tensor([[max(1, size // 2)], [size]])
        mask = mask[:, None, None, :]
    q, k, v = inputs(size, torch.float32)
    truth = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = plain(*truth, mask, causal)
    got = attention(q, k, v, mask=mask, causal=causal, impl=impl)
    direction = torch.randn(want.shape, dtype=torch.float64)
    (want * direction).sum().backward()
    (got * direction.float()).sum().backward()
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-5)
    for x, t in zip((q, k, v), truth, strict=True):
        torch.testing.assert_close(x.grad.double(), t.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("masked", "causal"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("chunk", [1, attention_module.CHUNK], ids=["one-by-one", "at-once"])
def test_in_16_bits_gradients_are_as_close_as_those_of_torch(dtype, masked, causal, chunk, monkeypatch):
    monkeypatch.setattr(attention_module, "CHUNK", chunk)
    mask = torch.arange(63) < torch.tensor([[30], [63]])[:, None, None] if masked else None
    leaves = [(2 * x.detach()).to(dtype).requires_grad_() for x in inputs(63, torch.float32)]
    truth = [x.detach().double().requires_grad_() for x in leaves]
    seen = torch.ones(63, 63, dtype=torch.bool)
    seen = (seen.tril() if causal else seen) & (True if mask is None else mask)
    want = F.scaled_dot_product_attention(*truth, attn_mask=seen)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.autograd.grad(want, truth, direction.double())
    fused = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, attn_mask=seen), leaves, direction)
    got = attention(*leaves, mask=mask, causal=causal)
    for name, own, torchs, true in zip(
        "qkv", torch.autograd.grad(got, leaves, direction), fused, expected, strict=True
    ):
        assert own.dtype == dtype
        assert (own.double() - true).norm() <= 1.2 * (torchs.double() - true).norm(), name
        assert (own.double() - true).norm() <= 4e-3 * true.norm(), name


def test_the_reference_passes_gradcheck():
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, causal=True, impl="reference"), inputs(5, torch.float64)
    )


def test_a_missing_kernel_is_refused_with_the_remedy():
    with pytest.raises(KernelUnavailable, match="attention: no implementation 'cuda'; use one of auto"):
        attention(*inputs(3, torch.float32), impl="cuda")
