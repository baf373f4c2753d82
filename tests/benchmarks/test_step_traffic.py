"""The bytes of a bf16 step in plain torch stay as few as they were counted."""

from benchmarks import step_inputs
from benchmarks.step_traffic import step_traffic

PAIRS = 8


def test_a_bf16_step_copies_no_rows_to_float32_round_its_norms():
    kinds, launches = step_traffic(step_inputs.architecture("ViT-B/32"), PAIRS)
    gigabytes = {kind: count / PAIRS / 1e9 for kind, count in kinds.items()}  # of a pair
    assert sum(gigabytes.values()) < 1.95, "2.6 with float32 copies round the norms"
    assert gigabytes["copies of another dtype"] < 0.03, "0.50 before"
    assert gigabytes["layer norms"] < 0.16, "0.35 before"
    assert launches < 1550, "2,097 before"
