"""Times of decoders, shards and the loader, in small and on a CPU."""

from __future__ import annotations

import os

import pytest

from benchmarks.data import GOPS, main, measure_machine, percentile, take_turns
from benchmarks.measure import read_rows
from discovla.data.dali import reader as dali


@pytest.mark.slow
def test_every_decoder_and_shard_is_measured_or_has_a_reason(tmp_path, capsys):
    kinds = [("320x240", "long-gop"), ("640x360", "short-gop")]
    measured = measure_machine(
        tmp_path / "rows.jsonl", {"device": "x"}, kinds=kinds, clips=5, seconds=0.5, workers=1
    )
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == len(measured) == 14  # seven ways, two kinds of clips
    assert {(row["size"], row["clips"]) for row in rows} == set(kinds)
    names = [row.name.replace("GPU", "CPU") for row in measured[:7]]
    assert names[:4] == ["pyav, first visit", "pyav", "torchcodec", "dali on the CPU"]
    assert names[4:] == ["raw shards", "jpeg shards", "jpeg shards, dali on the CPU"]
    for row in rows:
        if "pyav" in row["way"] or row["way"].endswith("shards"):
            assert (row["bad"], row["frames"]) == (0, 60)
        assert row["rate"] > 0 or row["reason"]
    if dali.missing() is None:
        assert measured[6].frames == 60
    assert "the fastest here is" in capsys.readouterr().out


def test_calls_take_turns_in_another_order_each_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = take_turns(calls, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}
    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (0, 50, 100)] == [1.0, 2.0, 3.0]


@pytest.mark.slow
def test_decoders_are_compared_on_clips_of_one_size(tmp_path):
    words = ["--rounds", "2", "--seconds", "1", "--sizes", "320x240", "--out", str(tmp_path / "rows.jsonl")]
    affinity = os.sched_getaffinity(0)
    try:
        main(["decoders", *words])
    finally:
        os.sched_setaffinity(0, affinity)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {row["clip"] for row in rows} == {f"320x240-{gop}" for gop in GOPS}
    readers = {row["reader"] for row in rows if "reader" in row}
    assert {"pyav-naive", "pyav-sequential", "ours, first visit", "ours, pyav"} <= readers
    assert sum(row["name"] == "read in another process" for row in rows) == 2


@pytest.mark.slow
def test_shards_and_the_loader_are_compared_with_decoding(tmp_path):
    words = ["--rounds", "2", "--seconds", "1", "--clips", "2", "--kinds", "short-gop"]
    main(["shards", *words, "--out", str(tmp_path / "rows.jsonl")])
    rows = read_rows(tmp_path / "rows.jsonl")
    ways = {(row["subject"], row.get("way")) for row in rows}
    assert {("reading", way) for way in ("decode", "raw", "jpeg")} <= ways
    loaders = ("loader", "loader, decoder in a process", "loader, frames ready")
    assert {(subject, "loader") for subject in loaders} <= ways
    assert rows[-1]["subject"] == "loader's own work" and rows[-1]["cpu_ms"] > 0
    assert all(row["decode_by_this_cpu_p50"] == 1 for row in rows if row.get("way") == "decode")
