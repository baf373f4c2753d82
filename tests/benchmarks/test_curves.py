import json

import pytest

from benchmarks import curves
from discovla.trainer import Trainer

ERRORS = {"captions": 0.004, "frames": 0.004, "frame_captions": 0.004, "loss": 0.005, "gradients": 0.01}


def rows(precision: str, losses: list[float]) -> list[dict]:
    return [
        {"kind": "errors", "precision": precision, **ERRORS},
        {"kind": "curve", "precision": precision, "losses": losses},
    ]


def test_a_curve_is_compared_step_by_step_and_at_its_end():
    base = [4.0] * 20 + [2.0] * 20
    apart = curves.difference([4.4] + [4.0] * 19 + [2.1] * 10 + [1.9] * 10, base)
    assert apart["first"] == pytest.approx(0.1)
    assert apart["mean"] == pytest.approx((0.1 + 20 * 0.05) / 40)
    assert apart["end"] == pytest.approx(0.0)


def test_the_table_has_a_line_for_each_precision():
    table = curves.table([*rows("fp32", [4.0] * 40), *rows("bf16", [4.0] * 20 + [4.08] * 20)]).splitlines()
    assert table[2].endswith("| 1.0e-02 | - | - | - |")
    assert table[3].endswith("| 1.0e-02 | 0.00% | 1.00% | +2.00% |")
    alone = curves.table(rows("bf16", [4.0] * 40)).splitlines()
    assert alone[2].endswith("| 1.0e-02 | - | - | - |"), "there is no curve to compare it with"
    assert curves.table([]) == "Not measured yet."


@pytest.mark.slow
def test_a_precision_is_measured_by_its_errors_and_by_the_steps_that_training_takes(drawn, tmp_path):
    words = [f"data.manifest={drawn}", f"data.cache={tmp_path}/cache", "batch_size=8", "steps=2"]
    found = [curves.errors(precision, words) for precision in curves.PRECISIONS]
    for name in ERRORS:
        fp32, bf16, wide, fp8, both = (row[name] for row in found)
        assert fp32 < 1e-4 < 1e-3 < bf16 < 0.1 and wide > 1e-4, name
        # the residual's dtype matters to features: of the gradients' error products in bf16 make most
        assert name in ("loss", "gradients") or wide < bf16, name
        assert name == "loss" or max(wide, bf16) < fp8 < 0.5, name
        # of the gradients' error the features', which are the same, make most
        assert fp8 != both < 1.3 * fp8 if name == "gradients" else both == fp8, name
    run = curves.curve("bf16", words)
    config = curves.config_of("bf16", [*words, f"directory={tmp_path}/run"])
    Trainer(config).run()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert run["losses"] == [record["loss"] for record in records if record["kind"] == "train"]
