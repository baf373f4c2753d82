"""Memory over many odd files, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.loader_memory import link_clips
from benchmarks.measure import read_rows

SCRIPT = Path(__file__).parents[2] / "benchmarks/loader_memory.py"


def test_every_clip_is_a_file_of_its_own(tmp_path):
    assert len({clip.video for clip in link_clips(tmp_path, 60)}) == 60


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    """In an interpreter of its own: a worker forked from a large one comes to own its pages bit by bit."""
    out = tmp_path / "rows.jsonl"
    subprocess.run([sys.executable, SCRIPT, "--count", "800", "--out", out], check=True, timeout=300)
    rows = read_rows(out)
    assert [row["subject"] for row in rows] == ["doctor", "loader"]
    for row in rows:
        assert row["files"] == 800
        assert row["mb_after_a_fifth"] > 10
        assert row["growth_mb"] <= 12  # 20 KB a file
