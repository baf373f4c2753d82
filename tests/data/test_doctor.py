"""The doctor's verdicts, its resuming, and what training does with its list."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from discovla.cli import main
from discovla.data import doctor
from discovla.data.dali import reader as dali
from discovla.data.doctor import Diagnosis, ExamineOptions, ExamineRequest, diagnose, examine
from discovla.data.manifest import Clip, read_manifest, write_manifest
from discovla.data.quarantine import Quarantine, without_quarantined
from discovla.data.sampling import Sampling
from discovla.data.video import frames, torchcodec
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import DecoderName, read_frames
from discovla.data.video.index import FrameIndexStore, default_index_dir
from tests import runs
from tests.data.damaged_clips import HEADER, compare, draw_sources, write_damaged
from tests.data.odd_clips import KINDS, Kind, odd_clip
from tests.data.sandbox_tasks import examination
from tests.data.test_sandbox import children, ended

OPTIONS = ExamineOptions(sampling=Sampling(frames=4), seconds=20, workers=1)


def clip(path: Path, name: str = "", **span: float) -> Clip:
    return Clip(id=name or path.name, video=path, captions=("x",), split="train", **span)  # type: ignore[arg-type]


def by_name(found: Diagnosis) -> dict[str, dict]:
    return {Path(row["video"]).name: row for row in found.files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, counting, cut_off) -> Path:
    """Good, odd and broken files."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "counting.mp4").write_bytes(counting.read_bytes())
    (folder / "cut.mp4").write_bytes(cut_off.read_bytes())
    (folder / "text.mp4").write_text("a text named .mp4")
    (folder / "empty.mp4").touch()
    for name in ("variable-rate", "turned", "flat-pixels", "two-streams", "one-frame", "vp9"):
        odd_clip(folder, name)
    return folder


def clips_of(folder: Path) -> list[Clip]:
    return [clip(path) for path in sorted(folder.iterdir())] + [clip(folder / "gone.mp4")]


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory) -> Diagnosis:
    return diagnose(clips_of(folder), tmp_path_factory.mktemp("out"), OPTIONS)


def test_every_file_has_its_verdict_and_facts(found):
    rows = by_name(found)
    assert {name: row["kind"] for name, row in rows.items() if row["kind"] != "ok"} == {
        "cut.mp4": "damaged",
        "empty.mp4": "refused",
        "gone.mp4": "refused",
        "text.mp4": "refused",
    }
    assert all(bool(row["reason"]) == (row["kind"] != "ok") for row in rows.values())
    plain = rows["counting.mp4"]
    facts = {"codec": "h264", "width": 64, "height": 64, "count": 20, "declared_count": 20, "keys": 2}
    times = {"rate": 10.0, "declared_rate": 10.0, "duration": 2.0, "gaps": [0.1, 0.1], "rotation": 0}
    assert {name: plain[name] for name in facts | times} == facts | times
    assert plain["declared_duration"] == pytest.approx(2.0, abs=0.11)
    assert rows["vp9.webm"]["codec"] == "vp9"
    assert (rows["turned.mp4"]["width"], rows["turned.mp4"]["coded_width"]) == (64, 80)
    assert rows["two-streams.mp4"]["streams"] == 2
    assert rows["cut.mp4"]["count"] < rows["cut.mp4"]["declared_count"] == 20


def test_what_is_unusual_is_said(found):
    rows = by_name(found)
    assert rows["counting.mp4"]["unusual"] == rows["vp9.webm"]["unusual"] == []
    assert "variable rate" in rows["variable-rate.mp4"]["unusual"]
    assert rows["turned.mp4"]["unusual"] == ["turned"]
    assert rows["flat-pixels.mp4"]["unusual"] == ["pixels not square"]
    assert rows["two-streams.mp4"]["unusual"] == ["several video streams"]
    assert rows["one-frame.mp4"]["unusual"] == ["one frame"]
    assert "declares another number of frames" in rows["cut.mp4"]["unusual"]


