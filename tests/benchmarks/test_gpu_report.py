"""Conclusions from GPU results, on made-up rows."""

import json

import pytest

from benchmarks.gpu_report import (
    beside_baselines,
    earlier_rows,
    regressions,
    report,
    table,
    targets,
)
from benchmarks.measure import read_rows


def row(name="a", impl="triton", ms=10.0, spread=0.1, **more):
    measured = {
        "name": name,
        "op": "info_nce",
        "impl": impl,
        "ms_p50": ms,
        "ms_p20": ms - spread,
        "ms_p80": ms + spread,
    }
    figures = {"extra_gb": 0.5, "tflops_needed": 1.0, "frac_gemm": 0.25, "launches": 3}
    return measured | figures | {"target_ms": None, "target_gb": None} | more


@pytest.mark.parametrize(
    "ms, spread, worse",
    [
        (10.0, 0.1, False),
        (10.4, 0.1, False),  # outside the spread, yet within 5 %
        (10.6, 0.1, True),
        (10.6, 0.7, False),  # more than 5 %, yet within the earlier run's spread
        (5.0, 0.1, False),
    ],
)
def test_slower_is_five_percent_and_outside_the_spread_of_the_best(ms, spread, worse):
    before = [row(ms=14.0), row(ms=10.0, spread=spread), row(ms=12.0)]
    assert regressions(row(ms=ms), before) == (["a triton: ms 10.6, was 10"] if worse else [])


def test_memory_may_grow_by_two_percent_and_errors_may_double():
    before = [row(extra_gb=0.5, err_fro=1e-6, err_gradient=1e-5), row(extra_gb=0.6, err_fro=5e-6)]
    assert regressions(row(extra_gb=0.509, err_fro=1.9e-6, err_gradient=2e-5), before) == []
    worse = regressions(row(extra_gb=0.52, err_fro=2.1e-6, err_gradient=3e-5), before)
    assert worse == [
        "a triton: extra_gb 0.52, was 0.5",
        "a triton: err_fro 2.1e-06, was 1e-06",
        "a triton: err_gradient 3e-05, was 1e-05",
    ]


def test_a_kernel_that_became_wrong_is_a_regression():
    assert regressions({"name": "a", "impl": "cuda", "ok": False}, [{"ok": True}]) == [
        "a cuda: wrong, was right"
    ]


def test_a_new_case_is_no_regression():
    assert regressions(row(ms=99.0), []) == []


def test_a_run_is_compared_with_the_last_five_before_it(tmp_path):
    for day in range(1, 8):
        line = json.dumps(row(ms=float(day)) | {"time": f"2026-01-0{day}"})
        (tmp_path / f"2026010{day}-abc-gpu.jsonl").write_text(line + "\n")
    (tmp_path / "20260101-abc-ops.jsonl").write_text("not of this benchmark")
    measured = earlier_rows(tmp_path, "2026-01-07")
    assert [old["ms_p50"] for old in measured["a", "triton"]] == [2, 3, 4, 5, 6]


def test_a_broken_results_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "x-gpu.jsonl"
    path.write_text('{"a": 1}\n{"b"\n')
    with pytest.raises(ValueError, match=r"x-gpu.jsonl:2: expected a JSON object, found '{\"b\"'"):
        read_rows(path)


def test_targets_are_compared_with_the_fastest_of_our_implementations():
    goal = {"target_ms": 5.0, "target_gb": 0.6}
    rows = [row(ms=6.0, **goal), row(impl="torch", ms=9.0, **goal), row(impl="reference", ms=1.0, **goal)]
    assert targets(rows) == ["a (triton): 6 ms, target 5: missed by 20%; 0.5 GB, target 0.6: met"]


def test_the_best_baseline_is_the_fastest_of_the_others():
    rows = [row(ms=4.0), row(impl="compiled", ms=2.0), row(impl="inf_cl", ms=8.0), row(name="alone", ms=1.0)]
    assert beside_baselines(rows) == ["a: triton is 0.50 x as fast as compiled, the best baseline"]


def test_the_table_shows_targets_and_rows_left_out():
    absent = {
        "name": "a",
        "impl": "inf_cl",
        "op": "info_nce",
        "left_out": "not installed: pip install inf_cl",
    }
    lines = table([row(target_ms=5.0), absent, absent | {"name": "b"}]).splitlines()
    assert lines[2] == "| a | triton | 10.000 | 9.900-10.100 | 5 | 1.0 | 25% | 0.500 | 3 |"
    assert lines[3] == "- inf_cl, 2 rows: not installed: pip install inf_cl (a first)"
    assert "Targets (of an H200):\na (triton): 10 ms, target 5: missed by 100%" in report(
        [row(target_ms=5.0)]
    )
