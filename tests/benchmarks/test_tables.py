"""Tables made from results."""

import json

import pytest

from benchmarks import tables, tokens_picture
from benchmarks.experiments import ABLATION_RUNS, MEAN_POOLING, METHOD_RUNS, TIME_RUNS, TOKEN_RUNS


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_of_a_page_are_up_to_date(page):
    text = (tables.ROOT / page).read_text()
    assert tables.BLOCK.search(text), "it has tables"
    assert tables.fill(text) == text, "run python benchmarks/tables.py"


def test_a_block_is_filled_and_other_text_unchanged(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "ladder", lambda: "| 1 |")
    page = "a\n<!-- table ladder -->\nold\n<!-- end -->\nb <!-- end -->\n"
    assert tables.fill(page) == "a\n<!-- table ladder -->\n| 1 |\n<!-- end -->\nb <!-- end -->\n"


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match=r"table ladders: expected one of .*\bladder, "):
        tables.fill("<!-- table ladders -->\n<!-- end -->")


def test_check_names_the_outdated_pages(monkeypatch, tmp_path, capsys):
    for page in tables.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text("<!-- table ladder -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert f"{', '.join(tables.PAGES)}: outdated" in capsys.readouterr().err
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0


def test_a_cell_shows_the_range_if_the_seeds_differ():
    rows = [{"figures": {"test": {"t2v": {"R@1": x}}}} for x in (20.0, 21.0, 25.0)]
    assert tables.mean_and_range(rows, "figures/test/t2v/R@1") == "22.0 (20.0-25.0)"
    assert tables.mean_and_range(rows[:1], "figures/test/t2v/R@1") == "20.0"
    assert tables.mean_and_range(rows, "figures/flip") == "-"


def test_the_methods_table_has_means_over_seeds_and_costs():
    def result(seed: int, score: float) -> dict:
        figures = {way: {"R@1": score, "R@5": score} for way in ("t2v", "v2t")}
        probes = {kind: {"clip": 50.0, "control": 50.0} for kind in ("verb", "bind", "reversal")}
        run = next(run for run in METHOD_RUNS if (run.name, run.seed) == (MEAN_POOLING, seed))
        row = {"kind": "run", "identity": run.identity, "trained_parameters": 12_345}
        return row | {"peak_rss_mb": 800 + seed, "before": figures, "test": figures, "probes": probes}

    cost = {"kind": "cost", "name": MEAN_POOLING, "step_over_meanP": 1.0, "saved_mb": 250.4}
    (line,) = tables.methods_table([result(0, 20.0), result(1, 24.0), cost]).splitlines()[2:]
    assert line.startswith(f"| {MEAN_POOLING} | 2 | 12 k | 1.00x | 250 MB | 801 MB | 22.0 (20.0-24.0) |")
    assert line.endswith("| 50.0 | 50.0 | 50.0 | 50.0 |")


def test_the_time_table_begins_with_clip_and_has_moves_alone():
    scores = {way: {"R@1": 20.0, "R@5": 40.0} for way in ("t2v", "v2t")}
    run = next(run for run in TIME_RUNS if run.kind == "run")
    row = {"kind": "run", "identity": run.identity, "trained_parameters": 12_345, "steps": 1200}
    row |= {"cpu_seconds": 99.6, "plain": scores, "test": scores}
    row |= {"reversal": {"all": {"clip": 90.0}, "moves": {"clip": 85.5}}}
    clip, ours = tables.time_table([row]).splitlines()[2:]
    assert clip == "| CLIP, mean pooling | - | 0 | - | - | 20.0 | 40.0 | 20.0 | 40.0 | 50.0 | 50.0 |"
    assert ours == f"| {run.name} | 1 | 12 k | 1,200 | 100 | 20.0 | 40.0 | 20.0 | 40.0 | 90.0 | 85.5 |"


def test_results_with_other_overrides_are_in_no_table():
    trial = {"kind": "run", "identity": f"{ABLATION_RUNS[0].identity} steps=2", "figures": {}}
    assert len(tables.ablation_table([trial], "retrieval").splitlines()) == 2


ERRORS = {"captions": 0.004, "frames": 0.004, "frame_captions": 0.004, "loss": 0.005, "gradients": 0.01}


def precision_rows(precision: str, losses: list[float]) -> list[dict]:
    return [
        {"kind": "errors", "precision": precision, **ERRORS},
        {"kind": "curve", "precision": precision, "losses": losses},
    ]


def test_loss_curves_are_compared_step_by_step_and_at_their_ends():
    base = [4.0] * 20 + [2.0] * 20
    first, mean, end = tables.curve_differences([4.4] + [4.0] * 19 + [2.1] * 10 + [1.9] * 10, base)
    assert first == pytest.approx(0.1)
    assert mean == pytest.approx((0.1 + 20 * 0.05) / 40)
    assert end == pytest.approx(0.0)


def test_the_precision_table_compares_loss_curves_with_float32():
    rows = [*precision_rows("fp32", [4.0] * 40), *precision_rows("bf16", [4.0] * 20 + [4.08] * 20)]
    lines = tables.precision_table(rows).splitlines()
    assert lines[2].endswith("| 1.0e-02 | - | - | - |")
    assert lines[3].endswith("| 1.0e-02 | 0.00% | 1.00% | +2.00% |")
    alone = tables.precision_table(precision_rows("bf16", [4.0] * 40)).splitlines()
    assert alone[2].endswith("| 1.0e-02 | - | - | - |"), "there is no curve to compare it with"
    assert tables.precision_table([]) == "Not measured yet."


MACHINE = {"device": "H200", "torch": "2.13", "commit": "abc", "dirty": False, "threads": 1}
COUNTS = {"needed_tflop": 0.4, "reference_tflop": 0.5, "kept_mb": 1234.5, "dispatched": 1900, "n": 3}


def step_row(impl: str, ms: float, ratios: list[float], time: str = "2026-01-02") -> dict:
    times = {"ms_p50": ms, "ms_p20": ms - 1, "ms_p80": ms + 1, "samples_s": 2000 / ms, "ratios": ratios}
    return {"name": "step ViT-B/32 b2", "impl": impl, "time": time, **MACHINE, **COUNTS, **times}


STEPS = [
    step_row("reference", 4000, [1.0, 1.0, 1.0]),
    step_row("reference anomaly", 5000, [0.8, 0.5, 0.8]),
    step_row("ours", 2500, [1.6, 1.5, 2.0]),
]
STEPS.append(
    {"impl": "peft", "left_out": "absent", **{key: STEPS[0][key] for key in ("name", "time", *MACHINE)}}
)


def test_the_ratio_of_steps_is_the_median_over_rounds_and_names_its_baseline():
    head, _, *lines = tables.step_table(STEPS).splitlines()
    assert "| times as fast as reference | times as fast as reference anomaly | TFLOP |" in head
    assert lines[1] == (
        "| ViT-B/32 b2 | reference anomaly | 5,000 (4,999-5,001) | 0.40 | 0.80x | 1.00x | 0.5 | 0.1 "
        "| 1,234 | 1,900 |"
    )
    # 1.6 / 0.8, 1.5 / 0.5, 2.0 / 0.8: the medians' ratio would be another
    assert "| 1.60x | 2.50x | 0.4 | 0.16 |" in lines[2]
    assert lines[-1] == "- peft of step ViT-B/32 b2: absent"


def test_steps_on_a_cpu_have_ratios_and_counts_but_no_times():
    head, _, *lines = tables.step_table([row | {"device": "cpu"} for row in STEPS]).splitlines()
    assert head.startswith("| step | implementation | times as fast as reference |")
    assert lines[1] == "| ViT-B/32 b2 | reference anomaly | 0.80x | 1.00x | 0.5 | 1,234 | 1,900 |"


def test_a_step_without_its_reference_has_no_ratio():
    alone = {key: value for key, value in STEPS[2].items() if key != "ratios"}
    assert "times as fast" not in tables.step_table([alone])
    assert tables.step_table([STEPS[3]]) == "Not measured yet."


def test_only_the_last_run_of_each_comparison_counts(tmp_path):
    old, other = (
        step_row("ours", 9000, [1.0], time="2026-01-01"),
        step_row("ours", 10, [1.0], time="2025-01-01"),
    )
    other["name"] = "step ViT-B/16 b2"
    (tmp_path / "cpu").mkdir()
    lines = [json.dumps(line) for line in [old, other, *STEPS]]
    (tmp_path / "cpu/20260102-abc-train-step.jsonl").write_text("\n".join(lines) + "\n")
    assert tables.newest_steps(tmp_path) == [other, *STEPS]


def test_the_conditions_of_a_comparison_are_one_line():
    assert tables.step_conditions(STEPS) == (
        "- step ViT-B/32 b2: H200, 1 thread, torch 2.13, median of 3 rounds, commit abc"
    )


def token_rows() -> list[dict]:
    """Return a run of the experiment `tokens`, the same with tokens merged later, and the costs of both."""
    run = next(run for run in TOKEN_RUNS if run.name == "LoRA: all tokens")
    score = {way: {"R@1": 20.0, "R@5": 40.0} for way in ("t2v", "v2t")}
    row = {"test": score, "reversal": {"all": {"clip": 50.0}}, "gflop": 0.2, "method": "LoRA"}
    trained = {
        "kind": "run",
        "merge": "all tokens",
        "tokens": 136,
        "trained_parameters": 35_000,
        "steps": 160,
    }
    trained |= {"identity": run.identity, "cpu_seconds": 99.6, "reads": "shards", "vector_bytes": 2560}
    later = {"kind": "merged later", "merge": "ToMe, 3 a block", "tokens": 64, "identity": run.identity}
    costs = [{"kind": "cost", "part": part, "name": name, "ratio": ratio} for part, name, ratio in (
        ("step", "LoRA: all tokens", 1.0), ("clips", "all tokens", 1.0), ("clips", "ToMe, 3 a block", 0.8)
    )]  # fmt: skip
    return [row | trained, row | later, *costs]


def test_the_tables_of_merged_tokens_show_what_was_trained_and_what_was_merged_later():
    (line,) = tables.front_table(token_rows()).splitlines()[2:]
    assert line.startswith("| LoRA | all tokens | 1 | 35 k | 160 | 100 | 1.00 | 136 | 0.200 | 2,560 | 20.0 |")
    lines = tables.merged_later_table(token_rows()).splitlines()[2:]
    assert [line[: line.index(" | 20.0")] for line in lines] == [
        "| LoRA | all tokens | 136 | 0.200 | 1.00",
        "| LoRA | ToMe, 3 a block | 64 | 0.200 | 0.80",
    ]


def test_the_picture_of_merged_tokens_has_a_line_for_each_method_and_kind_of_merging():
    made = tokens_picture.curves(token_rows())
    assert made == {"LoRA: ToMe, merged later": [(64 / 136, 20.0), (1.0, 20.0)]}
    assert tokens_picture.svg(made).count("<circle") == 2 + 2, "a point each, and two in the legend"