def test_a_true_rate_differs_from_the_one_declared(tmp_path, monkeypatch):
    slow = Kind(suffix=".mkv", times=lambda i: i * 200, count=10)  # its header says 10 a second
    monkeypatch.setitem(KINDS, "slow", slow)
    found = diagnose([clip(odd_clip(tmp_path, "slow"))], tmp_path / "out", OPTIONS).files[0]
    assert (found["rate"], found["declared_rate"]) == (5.0, 10.0)
    assert found["unusual"] == ["declares another rate"]


def test_the_list_and_the_summary_name_every_broken_clip(found):
    names = {"cut.mp4", "empty.mp4", "gone.mp4", "text.mp4"}
    rows = [json.loads(line) for line in found.quarantine.read_text().splitlines()]
    assert {row["id"] for row in rows} == {name for name, _, _ in found.broken} == names
    assert all(set(row) == {"id", "video", "reason"} for row in rows)
    text = "\n".join(found.lines())
    assert "11 files, 11 clips: 7 ok, 1 damaged, 3 refused" in text
    assert "codec      h264 7, vp9 1" in text
    assert "4 of 11 clips give no frames:" in text
    for row in rows:
        assert f"{row['id']}  ({row['video']}): {row['reason']}" in text


def test_clips_are_judged_by_their_own_part_of_a_file(folder, tmp_path):
    path = folder / "counting.mp4"
    clips = [clip(path, "all"), clip(path, "part", start=0.5, end=1.0), clip(path, "late", start=30.0)]
    found = diagnose(clips, tmp_path, OPTIONS)
    assert len(found.files) == 1
    assert [(name, reason) for name, _, reason in found.broken] == [
        ("late", "start: expected a time before the end of the clip (2.000 s, 20 frames), found 30 s")
    ]


def test_what_breaks_off_is_no_fault_where_it_is_used(folder, tmp_path):
    options = ExamineOptions(sampling=OPTIONS.sampling, damaged="use", seconds=20)
    found = diagnose([clip(folder / "cut.mp4")], tmp_path, options)
    assert (found.files[0]["kind"], found.broken) == ("damaged", ())


def test_a_decoder_that_hangs_or_crashes_costs_its_own_file_alone(folder, tmp_path, monkeypatch):
    before = children()
    monkeypatch.setattr(doctor, "examine", examination)
    clips = [clip(folder / "counting.mp4")]
    for name in ("hang in native code", "crash", "raise", "fine"):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes((folder / "counting.mp4").read_bytes())
        clips.append(clip(path))
    found = diagnose(clips, tmp_path / "out", ExamineOptions(sampling=OPTIONS.sampling, seconds=2))
    assert {name: reason for name, _, reason in found.broken} == {
        "hang in native code.mp4": "decoding it took longer than 2 s",
        "crash.mp4": "decoding it its process died of SIGSEGV",
        "raise.mp4": "ValueError: not this one",
    }
    assert children() <= before


def test_files_that_have_not_changed_are_not_opened_again(folder, tmp_path, monkeypatch):
    clips = [clip(tmp_path / f"{i}.mp4") for i in range(4)]
    for one in clips[:3]:
        one.video.write_bytes((folder / "counting.mp4").read_bytes())
    asked: list[str] = []

    def listened(work, items, **options):
        items = list(items)
        asked.extend(item.path.name for item in items)
        return run_sandboxed(work, items, **options)

    run_sandboxed = doctor.run_sandboxed
    monkeypatch.setattr(doctor, "run_sandboxed", listened)
    diagnose(clips, tmp_path / "out", OPTIONS)
    assert asked == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    content = (tmp_path / "out/files.jsonl").read_bytes()
    (tmp_path / "out/files.jsonl").write_bytes(content[:-20])  # the last line was not written to its end
    clips[0].video.write_bytes((folder / "cut.mp4").read_bytes())
    asked.clear()
    found = diagnose(clips, tmp_path / "out", OPTIONS)
    assert asked == ["0.mp4", "3.mp4"]
    assert [row["kind"] for row in found.files] == ["damaged", "ok", "ok", "refused"]
    asked.clear()
    diagnose(clips, tmp_path / "out", ExamineOptions(sampling=Sampling(frames=5), seconds=20, workers=1))
    assert len(asked) == 4


