"""Decoders measured and compared on drawn clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from discovla.cli import main
from discovla.data.config import DataConfig
from discovla.data.dali import reader as dali
from discovla.data.decoders import BenchRow, bench, bench_table, differing_from_pyav
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
    """Have no decoder but PyAV installed."""
    for module in (dali, torchcodec):
        monkeypatch.setattr(module, "missing", lambda: "not installed")


@pytest.mark.usefixtures("alone")
def test_the_bench_measures_what_is_installed_and_names_the_setting(tmp_path, capsys):
    names = [movie(tmp_path / f"{n}.mp4", 12).name for n in range(3)]
    (tmp_path / "0.mp4").write_text("no video")
    manifest = manifest_of(tmp_path, names)
    write_shards(manifest, tmp_path / "shards", ShardSettings(frames=3, size=16), workers=0)
    words = ["--bench", "--frames", "3", "--image-size", "16", "--workers", "1"]
    words += ["--shards", str(tmp_path / "shards"), "--json", str(tmp_path / "rows.jsonl")]
    assert main(["doctor", str(manifest), *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    assert [(row["name"].partition(" on ")[0], row["frames"], row["bad"]) for row in rows] == [
        ("pyav, first visit", 6, 1),
        ("pyav", 6, 1),
        ("torchcodec", 0, 0),
        ("dali", 0, 0),
        ("raw shards", 6, 1),
    ]
    printed = capsys.readouterr().out
    assert printed.count("1 clips give none: ") == 3
    assert printed.count("-  not installed") == 2
    assert printed.splitlines()[-1].startswith(("data.decoder = ", "data.shards = "))


def row(name: str, rate: float, bad: int = 0) -> BenchRow:
    return BenchRow(name=name, setting=f'data.decoder = "{name}"', frames=100, seconds=100 / rate, bad=bad)


def test_the_fastest_decoder_is_chosen_unless_it_refuses_clips():
    first = BenchRow(name="pyav, first visit", frames=100, seconds=1e-3)
    assert bench_table([first, row("pyav", 10), row("torchcodec", 12)]).endswith(
        'data.decoder = "torchcodec"'
    )
    refusing = row("torchcodec", 12, bad=1)
    assert bench_table([first, row("pyav", 10), refusing]).endswith('data.decoder = "pyav"')


def test_a_bench_without_clips_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="clips: expected at least 1, found none"):
        next(bench([], DataConfig(manifest=tmp_path), 16))


def clips_of(folder: Path, names: list[str]) -> list[Clip]:
    paths = [odd_clip(folder, name) for name in names]
    return [Clip(id=path.stem, video=path, captions=("one",), split="train") for path in paths]


@pytest.mark.slow
def test_decoders_that_are_installed_give_every_frame(tmp_path):
    config = DataConfig(manifest=tmp_path, frames=3, workers=1)
    rows = list(bench(clips_of(tmp_path, ["vp9", "vp8-without-duration"]), config, 16))
    reasons = [None, None, torchcodec.missing(), dali.missing()]
    assert len(rows) == len(reasons)
    for row, reason in zip(rows, reasons, strict=True):
        assert (row.frames, row.bad, row.reason) == ((6, 0, "") if reason is None else (0, 0, reason))
        assert reason is not None or row.rate > 0


@pytest.mark.skipif(dali.missing() is not None, reason=str(dali.missing()))
def test_clips_of_which_dali_gives_other_frames_are_named(tmp_path, monkeypatch):
    config = DataConfig(manifest=tmp_path, frames=3, workers=1, sample_rate=10.0)
    clips = clips_of(tmp_path, ["vp9", "turned"])
    reasons = differing_from_pyav(clips, config, 32)
    assert list(reasons) == ["turned"]
    assert reasons["turned"].startswith("cannot be read by decoder = 'dali'")
    monkeypatch.setattr(dali, "TOLERANCE_MEAN", -1.0)
    assert differing_from_pyav(clips[:1], config, 32)["vp9"].startswith("decoder = 'dali' gives other frames")
