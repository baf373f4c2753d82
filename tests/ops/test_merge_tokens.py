"""Merging of tokens: golden steps of the released code, ties, masked tokens; all implementations agree."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from discovla.ops.dispatch import IMPLEMENTATIONS, KernelUnavailable
from discovla.ops.merge_tokens import _merge, match_tokens, merge_tokens, source_count
from discovla.testing import relative_error
from tests.ops.kernels import DEVICE, skip_what_no_gpu_kernel_takes

IMPLS = IMPLEMENTATIONS["merge_tokens"]
FILE = Path(__file__).parents[1] / "golden" / "tempme" / "matching"
CASES = [case["name"] for case in json.loads(FILE.with_suffix(".json").read_text())["cases"]]
BUDGET = {torch.float64: 1e-8, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(FILE.with_suffix(".safetensors"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_single_steps_equal_the_golden_ones(tensors, name, dtype, impl):
    skip_what_no_gpu_kernel_takes(impl, dtype)
    case = next(c for c in json.loads(FILE.with_suffix(".json").read_text())["cases"] if c["name"] == name)
    of = {key.partition(".")[2]: x.to(DEVICE) for key, x in tensors.items() if key.startswith(f"{name}.")}
    x = of["x"].to(dtype, copy=True).requires_grad_()
    merged = merge_tokens(
        x, of["size"].to(dtype), of["metric"].to(dtype), case["rho"], fixed=case["cls"], impl=impl
    )
    assert relative_error(merged.rows, of["out"]) <= BUDGET[dtype]
    assert torch.equal(merged.sizes.float(), of["out_size"])
    (merged.rows * of["probe"].to(dtype)).sum().backward()
    assert relative_error(x.grad, of["grad_x"]) <= BUDGET[dtype]
    if case["rho"]:
        first = case["cls"] + case["cls"] % 2
        left = source_count(case["tokens"], case["cls"]) - case["rho"]
        of_sources = merged.target[:, first::2]
        for row, (sources, destinations) in enumerate(zip(of["src"], of["dst"], strict=True)):
            placed = of_sources[row, sources] - case["cls"] - left
            assert torch.equal(placed, destinations)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("length", "fixed"), [(5, 1), (50, 1), (33, 4), (140, 12), (17, 0)])
def test_every_implementation_gives_the_formula(length, fixed, impl):
    torch.manual_seed(length)
    dtype = torch.float32 if DEVICE == "cuda" else torch.float64
    x = torch.randn(2, length, 40, dtype=dtype, device=DEVICE, requires_grad=True)
    sizes = torch.randint(1, 5, (2, length), device=DEVICE).to(dtype)
    metric = torch.randn(2, length, 35, dtype=dtype, device=DEVICE)
    count = source_count(length, fixed) * 2 // 3
    probe = torch.randn(2, length - count, 40, dtype=dtype, device=DEVICE)
    want = merge_tokens(x, sizes, metric, count, fixed=fixed, impl="reference")
    got = merge_tokens(x, sizes, metric, count, fixed=fixed, impl=impl)
    assert torch.equal(got.target, want.target)
    assert torch.equal(got.sizes, want.sizes)
    assert relative_error(got.rows, want.rows) <= 1e-6
    grads = [torch.autograd.grad((m.rows * probe).sum(), x)[0] for m in (want, got)]
    assert relative_error(grads[1], grads[0]) <= 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_of_equal_cosines_the_lower_place_merges(impl):
    """Repeated frames: the tokens of a sequence are equal, or equal in pairs."""
    same = torch.ones(1, 11, 3, device=DEVICE)
    merged = merge_tokens(same, same[..., 0], same, 3, impl=impl)
    # sources are the places 2, 4, 6, 8, 10; all choose place 1, and 2, 4 and 6 merge
    assert merged.target[0].tolist() == [0, 3, 3, 4, 3, 5, 3, 6, 1, 7, 2]
    assert merged.sizes[0].tolist() == [1, 1, 1, 4, 1, 1, 1, 1]
    many = torch.ones(1, 70, 3, device=DEVICE)  # more destinations than a tile has
    merged = merge_tokens(many, many[..., 0], many, 3, impl=impl)
    assert merged.sizes[0, merged.target[0, 1]] == 4


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_in_the_metric_match_nothing_better(impl):
    metric = torch.tensor([[[1.0, 0], [0, 0], [1, 1], [1, 1.1], [0, 0], [-1, 0]]], device=DEVICE)
    merged = merge_tokens(metric.clone(), metric.new_ones(1, 6), metric, 1, fixed=0, impl=impl)
    assert merged.target[0].tolist() == [0, 2, 3, 3, 1, 4]
    assert not merged.rows.isnan().any()


def test_masked_tokens_merge_with_each_other_or_without_weight():
    metric = torch.tensor([[[9.0, 9], [1, 0], [1, 0], [0, 1], [1, 0.1], [0.9, 0]]])
    visible = torch.tensor([[True, True, False, False, True, True]])
    # source 2 (hidden) would choose place 1, but of hidden tokens there is only place 3
    merged = merge_tokens(metric, metric.new_ones(1, 6), metric, 2, visible=visible)
    assert merged.target[0].tolist() == [0, 1, 2, 2, 1, 3]
    alone = torch.tensor([[True, False, True, False, True, False]])
    merged = merge_tokens(metric, metric.new_ones(1, 6), metric, 2, visible=alone)
    kept = metric[0, 2], metric[0, 4]
    assert torch.equal(merged.rows[0, 1], (kept[0] + kept[1]) / 2), "hidden destinations have no weight"


@pytest.mark.parametrize(("count", "fixed"), [(-1, 1), (3, 1), (4, 0)])
def test_more_merges_than_sources_are_refused(count, fixed):
    x = torch.randn(1, 6, 4)
    with pytest.raises(ValueError, match=r"count: expected 0 to \d merges of 6 tokens"):
        merge_tokens(x, x[..., 0].abs(), x, count, fixed=fixed)


def test_the_kernel_refuses_masks_by_name():
    x = torch.randn(1, 6, 4, device=DEVICE)
    with pytest.raises(KernelUnavailable, match="masked frames"):
        merge_tokens(
            x, x[..., 0].abs(), x, 1, visible=torch.ones(1, 6, dtype=torch.bool, device=DEVICE), impl="triton"
        )


def test_matching_is_in_full_float32(monkeypatch):
    """Half-precision metrics are compared after conversion: a difference below their precision decides."""
    metric = torch.randn(1, 9, 4, dtype=torch.bfloat16)
    assert torch.equal(match_tokens(metric, 2, fixed=1), match_tokens(metric.double(), 2, fixed=1))


def test_the_op_is_registered_soundly():
    x = torch.randn(2, 9, 4, device=DEVICE, requires_grad=True)
    arguments = (x, x.detach()[..., 0].abs(), x.detach(), 3, 1, None, "torch")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_merge, arguments, test_utils=tests)