def test_a_run_finds_the_indices_of_all_files(folder, tmp_path, monkeypatch):
    videos = [tmp_path / name for name in ("counting.mp4", "cut.mp4")]
    for video in videos:
        video.write_bytes((folder / video.name).read_bytes())
    write_manifest(tmp_path / "m.jsonl", [clip(video) for video in videos])
    words = ["doctor", str(tmp_path / "m.jsonl"), "--workers", "1", "--frames", "4"]
    assert main(words) == main([*words, "--index-dir", str(tmp_path / "indices")]) == 0
    monkeypatch.setattr(frames, "decode_through", None)
    for store in (FrameIndexStore(tmp_path / "indices"), FrameIndexStore(default_index_dir())):
        assert read_frames(videos[0], Sampling(frames=4), store=store).count == 20
        with pytest.raises(DecodeError, match="damaged: "):
            read_frames(videos[1], Sampling(frames=4), store=store)


def other_decoder(monkeypatch, change) -> None:
    """Have torchcodec give frames that PyAV decodes, changed."""

    def decode(path, index, numbers, transform):
        return change(frames.pyav.decode_frames(path, index, numbers, transform))

    monkeypatch.setattr(torchcodec, "decode_frames", decode)


def other(images: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    return {number: image + np.uint8(number == 6) for number, image in images.items()}


def test_another_decoder_is_compared_with_pyav_frame_by_frame(folder, monkeypatch):
    path = folder / "counting.mp4"
    request = ExamineRequest(
        path=path, samplings=(Sampling(frames=4, sample_rate=10.0),), decoder="torchcodec"
    )
    other_decoder(monkeypatch, lambda images: images)
    assert examine(request)["clips"] == [None]
    other_decoder(monkeypatch, other)
    assert examine(request)["clips"] == ["decoder = 'torchcodec' gives another frame 6 than PyAV"]


@pytest.mark.skipif(torchcodec.missing() is not None, reason=str(torchcodec.missing()))
def test_files_that_another_decoder_refuses_are_listed(tmp_path):
    names = ("long-gop", "ten-bit")
    write_manifest(tmp_path / "m.jsonl", [clip(odd_clip(tmp_path, name), name) for name in names])
    words = ["doctor", str(tmp_path / "m.jsonl"), "--workers", "1", "--decoder", "torchcodec"]
    assert main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "m.doctor/quarantine.jsonl").open()]
    assert [row["id"] for row in rows] == ["ten-bit"]
    assert rows[0]["reason"].startswith("cannot be read by decoder = 'torchcodec': it has 10 bits")


def test_a_record_of_something_else_is_refused(folder, tmp_path):
    (tmp_path / "files.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"files.jsonl:1: expected a row of the doctor; remove"):
        diagnose([clip(folder / "counting.mp4")], tmp_path, OPTIONS)


KILLED = """
import os
from pathlib import Path
from discovla.data import doctor
from discovla.data.dali import reader as dali
from discovla.data.video import torchcodec
from discovla.data.manifest import read_manifest
from discovla.data.sampling import Sampling
run_sandboxed = doctor.run_sandboxed
def killed(*words, **options):
    for number, outcome in enumerate(run_sandboxed(*words, **options)):
        if number == 5:
            os.kill(os.getpid(), 9)
        yield outcome
doctor.run_sandboxed = killed
options = doctor.ExamineOptions(sampling=Sampling(frames=4), seconds=20)
doctor.diagnose(read_manifest("manifest.jsonl"), "out", options)
"""


def test_a_doctor_that_was_killed_goes_on_and_leaves_no_process(folder, tmp_path):
    clips = [clip(path) for path in sorted(folder.iterdir())]
    write_manifest(tmp_path / "manifest.jsonl", clips)
    run = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path)
    started: set[int] = set()
    while run.poll() is None:
        started |= _children_of(run.pid)
        time.sleep(0.02)
    assert run.returncode == -signal.SIGKILL
    assert started
    assert all(ended(pid) for pid in started)
    before = (tmp_path / "out/files.jsonl").read_text().splitlines()
    assert len(before) == 5
    diagnose(clips, tmp_path / "out", OPTIONS)
    diagnose(clips, tmp_path / "whole", OPTIONS)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("out", "whole")]
    assert contents[0] == contents[1]
    after = contents[0]["files.jsonl"].decode().splitlines()
    assert set(before) < set(after)
    assert len(after) == len(clips)


