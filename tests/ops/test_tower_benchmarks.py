"""Tests of the parts of the tower op benchmarks, without a GPU."""

import pytest
import torch

from benchmarks.case_lists import checked_tower_cases, timed_tower_cases
from benchmarks.measure import relative_frobenius
from discovla.ops.dispatch import IMPLEMENTATIONS

SMALL = [case for case in checked_tower_cases() if case.dtype == torch.float32 and case.n <= 24]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_checked_case_agrees_with_the_reference(case):
    leaves = case.leaves("cpu")
    wide = [x.detach().double().requires_grad_(case.backward) for x in leaves]
    impl = "torch" if "torch" in IMPLEMENTATIONS[case.op] else "reference"
    want = case.run(wide, "reference")
    assert want[0].double().norm() > 0.1
    for got, truth in zip(case.run(leaves, impl), want, strict=True):
        assert relative_frobenius(got, truth) < 1e-4


def test_case_names_are_unique_and_every_op_is_timed():
    for cases in (checked_tower_cases(), timed_tower_cases("full")):
        assert len({case.name for case in cases}) == len(cases)
        assert {case.op for case in cases} >= {
            "layer_norm",
            "mlp",
            "fusion_norm",
            "unit_mean",
            "frame_patches",
        }
        assert {case.op for case in cases} >= {"short_attention", "temporal_fusion", "readout_attention"}
