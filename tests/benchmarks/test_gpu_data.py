"""The table of all ways to the frames, in small and on a CPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu_data import measure_data
from benchmarks.measure import read_rows
from discovla.data.dali import reader as dali


@pytest.mark.slow
def test_every_way_is_measured_or_says_why_not(tmp_path, capsys):
    kinds = [("320x240", "long-gop"), ("640x360", "short-gop")]
    found = measure_data(
        tmp_path / "rows.jsonl", {"device": "x"}, kinds=kinds, clips=5, seconds=0.5, workers=1
    )
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == len(found) == 14  # seven ways, two kinds of clips
    assert {(row["size"], row["clips"]) for row in rows} == set(kinds)
    names = [row.name.replace("GPU", "CPU") for row in found[:7]]
    assert names[:4] == ["pyav, first visit", "pyav", "torchcodec", "dali on the CPU"]
    assert names[4:] == ["raw shards", "jpeg shards", "jpeg shards, dali on the CPU"]
    for row in rows:
        if "pyav" in row["way"] or row["way"].endswith("shards"):
            assert (row["bad"], row["frames"]) == (0, 60)
        assert row["rate"] > 0 or row["reason"]
    if dali.missing() is None:
        assert found[6].frames == 60
    assert "the fastest here is" in capsys.readouterr().out
