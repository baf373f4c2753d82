import pytest

from benchmarks import curves

ERRORS = {"captions": 0.004, "frames": 0.004, "frame_captions": 0.004, "loss": 0.005, "gradients": 0.01}


def rows(precision: str, losses: list[float]) -> list[dict]:
    after = {"t2v": 21.0, "v2t": 22.5}
    return [
        {"kind": "errors", "precision": precision, **ERRORS},
        {"kind": "curve", "precision": precision, "losses": losses, "after": after},
    ]


def test_a_curve_is_compared_step_by_step_and_at_its_end():
    base = [4.0] * 20 + [2.0] * 20
    apart = curves.difference([4.4] + [4.0] * 19 + [2.1] * 10 + [1.9] * 10, base)
    assert apart["first"] == pytest.approx(0.1)
    assert apart["mean"] == pytest.approx((0.1 + 20 * 0.05) / 40)
    assert apart["end"] == pytest.approx(0.0)


def test_the_table_has_a_line_for_each_precision():
    table = curves.table([*rows("fp32", [4.0] * 40), *rows("bf16", [4.0] * 20 + [4.08] * 20)]).splitlines()
    assert table[2].endswith("| 1.0e-02 | - | - | - | 21.0 / 22.5 |")
    assert table[3].endswith("| 1.0e-02 | 0.00% | 1.00% | +2.00% | 21.0 / 22.5 |")
    assert curves.table(rows("bf16", [4.0] * 40)) == "Not measured yet."


@pytest.mark.slow
def test_a_precision_is_measured_by_a_run_and_by_its_errors(drawn, tmp_path):
    words = [f"data.manifest={drawn}", f"data.cache={tmp_path}", "batch_size=8", "steps=3", "data.workers=0"]
    exact, short = (curves.errors(precision, words) for precision in ("fp32", "bf16"))
    for name in ERRORS:
        assert exact[name] < 1e-4 < 1e-3 < short[name] < 0.1, name
    run = curves.curve("bf16", words)
    assert len(run["losses"]) == 3 and run["before"].keys() == run["after"].keys() == {"t2v", "v2t"}
