"""Runs that train from shards: the same results as from videos, also over a network that fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from discovla.cli import main
from tests import runs
from tests.data.shards.server import served

STEPS = 5  # of 8 pairs; an epoch has 9 steps


@pytest.fixture(scope="module")
def shards(tmp_path_factory, drawn) -> Path:
    """Return raw shards of the drawn world with the settings of a small run."""
    folder = tmp_path_factory.mktemp("shards")
    config = runs.write_config(folder, drawn)
    words = ["shard", drawn, folder / "raw", "--config", config, "--clips-per-shard", 10, "--workers", 0]
    assert main([str(word) for word in words]) == 0
    return folder / "raw"


def assert_same(found: Path, wanted: Path) -> None:
    """Assert that two runs wrote the same numbers."""
    for kind in ("train", "val"):
        assert runs.records(found, kind) == runs.records(wanted, kind) != []
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (found, wanted))
    assert ours == theirs
    ours, theirs = (json.loads((folder / "before.json").read_text()) for folder in (found, wanted))
    assert ours["rows"] == theirs["rows"]  # files have a size in the fingerprint, shards have none


def test_a_run_from_raw_shards_has_the_losses_and_results_of_one_from_videos(tmp_path, drawn, shards):
    words = [runs.write_config(tmp_path, drawn), "steps=2"]
    runs.train([*words, f"directory={tmp_path}/clips"], report=True)
    runs.train([*words, f"data.shards={shards}"], report=True)
    assert_same(tmp_path / "run", tmp_path / "clips")
    for name in ("clips", "run"):
        page = (tmp_path / name / "report.html").read_text()
        assert "data:image/jpeg" in page and "without frames" not in page
    # what a run saw last decides which shards its evaluation reads
    assert main(["evaluate", str(tmp_path / "run"), "--split", "val", "--device", "cpu"]) == 0


@pytest.mark.slow
def test_a_run_from_a_failing_server_killed_and_resumed_ends_as_one_from_videos(tmp_path, drawn, shards):
    words = [runs.write_config(tmp_path, drawn), f"steps={STEPS}", "checkpoint_every=2", "batch_size=8"]
    runs.train([*words, f"directory={tmp_path}/clips"], timeout=300)
    with served(shards) as (address, server):
        server.faults = {"train-000000.tar": ["drop", None] * 9, "val-000000.tar": [503, None] * 9}
        words += [f"data.shards={address}", "data.workers=2", "resume=true"]
        job = runs.start(words)
        metrics = tmp_path / "run/metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b'"train"') < 3:
            assert job.processes[0].is_alive(), f"ended before it was killed:\n{job.output()}"
            time.sleep(0.002)
        job.processes[0].kill()
        assert job.wait(300) == [-9]
        assert "attempt 1 of 5" in job.output()
        runs.train(words, timeout=300)
    assert_same(tmp_path / "run", tmp_path / "clips")
    assert not (tmp_path / "run/quarantine.jsonl").exists()
    ours, theirs = (runs.tensors(tmp_path / name, STEPS) for name in ("run", "clips"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_tar_that_disappears_makes_bad_clips_until_they_are_too_many(tmp_path, drawn, shards):
    words = [runs.write_config(tmp_path, drawn), "steps=4", "data.val_split=", "data.bad_clip_share=0.2"]
    with served(shards) as (address, server):
        server.faults = {"train-000001.tar": [404]}  # 10 of 24 clips
        job = runs.start([*words, f"data.shards={address}"])
        assert job.wait() == [2]
    assert "skipping clip 'train_000" in job.output()
    last = job.output().splitlines()[-1]
    assert last.startswith(
        "train.py: error: data.bad_clip_share: expected at most 20.00% of 24 clips to be bad"
    )
    assert "train-000001.tar: no such file" in last
    named = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert 5 <= len(named) <= 10


@pytest.mark.slow
def test_a_run_does_not_resume_with_frames_of_other_shards(tmp_path, drawn, shards):
    config = runs.write_config(tmp_path, drawn)
    words = ["shard", drawn, tmp_path / "jpeg", "--config", config, "--format", "jpeg", "--workers", 0]
    assert main([str(word) for word in words]) == 0
    words = [config, "steps=4", f"data.shards={shards}"]
    runs.train([*words, "stop_at=2"])
    job = runs.start([*words, "resume=true", f"data.shards={tmp_path}/jpeg"])
    assert job.wait() == [2]
    assert "pixels: the run began with 'decoded', found 'jpeg, quality 90'" in job.output()
    runs.train([config, "steps=4", "resume=true"])  # raw shards and clips are the same
