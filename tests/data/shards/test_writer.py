"""Writing shards: their bytes, their indices, and runs that are interrupted."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from discovla.cli import main
from discovla.data.manifest import read_manifest
from discovla.data.shards import writer
from discovla.data.shards.layout import QUARANTINE, ShardSettings
from discovla.data.shards.writer import write_shards
from discovla.data.tokens import Tokenizer
from tests.data.shards.world import (
    FRAMES,
    SIZE,
    contents,
    decoded_clips,
    make_manifest,
    make_shards,
    sharding,
)
from tests.holders import holder


@pytest.fixture(scope="module")
def world(tmp_path_factory, cut_off) -> Path:
    return make_manifest(tmp_path_factory.mktemp("shards"), cut_off)


@pytest.fixture(scope="module")
def raw(tmp_path_factory, world) -> Path:
    out = tmp_path_factory.mktemp("raw") / "shards"
    make_shards(world, out)
    return out


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {m.name: file.extractfile(m).read() for m in file.getmembers()}


def test_a_tar_has_captions_tokens_and_frames_of_its_clips(raw, world):
    clips = read_manifest(world)
    files = members(raw / "train-000000.tar")
    assert {name.split(".")[0] for name in files} == {"00000000", "00000001"}
    record = json.loads(files["00000001.json"])
    assert (record["id"], record["captions"]) == (clips[1].id, list(clips[1].captions))
    assert record["frame_captions"] == [list(clips[1].frame_captions[0]), None]
    assert (record["count"], record["indices"], record["shape"]) == (3, [0, 0, 1, 2], [SIZE, SIZE, 3])
    tokens = np.load(io.BytesIO(files["00000001.tokens.npy"]))
    expected = Tokenizer(12).encode(clips[1].captions)[0].numpy()
    assert tokens.dtype == np.uint16
    assert (expected[:, : tokens.shape[1]] == tokens).all()
    assert not expected[:, tokens.shape[1] :].any()
    stills = np.load(io.BytesIO(files["00000001.frame_tokens.npy"]))
    assert stills.shape[:2] == (2, FRAMES)
    expected = Tokenizer(stills.shape[2]).encode(clips[1].frame_captions[0])[0].numpy()
    assert (stills[0] == expected).all()
    assert not stills[1].any()
    frames = np.load(io.BytesIO(files["00000001.frames.npy"]))
    assert (frames.shape, frames.dtype) == ((FRAMES, SIZE, SIZE, 3), np.uint8)
    assert (frames[0] == frames[1]).all()
    assert not (frames[1] == frames[2]).all()


def test_every_split_has_its_own_tars_and_every_clip_a_line_in_the_index(raw, world):
    assert [p.name for p in sorted(raw.glob("*.tar"))] == [
        *(f"train-00000{i}.tar" for i in range(3)),
        "val-000000.tar",
    ]
    lines = [json.loads(line) for line in (raw / "clips.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [clip.id for clip in read_manifest(world)]
    assert not list(raw.rglob("*.part*"))


def test_the_dali_index_lists_every_member_of_a_tar(raw):
    for index in raw.glob("*.idx"):
        version, *lines = index.read_text().splitlines()
        assert version == f"v1.2 {len(lines)}"
        with tarfile.open(index.with_suffix(".tar")) as tar:
            expected = [(m.name.partition(".")[2], m.offset_data, m.size, m.name) for m in tar.getmembers()]
        words = " ".join(lines).split()
        groups = zip(*[iter(words)] * 4, strict=True)
        assert [(name, int(at), int(size), whole) for name, at, size, whole in groups] == expected


def test_the_dali_index_equals_that_of_wds2idx(raw, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="needs nvidia-dali, whose tool it is compared with")
    tar = raw / "train-000000.tar"
    with wds2idx.IndexCreator(str(tar), str(tmp_path / "index"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "index").read_bytes() == tar.with_suffix(".idx").read_bytes()


def test_a_clip_without_frames_is_listed_with_the_reason_and_has_no_samples(raw, world):
    bad = [json.loads(line) for line in (raw / QUARANTINE).read_text().splitlines()]
    assert [row["id"] for row in bad] == ["text", "cut"]
    assert "not a video file" in bad[0]["reason"]
    assert "damaged" in bad[1]["reason"]
    lines = {row["id"]: row for row in map(json.loads, (raw / "clips.jsonl").read_text().splitlines())}
    assert "first" not in lines["text"]
    assert lines["text"]["bad"] == bad[0]["reason"]
    assert len(members(raw / "train-000002.tar")) == 0


def test_worker_processes_write_the_same_bytes_and_a_finished_folder_stays_untouched(raw, world, tmp_path):
    report = make_shards(world, tmp_path / "out", workers=1)
    assert report.decoded == len(read_manifest(world))
    assert contents(tmp_path / "out") == contents(raw)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.*") if p.is_file()}
    again = make_shards(world, tmp_path / "out")
    assert (again.decoded, again.clips, len(again.bad)) == (0, 5, 2)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.*") if p.is_file()}
    assert contents(tmp_path / "out") == contents(raw)


def test_a_run_interrupted_after_any_clip_continues_with_the_next(raw, world, tmp_path, monkeypatch):
    clips, seen = read_manifest(world), []
    decode = writer.read_frames

    def interrupted(path, *rest, **options):
        if len(seen) % 3 == 2:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(path)
        return decode(path, *rest, **options)

    monkeypatch.setattr(writer, "read_frames", interrupted)
    for _ in range(10):
        try:
            make_shards(world, tmp_path / "out")
        except KeyboardInterrupt:
            continue
        break
    assert sorted(path for path in seen if path) == sorted(clip.video for clip in clips)
    assert contents(tmp_path / "out") == contents(raw)


@pytest.mark.parametrize("step", ["_write_changed", "dali_index", "_write_tar", "_write_index"])
def test_a_run_interrupted_while_it_writes_loses_nothing(step, raw, world, tmp_path, monkeypatch):
    original, calls = getattr(writer, step), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(writer, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shards(world, tmp_path / "out")
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            make_shards(world, tmp_path / "out")
    make_shards(world, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(raw)


@pytest.mark.slow
def test_a_killed_run_continues_with_the_same_bytes_and_decodes_no_clip_twice(tmp_path):
    manifest, out = make_manifest(tmp_path / "many", count=24), tmp_path / "out"
    make_shards(manifest, tmp_path / "expected")
    decoded = []
    for clips in (3, 9):
        with sharding(manifest, out) as process:
            deadline = time.monotonic() + 180
            while len(decoded_clips(out)) < clips:
                assert process.poll() is None and time.monotonic() < deadline, "ended before it was killed"
                time.sleep(0.005)
        decoded.append(len(decoded_clips(out)))
    with sharding(manifest, out) as process:
        last, _ = process.communicate(timeout=180)
    assert int(last) == 25 - decoded[-1]
    assert 3 <= decoded[0] < decoded[1] < 25
    assert contents(out) == contents(tmp_path / "expected")


def test_a_damaged_part_file_is_decoded_again(raw, world, tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_write_tar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shards(world, tmp_path / "out")
    monkeypatch.undo()
    first, _ = sorted((tmp_path / "out/.state/parts").glob("0*"))
    first.write_bytes(first.read_bytes()[:-1])
    assert make_shards(world, tmp_path / "out").decoded == len(read_manifest(world)) - 1
    assert contents(tmp_path / "out") == contents(raw)


def test_a_tar_that_is_cut_off_changed_or_missing_is_written_again(raw, world, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(raw, out)
    first, second = (out / f"train-00000{i}.tar" for i in range(2))
    first.write_bytes(first.read_bytes()[:3000])
    (out / "val-000000.tar").unlink()
    assert make_shards(world, out).decoded == 3
    assert contents(out) == contents(raw)
    content = bytearray(second.read_bytes())
    content[2000] ^= 1
    second.write_bytes(content)
    assert make_shards(world, out).decoded == 0
    assert make_shards(world, out, verify=True).decoded == 2
    assert contents(out) == contents(raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 3}, "frames: expected 4, as in its other shards, found 3"),
        ({"format": "jpeg"}, "format: expected 'raw', as in its other shards, found 'jpeg'"),
    ],
    ids=["frames", "format"],
)
def test_a_folder_of_other_settings_is_refused(changes, message, raw, world):
    with pytest.raises(ValueError, match=message):
        make_shards(world, raw, **changes)


def test_a_folder_of_another_manifest_or_of_other_files_is_refused(raw, tmp_path):
    manifest = make_manifest(tmp_path / "other", count=2)
    with pytest.raises(ValueError, match="its shards are of another manifest"):
        make_shards(manifest, raw)
    with pytest.raises(ValueError, match="expected an empty folder or one of shards"):
        make_shards(manifest, tmp_path / "other")


def test_a_folder_to_which_another_process_writes_is_refused_until_that_has_ended(tmp_path, caplog):
    manifest, out = make_manifest(tmp_path, count=2), tmp_path / "out"
    with holder(out, "discovla shard") as other:
        with pytest.raises(ValueError, match=rf"another discovla shard \(process {other.pid} on "):
            make_shards(manifest, out)
        assert [path.name for path in out.iterdir()] == ["writer.lock"]
    make_shards(manifest, out)
    assert "has ended without releasing the lock" in caplog.text
    assert not (out / "writer.lock").exists()


def test_a_process_that_lost_its_lock_writes_no_further_tar(tmp_path, monkeypatch):
    manifest, out = make_manifest(tmp_path, count=2), tmp_path / "out"
    decode = writer._decode_clip

    def taken(part):
        decode(part)
        (out / "writer.lock").write_text("{}")  # by another, while this one was suspended

    monkeypatch.setattr(writer, "_decode_clip", taken)
    with pytest.raises(ValueError, match="expected the lock of this process, found a process that left no"):
        make_shards(manifest, out, workers=0)
    assert not list(out.glob("*.tar"))


def test_a_manifest_without_any_frames_is_an_error(tmp_path):
    manifest = make_manifest(tmp_path, count=0)
    with pytest.raises(ValueError, match="none of 1 clips has frames, the first: not a video file"):
        make_shards(manifest, tmp_path / "out")


def test_a_full_disk_stops_the_run(world, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(writer, "_write_part", full)
    with pytest.raises(OSError, match="No space left"):
        make_shards(world, tmp_path / "out")


def test_the_command_takes_frames_and_size_from_a_config(world, tmp_path, capsys):
    words = [
        "shard",
        str(world),
        str(tmp_path / "out"),
        "--config",
        "configs/quickstart.toml",
        "--workers",
        "1",
    ]
    assert main([*words, "--sample-rate", "5"]) == 0
    record = capsys.readouterr().out
    assert "2 clips have no frames; all are in" in record
    assert "5 clips in 2 shards" in record
    settings = json.loads((tmp_path / "out/shards.json").read_text())["settings"]
    assert (settings["frames"], settings["size"], settings["sample_rate"]) == (8, 64, 5.0)
    assert main([*words, "--size", "large"]) == 2
    assert "--size: expected pixels or 'full', found 'large'" in capsys.readouterr().err


def test_a_clip_that_takes_too_long_is_listed_with_the_reason(tmp_path):
    manifest = make_manifest(tmp_path, count=0)
    settings = ShardSettings(frames=FRAMES, size=SIZE, sample_rate=5.0)
    with pytest.raises(ValueError, match="none of 1 clips has frames, the first: took longer than 1e-06 s"):
        write_shards(manifest, tmp_path / "out", settings, workers=1, limit=1e-6)
