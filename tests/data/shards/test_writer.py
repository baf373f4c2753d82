"""Shards as they are written: their bytes, their indices, and runs that were stopped."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
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
from tests.data.shards.world import FRAMES, SIZE, contents, make_manifest, make_shards


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


def test_a_tar_holds_captions_tokens_and_frames_of_its_clips(raw, world):
    clips = read_manifest(world)
    found = members(raw / "train-000000.tar")
    assert {name.split(".")[0] for name in found} == {"00000000", "00000001"}
    told = json.loads(found["00000001.json"])
    assert (told["id"], told["captions"]) == (clips[1].id, list(clips[1].captions))
    assert told["frame_captions"] == [list(clips[1].frame_captions[0]), None]
    assert (told["count"], told["indices"], told["shape"]) == (3, [0, 0, 1, 2], [SIZE, SIZE, 3])
    tokens = np.load(io.BytesIO(found["00000001.tokens.npy"]))
    wanted = Tokenizer(12).encode(clips[1].captions)[0].numpy()
    assert tokens.dtype == np.uint16
    assert (wanted[:, : tokens.shape[1]] == tokens).all()
    assert not wanted[:, tokens.shape[1] :].any()
    stills = np.load(io.BytesIO(found["00000001.frame_tokens.npy"]))
    assert stills.shape[:2] == (2, FRAMES)
    wanted = Tokenizer(stills.shape[2]).encode(clips[1].frame_captions[0])[0].numpy()
    assert (stills[0] == wanted).all()
    assert not stills[1].any()
    frames = np.load(io.BytesIO(found["00000001.frames.npy"]))
    assert (frames.shape, frames.dtype) == ((FRAMES, SIZE, SIZE, 3), np.uint8)
    assert (frames[0] == frames[1]).all()
    assert not (frames[1] == frames[2]).all()


def test_every_split_has_its_own_tars_and_every_clip_its_own_line(raw, world):
    assert [p.name for p in sorted(raw.glob("*.tar"))] == [
        *(f"train-00000{i}.tar" for i in range(3)),
        "val-000000.tar",
    ]
    lines = [json.loads(line) for line in (raw / "clips.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [clip.id for clip in read_manifest(world)]
    assert not list(raw.rglob("*.part*"))


def test_the_index_names_every_member_of_a_tar(raw):
    for index in raw.glob("*.idx"):
        version, *lines = index.read_text().splitlines()
        assert version == f"v1.2 {len(lines)}"
        with tarfile.open(index.with_suffix(".tar")) as tar:
            wanted = [(m.name.partition(".")[2], m.offset_data, m.size, m.name) for m in tar.getmembers()]
        words = " ".join(lines).split()
        groups = zip(*[iter(words)] * 4, strict=True)
        assert [(name, int(at), int(size), whole) for name, at, size, whole in groups] == wanted


def test_the_index_is_that_of_dali(raw, tmp_path):
    wds2idx = pytest.importorskip("wds2idx", reason="needs nvidia-dali, whose tool it is compared with")
    tar = raw / "train-000000.tar"
    with wds2idx.IndexCreator(str(tar), str(tmp_path / "index"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "index").read_bytes() == tar.with_suffix(".idx").read_bytes()


def test_a_clip_without_frames_is_named_and_gets_no_zeros(raw, world):
    bad = [json.loads(line) for line in (raw / QUARANTINE).read_text().splitlines()]
    assert [row["id"] for row in bad] == ["text", "cut"]
    assert "not a video file" in bad[0]["reason"]
    assert "damaged" in bad[1]["reason"]
    lines = {row["id"]: row for row in map(json.loads, (raw / "clips.jsonl").read_text().splitlines())}
    assert "first" not in lines["text"]
    assert lines["text"]["bad"] == bad[0]["reason"]
    assert len(members(raw / "train-000002.tar")) == 0


def test_a_process_writes_what_this_one_writes_and_a_finished_folder_is_left_alone(raw, world, tmp_path):
    report = make_shards(world, tmp_path / "out", workers=1)
    assert report.decoded == len(read_manifest(world))
    found = contents(tmp_path / "out")
    assert found == contents(raw)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*")}
    again = make_shards(world, tmp_path / "out")
    assert (again.decoded, again.clips, len(again.bad)) == (0, 5, 2)
    assert {
        p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*") if p.is_file()
    }.items() <= times.items()
    assert contents(tmp_path / "out") == found


def test_a_run_stopped_after_any_clip_goes_on_with_the_next(raw, world, tmp_path, monkeypatch):
    clips, seen = read_manifest(world), []
    decode = writer.read_frames

    def stopped(path, *rest, **options):
        if len(seen) % 3 == 2:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(path)
        return decode(path, *rest, **options)

    monkeypatch.setattr(writer, "read_frames", stopped)
    for _ in range(10):
        try:
            make_shards(world, tmp_path / "out")
        except KeyboardInterrupt:
            continue
        break
    assert sorted(path for path in seen if path) == sorted(clip.video for clip in clips)
    assert contents(tmp_path / "out") == contents(raw)


@pytest.mark.parametrize("step", ["_write_atomically", "dali_index", "_write_tar", "_write_index"])
def test_a_run_stopped_while_it_writes_loses_nothing(step, raw, world, tmp_path, monkeypatch):
    original, calls = getattr(writer, step), []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(writer, step, stopped)
    with pytest.raises(KeyboardInterrupt):
        make_shards(world, tmp_path / "out")
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            make_shards(world, tmp_path / "out")
    make_shards(world, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(raw)


@pytest.mark.slow
def test_a_killed_run_taken_up_again_writes_the_same_bytes_and_decodes_nothing_twice(tmp_path, raw):
    manifest = make_manifest(tmp_path / "many", count=24)
    wanted, out = tmp_path / "wanted", tmp_path / "out"
    make_shards(manifest, wanted)
    code = (
        "import sys; from pathlib import Path; from tests.data.shards.world import make_shards;"
        "print(make_shards(Path(sys.argv[1]), Path(sys.argv[2]), workers=2).decoded)"
    )
    command = [sys.executable, "-c", code, str(manifest), str(out)]
    decoded = []
    for parts in (3, 9):
        process = subprocess.Popen(command, cwd=Path(__file__).parents[3], start_new_session=True)
        _wait_for_clips(out, parts, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        decoded.append(_clips_there(out))
    left = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert int(left.stdout) == 25 - decoded[-1]
    assert 3 <= decoded[0] < decoded[1] < 25
    assert contents(out) == contents(wanted)


def _clips_there(out: Path) -> int:
    """Clips that are decoded: in shards, and in parts on their way there."""
    states = [json.loads(path.read_text()) for path in (out / ".state").glob("*-*.json")]
    done = {row["number"] for state in states for row in state["clips"]}
    parts = {int(p.name) for p in (out / ".state/parts").glob("*") if not p.name.startswith(".")}
    return len(done | parts)


def _wait_for_clips(out: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not (out / ".state/plan.json").exists() or _clips_there(out) < number:
        assert process.poll() is None and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.005)


def test_a_tar_that_is_cut_off_changed_or_gone_is_made_again(raw, world, tmp_path):
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
def test_a_folder_begun_otherwise_is_refused(changes, message, raw, world):
    with pytest.raises(ValueError, match=message):
        make_shards(world, raw, **changes)


def test_a_folder_of_other_clips_or_other_files_is_refused(raw, tmp_path):
    manifest = make_manifest(tmp_path / "other", count=2)
    with pytest.raises(ValueError, match="its shards are of another manifest"):
        make_shards(manifest, raw)
    with pytest.raises(ValueError, match="expected an empty folder or one of shards"):
        make_shards(manifest, tmp_path / "other")
    held = tmp_path / "held"
    make_shards(manifest, held)
    code = (
        f"import fcntl, sys; f = open({str(held / '.state/lock')!r}); fcntl.flock(f, 2);"
        "print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process writes shards there"):
            make_shards(manifest, held)
        other.stdin.close()


def test_clips_that_all_give_nothing_are_an_error(tmp_path):
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
    told = capsys.readouterr().out
    assert "2 clips give no frames; all are in" in told
    assert "5 clips in 2 shards" in told
    settings = json.loads((tmp_path / "out/shards.json").read_text())["settings"]
    assert (settings["frames"], settings["size"], settings["sample_rate"]) == (8, 64, 5.0)
    assert main([*words, "--size", "large"]) == 2
    assert "--size: expected pixels or 'full', found 'large'" in capsys.readouterr().err


def test_a_clip_that_takes_too_long_is_named(tmp_path):
    manifest = make_manifest(tmp_path, count=0)
    settings = ShardSettings(frames=FRAMES, size=SIZE, sample_rate=5.0)
    with pytest.raises(ValueError, match="none of 1 clips has frames, the first: took longer than 1e-06 s"):
        write_shards(manifest, tmp_path / "out", settings, workers=1, limit=1e-6)
