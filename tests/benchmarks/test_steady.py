"""Memory over a run's steps, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import read_rows
from benchmarks.steady import growth

SCRIPT = Path(__file__).parents[2] / "benchmarks/steady.py"


def test_growth_is_that_after_the_first_fifth():
    looks = [{"mb": mb} for mb in (1.0, 90.0, 100.0, 102.0, 100.0, 100.0, 100.0, 100.0, 103.0, 104.0)]
    assert growth(looks) == 103.5 - 101.0


@pytest.mark.slow
def test_memory_stays_steady_over_steps_and_checkpoints(tmp_path):
    """Batches, states and checkpoints are some 100 KB each: what kept one of each step would show."""
    out = tmp_path / "rows.jsonl"
    words = ["--steps", 300, "--checkpoint-every", 10, "--evaluate-every", 150, "--timeout", 200]
    subprocess.run([sys.executable, SCRIPT, *map(str, words), "--out", out], check=True, timeout=250)
    *spans, whole = read_rows(out)
    assert [(row["rank"], row["step"]) for row in spans] == [(r, s) for r in (0, 1) for s in (100, 200, 300)]
    assert whole["checkpoints"] >= 30
    assert max(whole["growth_mb"]) <= 8
    assert whole["held_share"] < 0.5
