"""Wrong input of a run is one line and exit status 2, before training if possible."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from torch.testing import assert_close

from discovla.cli import main
from discovla.data.manifest import Clip, read_manifest, write_manifest
from tests import runs
from tests.data.video.test_frames import audio_only, beheaded, empty, garbled, text


def without_frames(folder: Path) -> Path:
    """Write a file whose video stream has no frame."""
    path = folder / "no_frames.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    return path


FILES = {
    "truncated": beheaded,
    "undecodable": garbled,
    "not a video": text,
    "audio only": audio_only,
    "no frames": without_frames,
}
REASONS = {
    "no frames": "no frame decodes: the video stream is empty",
    "truncated": "truncated: an MP4 file without its index",
    "undecodable": "no frame decodes",
    "not a video": "not a video file",
    "audio only": "no video stream: audio only",
}


def error_line(job, status=(2,)):
    """Return the only error line of a run that was refused."""
    assert tuple(job.wait()) == status, job.output()
    lines = [line for line in job.output().splitlines() if line.startswith("train.py: error")]
    assert len(lines) == 1, job.output()
    assert lines == job.output().splitlines()[-1:], "something was printed after it"
    assert "Traceback" not in job.output()
    return lines[0]


def changed_manifest(drawn: Path, folder: Path, changes: dict[str, dict]) -> Path:
    """Write a manifest with other fields for some clips, named by split and position such as "train 3"."""
    count: dict[str, int] = {}
    clips: list[Clip] = []
    for clip in read_manifest(drawn):
        number = count[clip.split] = count.get(clip.split, -1) + 1
        clips.append(replace(clip, **changes.get(f"{clip.split} {number}", {})))
    write_manifest(folder / "changed.jsonl", clips)
    return folder / "changed.jsonl"


def refused(tmp_path, drawn, manifest, *words):
    """Return the error line of a run on `manifest` that is refused before training."""
    config = runs.write_config(tmp_path, drawn)
    line = error_line(runs.start([config, f"data.manifest={manifest}", *words]))
    assert not (tmp_path / "run/metrics.jsonl").exists(), "training began"
    return line


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_missing_video_is_refused_before_training(split, tmp_path, drawn):
    manifest = changed_manifest(drawn, tmp_path, {f"{split} 3": {"video": tmp_path / "none.mp4"}})
    line = refused(tmp_path, drawn, manifest)
    assert f"clip '{split}_00003': expected a video file, found nothing: {tmp_path}/none.mp4" in line


def test_an_empty_video_is_refused_before_training(tmp_path, drawn):
    manifest = changed_manifest(drawn, tmp_path, {"train 3": {"video": empty(tmp_path)}})
    assert f"expected a video file, found an empty one: {tmp_path}/empty.mp4" in refused(
        tmp_path, drawn, manifest
    )


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_caption_longer_than_the_context_is_refused_before_training(split, tmp_path, drawn):
    captions = (("red " * 40,) * (3 if split == "train" else 1),)
    manifest = changed_manifest(drawn, tmp_path, {f"{split} 2": {"captions": captions[0]}})
    line = refused(tmp_path, drawn, manifest)
    assert f"longer captions, the first of clip '{split}_00002' with 42: 'red red" in line


def test_frame_captions_of_the_wrong_number_are_refused_before_training(tmp_path, drawn):
    clip = read_manifest(drawn, split="train")[5]
    assert clip.frame_captions is not None
    captions = (clip.frame_captions[0], clip.frame_captions[1][:7], clip.frame_captions[2])
    manifest = changed_manifest(drawn, tmp_path, {"train 5": {"frame_captions": captions}})
    line = refused(tmp_path, drawn, manifest)
    assert "clip 'train_00005': frame captions of caption 1: expected 8, found 7" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line[:-5], "changed.jsonl:3: not JSON: "),
        (
            lambda line: json.dumps({**json.loads(line), "captions": ["a", " "]}),
            "changed.jsonl:3: captions[1]: expected a text that is not empty, found ' '",
        ),
    ],
    ids=["no JSON", "empty caption"],
)
def test_a_bad_manifest_line_is_named_by_file_and_line(change, message, tmp_path, drawn):
    manifest = changed_manifest(drawn, tmp_path, {})
    lines = manifest.read_text().split("\n")
    manifest.write_text("\n".join([*lines[:2], change(lines[2]), *lines[3:]]))
    assert message in refused(tmp_path, drawn, manifest)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], "small.toml: optim.lrr: unknown key; did you mean 'lr'?"),
        (
            ["data.manifest={tmp}/no.jsonl"],
            "{tmp}/no.jsonl: expected a manifest, found no file {tmp}/no.jsonl",
        ),
        (["data.context_length=40"], "data.context_length: expected at most 32, found 40"),
        (["batch_size=80"], "batch_size: expected at most the 72 training pairs, found 80"),
        (["model.architecture=ViT-Q"], "expected a name open_clip knows (such as ViT-B-32), found 'ViT-Q'"),
        (
            ["model.pretrained={tmp}/no.pt"],
            "{tmp}/no.pt: expected a file of CLIP weights (a state dict), found none",
        ),
        (
            ["model.architecture={tmp}/no.json"],
            "{tmp}/no.json: expected a model config in open_clip's form, found none",
        ),
        (["directory={tmp}/file/run"], "{tmp}/file/run: Not a directory"),
        (["data.cache={tmp}/cache"], "small.toml: data.cache: removed: "),
        (["engine.device=cuda"], "device: expected a GPU for local rank 0, found 0 GPUs here"),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_a_config_that_cannot_run_is_one_line(words, message, tmp_path, drawn):
    (tmp_path / "file").touch()
    config = runs.write_config(tmp_path, drawn)
    line = error_line(runs.start([config, *(word.format(tmp=tmp_path) for word in words)]))
    assert message.format(tmp=tmp_path) in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_batch_that_does_not_divide_is_one_line_for_all_ranks(tmp_path, drawn):
    job = runs.start([runs.write_config(tmp_path, drawn), "batch_size=15"], size=2)
    line = error_line(job, status=(2, 2))
    assert line == "train.py: error: batch_size: expected a multiple of the 2 processes, found 15"


def test_a_full_disk_names_the_checkpoint_and_the_run_can_be_resumed(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "checkpoint_every=2"]
    job = runs.start(words, fault="full:discovla.engine.checkpoint:_write_tensors:3")
    assert error_line(job) == (
        f"train.py: error: {tmp_path}/run/checkpoints/step-00000004: expected to write it, found: "
        "No space left on device: the disk is full, earlier checkpoints are untouched"
    )
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    runs.train([*words, "resume=true"])
    assert len(runs.losses(tmp_path / "run")) == 6


def test_a_full_disk_of_the_writing_rank_ends_the_others(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "checkpoint_every=2"]
    job = runs.start(words, size=2, fault="full:discovla.engine.checkpoint:_write_tensors:1")
    assert "step-00000002: expected to write it, found: No space left" in error_line(job, status=(2, 2))
    assert re.search(r"error \(rank 1\): rank 0 \(.*\) has ended before the run was over", job.output(rank=1))


def test_a_full_disk_names_the_run_directory_if_the_system_names_no_file(tmp_path, drawn):
    job = runs.start([runs.write_config(tmp_path, drawn)], fault="full:discovla.trainer:write_json:1")
    line = error_line(job)
    assert line == f"train.py: error: {tmp_path}/run: No space left on device"


def quarantined(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "run/quarantine.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows), "a clip is listed twice"
    return {row["id"]: row["reason"] for row in rows}


@pytest.fixture(scope="module")
def bad_clips(tmp_path_factory, drawn) -> Path:
    """Return a manifest with one undecodable training clip of each kind."""
    folder = tmp_path_factory.mktemp("bad")
    changes = {f"train {i}": {"video": make(folder)} for i, make in enumerate(FILES.values())}
    return changed_manifest(drawn, folder, changes)


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, drawn, bad_clips) -> Path:
    """Return the folder of a run of one process that skips them."""
    folder = tmp_path_factory.mktemp("skipping")
    config = runs.write_config(folder, drawn)
    runs.train([config, f"data.manifest={bad_clips}", "data.bad_clip_share=0.5", "checkpoint_every=1"])
    return folder


def test_clips_that_do_not_decode_are_skipped_with_their_reasons(skipping):
    found = quarantined(skipping)
    assert len(found) == len(FILES)
    for i, kind in enumerate(FILES):
        assert found[f"train_{i:05d}"].startswith(REASONS[kind]), kind
    counts = [record.get("bad_clips", 0) for record in runs.records(skipping / "run")]
    assert counts == sorted(counts) and counts[-1] == len(FILES)
    assert runs.losses(skipping / "run").isfinite().all()


@pytest.mark.parametrize(
    "words", [["engine.strategy=torch"], ["engine.strategy=deepspeed", "engine.zero_stage=2"]], ids=str
)
def test_two_processes_skip_the_same_bad_clips_as_one(words, tmp_path, drawn, bad_clips, skipping):
    config = runs.write_config(tmp_path, drawn)
    job = runs.train([config, f"data.manifest={bad_clips}", "data.bad_clip_share=0.5", *words], size=2)
    assert_close(runs.losses(tmp_path / "run"), runs.losses(skipping / "run"), rtol=1e-5, atol=0)
    assert quarantined(tmp_path) == quarantined(skipping)
    found, wanted = (runs.records(d) for d in (tmp_path / "run", skipping / "run"))
    assert [r.get("bad_clips") for r in found] == [r.get("bad_clips") for r in wanted]
    assert not job.output(rank=1)


def test_a_resumed_run_skips_the_same_clips_as_an_uninterrupted_one(tmp_path, drawn, bad_clips, skipping):
    words = [runs.write_config(tmp_path, drawn), f"data.manifest={bad_clips}", "data.bad_clip_share=0.5"]
    runs.train([*words, "stop_at=3"])
    runs.train([*words, "resume=true"])
    assert torch.equal(runs.losses(tmp_path / "run"), runs.losses(skipping / "run"))
    assert quarantined(tmp_path) == quarantined(skipping)


def test_too_many_bad_clips_stop_all_ranks_with_one_line(tmp_path, drawn, bad_clips):
    job = runs.start([runs.write_config(tmp_path, drawn), f"data.manifest={bad_clips}"], size=2)
    line = error_line(job, status=(2, 2))
    assert "data.bad_clip_share: expected at most 1.00% of 24 clips to be bad, found " in line
    assert line.endswith(f"all are in {tmp_path}/run/quarantine.jsonl")
    assert "`discovla doctor MANIFEST`" in line and "data.quarantine=LIST" in line
    assert quarantined(tmp_path)


@pytest.mark.parametrize(("split", "place"), [("val", 1), ("test", 0), ("test", 1)])
def test_an_evaluation_clip_that_one_rank_cannot_read_stops_all(split, place, tmp_path, drawn):
    manifest = changed_manifest(drawn, tmp_path, {f"{split} {place}": {"video": beheaded(tmp_path)}})
    job = runs.start([runs.write_config(tmp_path, drawn), f"data.manifest={manifest}"], size=2)
    line = error_line(job, status=(2, 2))
    assert "1 clips cannot be evaluated" in line
    assert f"'{split}_{place:05d}' ({tmp_path}/beheaded.mp4): truncated" in line
    assert "`discovla doctor MANIFEST`" in line and "`discovla evaluate --quarantine LIST`" in line
    assert not (tmp_path / "run/metrics.jsonl").exists() or not runs.records(tmp_path / "run")


@pytest.mark.parametrize("kind", FILES)
def test_the_command_names_an_unreadable_video(kind, tmp_path, capsys):
    path = FILES[kind](tmp_path)
    assert main(["frames", str(path), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"discovla: error: {path}: {REASONS[kind]}")
    assert printed.count("\n") == 1


def test_the_command_names_a_broken_checkpoint(skipping, tmp_path, capsys):
    path = skipping / "run/checkpoints/step-00000006"
    kept = (path / "trained.safetensors").read_bytes()
    try:
        (path / "trained.safetensors").write_bytes(kept[:-1])
        assert main(["evaluate", str(path)]) == 2
        sizes = f"expected bytes {len(kept)}, found {len(kept) - 1}"
        assert capsys.readouterr().err == f"discovla: error: {path}/trained.safetensors: {sizes}\n"
    finally:
        (path / "trained.safetensors").write_bytes(kept)


def test_the_command_names_a_folder_without_a_checkpoint(tmp_path, capsys):
    os.mkdir(tmp_path / "empty")
    assert main(["evaluate", str(tmp_path / "empty")]) == 2
    printed = capsys.readouterr().err
    expected = "expected a run directory, a checkpoint or an export, found no checkpoint there"
    assert printed == f"discovla: error: {tmp_path}/empty: {expected}\n"
