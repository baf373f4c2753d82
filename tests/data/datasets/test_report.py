"""The manifest and the report that `prepare` writes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from discovla.cli import main
from discovla.data.datasets import DATASETS, Annotations
from discovla.data.datasets.annotations import read_frame_captions, with_frame_captions
from discovla.data.datasets.generic import csv_clips
from discovla.data.datasets.report import prepare
from discovla.data.manifest import Clip, read_manifest


def clip(name: str, *captions: str, split: str = "train") -> Clip:
    return Clip(id=name, video=Path("/no") / f"{name}.mp4", captions=captions, split=split)


def test_prepare_writes_a_manifest_and_reports_missing_videos(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"x")
    path = tmp_path / "clips.csv"
    path.write_text("video,caption,split\nx.mp4,one,train\ny.mp4,two,train\nz.mp4,three,test\n")
    annotations = csv_clips(path)
    report = prepare(annotations, tmp_path / "out/m.jsonl")
    assert read_manifest(tmp_path / "out/m.jsonl") == annotations.clips
    assert report.lines()[1:] == [
        f"train: 2 clips, 2 captions, 1 videos missing ({tmp_path / 'y.mp4'})",
        f"test: 1 clips, 1 captions, 1 videos missing ({tmp_path / 'z.mp4'})",
    ]


def test_prepare_counts_captions_without_frame_captions_golden(golden, tmp_path):
    folder = golden / "discovla/anns_fixture"
    clips = DATASETS["msrvtt"].read(folder, protocol="1k-A-9k", videos="V").clips
    clips = with_frame_captions(clips, read_frame_captions(folder / "pseudo_captions.json"))
    line = prepare(clips, tmp_path / "m.jsonl").lines()[1]
    assert line.startswith("train: 4 clips, 13 captions, 4 without frame captions")


def test_a_sentence_shared_by_clips_counts_once_per_clip(tmp_path):
    clips = [clip("a", "one", "one"), clip("b", "two"), clip("c", "two"), clip("d", "two", split="test")]
    report = prepare(clips, tmp_path / "m.jsonl")
    assert report.splits["train"].shared_captions == {"two": 2}
    assert report.splits["test"].shared_captions == {}
    assert "train: 1 sentences describe several clips, 2 clips in all" in report.lines()


def test_the_report_lists_uncaptioned_and_unlisted_ids_and_notes(tmp_path):
    annotations = Annotations(
        clips=[clip("a", "x")],
        listed={"train": ["a"], "test": [f"s{i}" for i in range(5)]},
        unlisted=["u"],
        notes=["leaking: all of it"],
    )
    report = prepare(annotations, tmp_path / "m.jsonl")
    assert report.lines()[2:] == [
        "test: 5 listed videos have no caption and are left out: s0, s1, s2, ...",
        "1 videos with captions are in no split: u",
        "leaking: all of it",
    ]
    written = json.loads((tmp_path / "m.report.json").read_text())
    assert written["uncaptioned"] == {"test": ["s0", "s1", "s2", "s3", "s4"]}
    assert written["manifest"] == "m.jsonl"
    assert written["splits"]["train"]["missing_videos"] == ["/no/a.mp4"]


def named(*clips: Clip) -> Annotations:
    listed = {split: [c.id for c in clips if c.split == split] for split in ("train", "val", "test")}
    return Annotations(clips=list(clips), protocol="msrvtt full", listed=listed)


def test_a_copy_that_differs_from_its_protocol_is_written_and_reported(tmp_path):
    report = prepare(named(clip("video1", "x"), clip("other", "y")), tmp_path / "m.jsonl", val=1)
    assert "protocol msrvtt full differs: train: expected 6513 videos, found 2" in report.lines()
    assert (
        "protocol msrvtt full differs: train: 6512 ids missing: video0, video2, video3, video4, video5, ..."
        in report.lines()
    )
    assert "protocol msrvtt full differs: train: 1 ids extra: other" in report.lines()
    assert json.loads((tmp_path / "m.report.json").read_text())["differences"] == list(report.differences)


def test_strict_refuses_a_copy_that_differs(tmp_path):
    with pytest.raises(
        ValueError, match="protocol msrvtt full differs: train: expected 6513 videos, found 1"
    ):
        prepare(named(clip("video1", "x")), tmp_path / "m.jsonl", strict=True)
    assert not list(tmp_path.iterdir())


def test_a_whole_copy_agrees_with_its_protocol(tmp_path):
    splits = ["train"] * 6513 + ["val"] * 497 + ["test"] * 2990
    clips = [clip(f"video{i}", *"abcdefghijklmnopqrst", split=s) for i, s in enumerate(splits)]
    report = prepare(named(*clips), tmp_path / "m.jsonl", strict=True)
    assert report.lines()[-1] == "protocol msrvtt full: every known count and checksum agrees"


@pytest.mark.parametrize("words", [["OUT"], ["--out", "OUT"], ["OUT/manifest.jsonl"]], ids=str)
def test_the_command_takes_a_folder_or_a_manifest(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.mp4").write_bytes(b"x")
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    assert main(["prepare", "folder", ".", *words]) == 0
    assert read_manifest(tmp_path / "OUT/manifest.jsonl")[0].captions == ("one", "two")
    assert (tmp_path / "OUT/manifest.report.json").is_file()
    assert "train: 1 clips, 2 captions" in capsys.readouterr().out


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(["prepare", "msvd", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "expected raw-captions.pkl or captions_msvd.json, found none" in capsys.readouterr().err
    (tmp_path / "x.csv").write_text("video,caption\nx.mp4,one\n")
    assert main(["prepare", "csv", str(tmp_path / "x.csv")]) == 2
    assert "OUT: expected one place to write to, found 0" in capsys.readouterr().err


KILLED = """
import os, pathlib, sys
from discovla.cli import main
replace, left = pathlib.Path.replace, [int(sys.argv[1])]
def killed(path, target):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return replace(path, target)
pathlib.Path.replace = killed
main(["prepare", "csv", "clips.csv", "out"])
"""


@pytest.mark.parametrize("written", [0, 1], ids=["before the manifest", "before the report"])
def test_prepare_that_was_killed_gives_the_same_bytes_again(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips.csv").write_text("video,caption\n" + "".join(f"{i}.mp4,c {i}\n" for i in range(100)))
    run = subprocess.run([sys.executable, "-c", KILLED, str(written)], cwd=tmp_path, check=False)
    assert run.returncode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("manifest.jsonl" in names) == bool(written)
    assert "manifest.report.json" not in names
    assert any(name.endswith(".part") for name in names)
    assert main(["prepare", "csv", "clips.csv", "out"]) == 0
    assert main(["prepare", "csv", "clips.csv", "whole"]) == 0
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("out", "whole")]
    assert contents[0] == contents[1]