def _children_of(pid: int) -> set[int]:
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except (FileNotFoundError, ProcessLookupError):
        return set()


def test_the_command_is_strict_where_that_is_asked_for(folder, tmp_path, capsys):
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, [clip(folder / "counting.mp4"), clip(folder / "text.mp4")])
    words = ["doctor", str(manifest), "--workers", "1"]
    assert main(words) == 0
    assert "1 of 2 clips give no frames" in capsys.readouterr().out
    assert (tmp_path / "m.doctor/quarantine.jsonl").is_file()
    assert main([*words, "--strict"]) == 2
    assert "m.jsonl: 1 of 2 clips give no frames" in capsys.readouterr().err


def test_the_command_takes_what_a_run_samples(folder, tmp_path):
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, [clip(folder / "one-frame.mp4")])
    config = Path(__file__).parents[2] / "configs/clip2video_msrvtt.toml"
    assert main(["doctor", str(manifest), "--workers", "1", "--config", str(config)]) == 0
    rows = (tmp_path / "m.doctor/quarantine.jsonl").read_text()
    assert "sampling_divisor: expected at most the 1 frames stored" in rows


def test_training_leaves_the_listed_clips_out(found, folder, tmp_path, caplog):
    clips = clips_of(folder)
    kept = without_quarantined(clips, found.quarantine)
    assert {c.id for c in clips} - {c.id for c in kept} == {name for name, _, _ in found.broken}
    assert "4 of 11 clips are in quarantine" in caplog.text
    assert len(Quarantine(found.quarantine, clips=11, share=1).known) == 4  # the form training writes
    with pytest.raises(ValueError, match="expected a clip that is not in quarantine, found all 1 in it"):
        without_quarantined([clip(folder / "text.mp4")], found.quarantine)
    (tmp_path / "bad.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl:1: expected id, video and reason of a clip"):
        without_quarantined(clips, tmp_path / "bad.jsonl")


@pytest.mark.slow
def test_a_run_given_the_list_meets_no_bad_clip(drawn, tmp_path):
    clips = read_manifest(drawn)
    (tmp_path / "bad.mp4").write_text("no video")
    for i in (0, 3, 5):
        clips[i] = dataclasses.replace(clips[i], video=tmp_path / "bad.mp4")
    write_manifest(tmp_path / "m.jsonl", clips)
    assert (
        main(["doctor", str(tmp_path / "m.jsonl"), "--split", "train", "--workers", "1", "--frames", "8"])
        == 0
    )
    config = runs.write_config(tmp_path, drawn)
    none = [f"data.manifest={tmp_path}/m.jsonl", "data.bad_clip_share=0", "steps=1", "data.val_split="]
    job = runs.train([config, *none, f"data.quarantine={tmp_path}/m.doctor/quarantine.jsonl"])
    assert "3 of 24 clips are in quarantine" in job.output(rank=0)
    assert not (tmp_path / "run/quarantine.jsonl").exists()


