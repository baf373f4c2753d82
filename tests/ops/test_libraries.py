"""Calls of library kernels, with stand-ins of the documented signatures: values and gradients."""

import importlib
import inspect
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from discovla.ops import attention, dispatch, mlp, short_attention
from discovla.ops.dispatch import KernelUnavailable, choose
from discovla.ops.short_attention import Packing
from discovla.ops.tower_cases import sequence_case


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Let the stand-ins run on a CPU."""
    monkeypatch.setattr(dispatch, "_library_unavailable", lambda *given: "")


def stand_in(monkeypatch, name: str, **functions) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def attend(q, k, v, offsets, causal):
    """Attention of packed rows r h c, sequence by sequence."""
    parts = []
    for first, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        q1, k1, v1 = (x[first:end].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(q1, k1, v1, is_causal=causal).transpose(0, 1))
    return torch.cat(parts)


def assert_same_step(call, impl, *leaves):
    results = []
    for chosen in (impl, "reference"):
        out = call(chosen)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("library", ["varlen", "flash_attn"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_of_a_library(library, causal, monkeypatch):
    def varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
        assert max_q == max_k == 4 and torch.equal(cu_seq_q, cu_seq_k)
        assert window_size == ((-1, 0) if causal else (-1, -1))
        return attend(q, k, v, cu_seq_q, causal)

    def flash(qkv, cu_seqlens, max_seqlen, *, causal):
        assert max_seqlen == 4
        return attend(*qkv.unbind(1), cu_seqlens, causal)

    stand_in(monkeypatch, "torch.nn.attention.varlen", varlen_attn=varlen)
    stand_in(monkeypatch, "flash_attn", flash_attn_varlen_qkvpacked_func=flash)
    offsets = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    packing = Packing(offsets=offsets, max_length=4, num_rows=8)
    qkv = torch.randn(8, 3 * 6, requires_grad=True)

    def call(impl):
        return short_attention.short_attention(qkv, 2, packing=packing, causal=causal, impl=impl)

    assert_same_step(call, library, qkv)


def test_dense_attention_of_flash_attn(monkeypatch):
    def flash(qkv, *, causal):
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    stand_in(monkeypatch, "flash_attn", flash_attn_qkvpacked_func=flash)
    qkv = torch.randn(3, 5, 3 * 6, requires_grad=True)
    assert_same_step(lambda impl: short_attention.short_attention(qkv, 2, impl=impl), "flash_attn", qkv)


def test_the_calls_fit_the_functions_that_are_installed():
    x = torch.empty(8, 2, 6)
    offsets = torch.tensor([0, 8])
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    inspect.signature(varlen).bind(x, x, x, offsets, offsets, 8, 8, window_size=(-1, 0))
    try:
        quack = importlib.import_module("quack.gemm_interface")
    except ImportError as error:
        pytest.skip(f"quack-kernels: {error}")
    activations = importlib.import_module("quack.activation")
    for name in mlp.QUACK_NAMES.values():
        assert name in activations.act_fn_map and name in activations.dact_fn_map
    options = {"bias": x, "activation": "quick_gelu", "store_preact": True, **mlp.UNTUNED}
    inspect.signature(quack.gemm_act).bind(x, x, **options)
    inspect.signature(quack.gemm_dact).bind(x, x, x, activation="quick_gelu", **mlp.UNTUNED)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", ["short_attention", "temporal_fusion", "readout_attention"])
def test_back_ends_of_torch_serve_the_attention_of_blocks(op, packed, monkeypatch):
    """Each is asked for by its own name; here the one with scores in memory computes."""
    asked = []
    monkeypatch.setattr(
        attention, "sdpa_kernel", lambda backend: (asked.append(backend), sdpa_kernel(SDPBackend.MATH))[1]
    )
    case = sequence_case(op, 4, 3, 16, 2, packed=packed, dtype=torch.float32)
    leaves = case.leaves("cpu")
    want = case.run(leaves, "reference")
    for impl in ("math", "efficient", *(["flash", "cudnn"] if op != "readout_attention" else [])):
        asked.clear()
        for got, expected in zip(case.run(leaves, impl), want, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        assert set(asked) == {dispatch.SDPA[impl]}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_products_of_quack_apply_the_activation_and_its_derivative(activation, monkeypatch):
    act = F.gelu if activation == "gelu" else lambda h: h * torch.sigmoid(1.702 * h)
    name = {"gelu": "gelu_erf"}.get(activation, activation)

    def gemm_act(a, b, *, bias, activation, store_preact, tuned):
        assert activation == name and b.shape[0] == a.shape[1]
        h = a @ b + bias
        return h if store_preact else None, act(h)

    def gemm_dact(a, b, preact, activation, tuned):
        assert activation == name
        s = torch.sigmoid(1.702 * preact)
        slope = s * (1 + 1.702 * preact * (1 - s))
        if activation == "gelu_erf":
            slope = torch.ops.aten.gelu_backward(torch.ones_like(preact), preact)
        return (a @ b) * slope, act(preact)

    stand_in(monkeypatch, "quack")
    stand_in(monkeypatch, "quack.gemm_interface", gemm_act=gemm_act, gemm_dact=gemm_dact)
    x, *weights = (torch.randn(s, requires_grad=True) for s in ((7, 5), (9, 5), (9,), (5, 9), (5,)))
    given = dict(zip(("up", "up_bias", "down", "down_bias"), weights, strict=True))

    def call(impl):
        return mlp.mlp(x, mlp.MLPWeights(**given), activation=activation, impl=impl)

    assert_same_step(call, "quack", x, *weights)
    with torch.no_grad():
        torch.testing.assert_close(call("quack"), call("reference"))


def test_a_library_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.undo()
    half, mask = torch.zeros(2, 4, 3, 2, 8, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bool)
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    monkeypatch.setattr(dispatch, "_installed", lambda module: module != "quack")
    cases = [
        ("mlp", "quack", "cuda", (half,), "quack is not installed: pip install 'discovla\\[quack\\]'"),
        ("short_attention", "flash_attn", "cpu", (half, None, None), "needs a CUDA device, found cpu"),
        ("short_attention", "flash_attn", "cuda", (half.float(), None, None), "found torch.float32"),
        ("short_attention", "flash_attn", "cuda", (half, mask, None), "it takes no mask"),
        ("short_attention", "varlen", "cuda", (half, None, None), "it takes packed sequences"),
        ("attention", "flash", "cuda", (half, mask), "it takes no mask"),
        ("short_attention", "cudnn", "cuda", (half, None, offsets), "it takes no packed sequences"),
        ("temporal_fusion", "flash", "cuda", (half, None, offsets, None, None), "no packed sequences"),
    ]
    for op, impl, device, operands, reason in cases:
        with pytest.raises(KernelUnavailable, match=reason):
            choose(op, impl, device, operands=operands)
    assert choose("attention", "efficient", "cuda", operands=(half.float(), mask)) == "efficient"
