"""Frames a second of each way to the frames, on drawn clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from discovla.cli import main
from discovla.data.dali import reader as dali
from discovla.data.data_bench import DEMAND, BenchRow, BenchSettings, bench, table
from discovla.data.manifest import Clip
from discovla.data.shards.layout import ShardSettings
from discovla.data.shards.writer import write_shards
from discovla.data.video import torchcodec
from tests.data.conftest import movie
from tests.data.odd_clips import odd_clip


def manifest_of(folder: Path, names: list[str]) -> Path:
    rows = [{"id": n, "video": n, "captions": ["one"], "split": "train"} for n in names]
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def alone(monkeypatch) -> None:
    """No decoder but PyAV."""
    for module in (dali, torchcodec):
        monkeypatch.setattr(module, "missing", lambda: "not installed")


@pytest.mark.usefixtures("alone")
def test_the_command_reads_the_clips_in_every_way_and_says_what_is_not_there(tmp_path, capsys):
    names = [movie(tmp_path / f"{n}.mp4", 12).name for n in range(5)]
    (tmp_path / "0.mp4").write_text("no video")
    manifest = manifest_of(tmp_path, names)
    write_shards(manifest, tmp_path / "shards", ShardSettings(frames=3, size=16), workers=0)
    options = ["--clips", "2", "--num-frames", "3", "--image-size", "16", "--workers", "1"]
    paths = ["--shards", str(tmp_path / "shards"), "--json", str(tmp_path / "rows.jsonl")]
    assert main(["data-bench", str(manifest), *options, *paths]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    assert [(row["name"].split(",")[0], row["frames"], row["bad"]) for row in rows] == [
        ("pyav", 3, 1),  # of the clips 0 and 2, 0 being none
        ("pyav", 3, 1),
        ("torchcodec", 0, 0),
        ("dali on the CPU" if not torch.cuda.is_available() else "dali on the GPU", 0, 0),
        ("raw shards", 3, 1),
    ]
    printed = capsys.readouterr().out
    assert "demand, a target on 1 H200" in printed
    assert "29,520" in printed
    assert printed.count("1 clips gave none: not a video file") == 3
    assert printed.count("-  not installed") == 2


def test_the_share_of_the_demand_is_of_frames_a_second():
    row = BenchRow(name="pyav", frames=295_200, seconds=100.0)
    assert table([row]).splitlines()[-1].split() == ["pyav", "2,952", "10.0", "%", "37.0", "%", "159.7", "%"]
    assert DEMAND == {"ViT-B/32": 29_520, "ViT-B/16": 7_980, "ViT-L/14": 1_848}


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(ValueError, match="clips: expected at least 1, found none"):
        next(bench([], BenchSettings()))


@pytest.mark.slow
def test_decoders_that_are_there_give_every_frame(tmp_path):
    paths = [odd_clip(tmp_path, "vp9"), odd_clip(tmp_path, "mjpeg")]
    clips = [Clip(id=path.stem, video=path, captions=("one",), split="train") for path in paths]
    rows = list(bench(clips, BenchSettings(frames=3, image_size=16, workers=1)))
    lacking = [None, None, torchcodec.missing(), dali.missing()]
    assert len(rows) == len(lacking)
    for row, why in zip(rows, lacking, strict=True):
        assert (row.frames, row.bad, row.reason) == ((6, 0, "") if why is None else (0, 0, why))
        assert why is not None or row.rate > 0
