"""Runs that decode by DALI on a CPU, also killed and resumed, against runs without it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from discovla.cli import main
from discovla.data.dali.reader import missing
from tests import runs

REASON = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
STEPS = 4  # of 8 pairs; an epoch has 9 steps


@pytest.fixture(scope="module")
def shards(tmp_path_factory, drawn) -> Path:
    """JPEG shards of the drawn world; DALI decodes them on a CPU, but not its H.264 videos."""
    folder = tmp_path_factory.mktemp("shards")
    words = ["shard", drawn, folder / "jpeg", "--config", runs.write_config(folder, drawn), "--workers", 0]
    assert main([str(word) for word in [*words, "--format", "jpeg", "--quality", 95]]) == 0
    return folder / "jpeg"


def figures(directory: Path) -> dict:
    """Return the figures of a run, without times."""
    return {name: json.loads((directory / name).read_text()) for name in ("before.json", "results.json")}


def test_a_run_killed_in_mid_epoch_ends_like_one_never_killed_and_near_one_without_dali(
    tmp_path, drawn, shards
):
    config = runs.write_config(tmp_path, drawn)
    words = [config, f"steps={STEPS}", "checkpoint_every=2", "batch_size=8", f"data.shards={shards}"]
    words += ["data.val_split="]  # each evaluation builds a pipeline
    whole, killed, plain = (tmp_path / name for name in ("whole", "killed", "plain"))
    runs.train([*words, f"directory={plain}"], timeout=300)
    words += ["data.decoder=dali"]
    runs.train([*words, f"directory={whole}"], timeout=300)
    words += [f"directory={killed}", "resume=true"]
    job = runs.start(words)
    while not (killed / "metrics.jsonl").exists() or len(runs.records(killed)) < 3:
        assert job.processes[0].is_alive(), f"ended before it was killed:\n{job.output()}"
        time.sleep(0.002)
    job.processes[0].kill()
    assert job.wait(300) == [-9]
    runs.train(words, timeout=300)
    assert figures(killed) == figures(whole)
    assert runs.records(killed) == runs.records(whole)
    ours, theirs = (runs.tensors(folder, STEPS) for folder in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # the same clips in the same order, decoded by another library
    assert not (whole / "quarantine.jsonl").exists()
    assert torch.allclose(runs.losses(whole), runs.losses(plain), rtol=0.02)


def test_a_run_does_not_resume_with_another_decoder(tmp_path, drawn, shards):
    words = [runs.write_config(tmp_path, drawn), "steps=2", f"data.shards={shards}", "data.val_split="]
    runs.train([*words, "stop_at=1"])
    job = runs.start([*words, "data.decoder=dali", "resume=true"])
    assert job.wait() == [2]
    assert "pixels: the run began with 'jpeg, quality 95', found 'jpeg, quality 95, by dali'" in job.output()


def test_a_decoder_that_refuses_every_clip_stops_the_run_with_one_line(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=2", "data.val_split=", "data.decoder=dali"]
    job = runs.start(words)
    assert job.wait() == [2]
    last = job.output().splitlines()[-1]
    assert "cannot be read by decoder = 'dali': expected one of the codecs mjpeg, vp8, vp9 on a CPU" in last
    assert "found h264" in last
