import json

from benchmarks import step_table

MACHINE = {"device": "H200", "torch": "2.13", "commit": "abc", "dirty": False, "threads": 1}
COUNTS = {"needed_tflop": 0.4, "reference_tflop": 0.5, "kept_mb": 1234.5, "dispatched": 1900, "n": 3}


def row(impl: str, ms: float, ratios: list[float], time: str = "2026-01-02") -> dict:
    times = {"ms_p50": ms, "ms_p20": ms - 1, "ms_p80": ms + 1, "samples_s": 2000 / ms, "ratios": ratios}
    return {"name": "step ViT-B/32 b2", "impl": impl, "time": time, **MACHINE, **COUNTS, **times}


ROWS = [
    row("reference", 4000, [1.0, 1.0, 1.0]),
    row("reference anomaly", 5000, [0.8, 0.5, 0.8]),
    row("ours", 2500, [1.6, 1.5, 2.0]),
]
ROWS.append(
    {"impl": "peft", "left_out": "absent", **{key: ROWS[0][key] for key in ("name", "time", *MACHINE)}}
)


def test_each_ratio_is_the_median_over_rounds_and_names_its_baseline():
    head, _, *lines = step_table.table(ROWS).splitlines()
    assert "| times as fast as reference | times as fast as reference anomaly | TFLOP |" in head
    assert lines[1] == (
        "| ViT-B/32 b2 | reference anomaly | 5,000 (4,999-5,001) | 0.40 | 0.80x | 1.00x | 0.5 | 0.1 "
        "| 1,234 | 1,900 |"
    )
    # 1.6 / 0.8, 1.5 / 0.5, 2.0 / 0.8: the medians' ratio would be another
    assert "| 1.60x | 2.50x | 0.4 | 0.16 |" in lines[2]
    assert lines[-1] == "- peft of step ViT-B/32 b2: absent"


def test_of_a_cpu_there_are_ratios_and_counts_alone():
    head, _, *lines = step_table.table([row | {"device": "cpu"} for row in ROWS]).splitlines()
    assert head.startswith("| step | implementation | times as fast as reference |")
    assert lines[1] == "| ViT-B/32 b2 | reference anomaly | 0.80x | 1.00x | 0.5 | 1,234 | 1,900 |"


def test_a_step_without_its_reference_has_no_ratio():
    alone = {key: value for key, value in ROWS[2].items() if key != "ratios"}
    assert "times as fast" not in step_table.table([alone])
    assert step_table.table([ROWS[3]]) == "Not measured yet."


def test_the_last_run_of_each_contest_counts(tmp_path):
    old, other = row("ours", 9000, [1.0], time="2026-01-01"), row("ours", 10, [1.0], time="2025-01-01")
    other["name"] = "step ViT-B/16 b2"
    (tmp_path / "cpu").mkdir()
    lines = [json.dumps(line) for line in [old, other, *ROWS]]
    (tmp_path / "cpu/20260102-abc-train-step.jsonl").write_text("\n".join(lines) + "\n")
    assert step_table.newest(tmp_path) == [other, *ROWS]


def test_the_machine_of_a_run_is_said_once():
    assert step_table.where(ROWS) == (
        "- step ViT-B/32 b2: H200, 1 thread, torch 2.13, median of 3 rounds, commit abc"
    )
