"""What `benchmarks/stages.py` makes of runs that have ended."""

import json

import pytest

from benchmarks.stages import Contest, differences

FIGURES = {"R@1": 20.0, "R@5": 40.0}


def ended(folder, losses):
    folder.mkdir()
    lines = [{"kind": "val", "step": 0}]
    lines += [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    rows = {"zero-shot, mean pooling": {}, "discovla, step 2": {"t2v": FIGURES, "v2t": FIGURES}}
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "versions.json").write_text(json.dumps({"git_commit": "abcdefghij"}))


def test_each_run_is_compared_with_one_process_step_by_step(tmp_path):
    ended(tmp_path / "one", [4.0, 2.0, 1.0])
    ended(tmp_path / "zero0", [4.0, 2.0, 1.0])
    ended(tmp_path / "zero2", [4.0, 2.5, 1.0])
    one, same, other = Contest(runs=tmp_path, stages=(0, 2)).rows()
    assert one["steps"] == 3 and one["t2v"] == FIGURES and one["commit"] == "abcdefg"
    assert same["largest"] == 0.0 and same["stage"] == 0
    assert other["largest"] == pytest.approx(0.25) and other["at_step"] == 1


def test_runs_of_other_steps_are_not_compared():
    with pytest.raises(ValueError, match="expected those of 2 steps, found 1"):
        differences({0: 1.0}, {0: 1.0, 1: 1.0})
