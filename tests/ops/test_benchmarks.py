"""Tests of the parts of the op benchmarks, without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.case_lists import checked_cases, timed_cases
from benchmarks.measure import measure_times, product_flops, relative_frobenius

ROOT = Path(__file__).parents[2]
SMALL = [case for case in checked_cases() if case.n <= 63 and case.dtype == torch.float32]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_checked_case_agrees_with_the_reference(case):
    leaves = case.leaves("cpu")
    wide = [x.detach().double().requires_grad_(case.backward) for x in leaves]
    if case.op in ("rank_of_positive", "top_k"):
        got, want = case.call(leaves, "torch", case.masked), case.call(wide, "reference", case.masked)
        assert torch.equal(got, want)
        return
    for got, want in zip(case.run(leaves, "torch"), case.run(wide, "reference"), strict=True):
        assert relative_frobenius(got, want) < 1e-3 or want.norm() < 1e-5


@pytest.mark.parametrize("op", ["info_nce", "frame_similarity"])
def test_a_step_takes_four_passes_of_products(op):
    case = next(x for x in timed_cases("small") if x.op == op and x.n == 128 and x.dtype == torch.float32)
    leaves = case.leaves("cpu")
    assert product_flops(lambda: case.run(leaves, "torch")) == pytest.approx(case.flops)


def test_times_are_ordered():
    times = measure_times(lambda number: sum(range(1000)), cuda=False, seconds=0.01)
    assert 0 < times.ms_p20 <= times.ms_p50 <= times.ms_p80


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_gpu_benchmark_says_so():
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu.py"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2
    assert run.stderr.strip() == "benchmarks/gpu.py needs a CUDA device, and torch finds none here"