def check_damaged(
    folder: Path,
    sources: list[Path],
    count: int,
    decoder: DecoderName = "pyav",
    *,
    black_is_wrong: bool = True,
) -> None:
    """Damaged copies of clips get one of three verdicts, and right frames or the reason of the doctor."""
    before = children()
    clips = write_damaged(sources, folder / "clips", count, seed=7)
    comparison = compare(clips, folder, decoder, black_is_wrong=black_is_wrong)
    assert set(comparison.verdicts) == {"ok", "damaged", "refused"}
    assert comparison.wrong == []
    assert children() <= before


def test_damaged_files_neither_crash_nor_hang_it_and_the_loader_agrees(tmp_path):
    check_damaged(tmp_path, draw_sources(tmp_path / "sources"), 60)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["pyav", "torchcodec", "dali"])
def test_damaged_files_give_no_other_frames_by_any_decoder(decoder, tmp_path):
    reason = {"torchcodec": torchcodec.missing, "dali": dali.missing}.get(decoder, lambda: None)()
    if reason is not None:
        pytest.skip(reason)
    sources = draw_sources(tmp_path / "sources")
    if decoder == "dali":  # what it decodes on a CPU
        sources = [path for path in sources if path.suffix in (".webm", ".mkv")]
    check_damaged(tmp_path, sources, 150, decoder)


@pytest.mark.slow
def test_realdata_damaged_files_neither_crash_nor_hang_it_and_the_loader_agrees(realdata, tmp_path):
    files = [path for path in sorted((realdata / "videos").rglob("*")) if path.is_file()]
    small = [path for path in files if HEADER < path.stat().st_size < 300_000]
    assert small
    check_damaged(tmp_path, small, 60, black_is_wrong=False)  # some of them begin with black frames


def test_realdata_every_file_gets_its_facts(realdata, tmp_path):
    rows = json.loads((realdata / "MANIFEST.json").read_text())["files"]
    facts = {str(realdata / row["file"]): row["facts"] for row in rows if row["file"].startswith("videos/")}
    clips = [clip(Path(path), path) for path in facts]
    found = diagnose(
        clips, tmp_path, ExamineOptions(sampling=Sampling(frames=2), seconds=120, workers=os.cpu_count() or 1)
    )
    assert len(found.files) == len(facts)
    for row in found.files:
        path, known = row["video"], facts[row["video"]]
        video = known.get("video") or {}
        count = video.get("decoded_frames") or 0
        assert row.get("count", 0) == count, path
        broken = video.get("decode_error") or known.get("demux_error")
        kind = "refused" if not count else "damaged" if broken else "ok"
        assert (row["kind"], bool(row["reason"])) == (kind, kind != "ok"), path
        assert (row["clips"] == [None]) == (kind == "ok"), path
        if count:
            _agrees(row, video, path)


def _agrees(row: dict, video: dict, path: str) -> None:
    """The facts of one file that gives frames are those recorded."""
    assert row["codec"] == {"libdav1d": "av1"}.get(video["codec"], video["codec"]), path
    assert row["pixels"] == video["decoded_pix_fmts"][0], path
    turned = round(video["rotation_deg"] / 90) % 2 == 1
    width, height = video["decoded_sizes"][0]
    assert (row["width"], row["height"]) == ((height, width) if turned else (width, height)), path
    assert row["rotation"] == video["rotation_deg"], path
    assert row["declared_count"] == video["header_frames"], path
    assert row["declared_rate"] == pytest.approx(float(Fraction(video["avg_rate"])), rel=1e-5), path
    if count := row["count"] - 1:
        span = video["last_pts_s"] - video["first_pts_s"]
        assert row["rate"] == pytest.approx(count / span, rel=1e-3), path
        assert row["gaps"] == pytest.approx(video["pts_delta_min_max_s"], abs=2e-6), path
        assert ("variable rate" in row["unusual"]) >= bool(video["vfr"]), path
    assert ("turned" in row["unusual"]) == bool(video["rotation_deg"]), path
