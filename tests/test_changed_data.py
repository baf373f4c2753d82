"""Runs that are resumed with clips that differ from those they began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from discovla.data.config import DataConfig
from discovla.data.fingerprint import differences, split_fingerprint
from discovla.data.manifest import Clip
from discovla.engine import checkpoint
from tests import runs


def change(manifest: Path, target: Path, split: str, **fields: object) -> Path:
    """Copy a manifest with absolute paths; change the first clip of a split, or drop it if no fields."""
    lines, changed = [], False
    for line in manifest.read_text().splitlines():
        clip = json.loads(line)
        clip["video"] = str(manifest.parent / clip["video"])
        if clip["split"] == split and not changed:
            changed = True
            if not fields:
                continue
            clip |= fields
        lines.append(json.dumps(clip))
    target.write_text("\n".join(lines) + "\n")
    return target


def test_a_resumed_run_refuses_other_clips_unless_they_are_allowed(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=3", "checkpoint_every=1", "method.name=discovla"]
    runs.train([*words, "stop_at=2"])
    run = tmp_path / "run"
    before = json.loads((run / "before.json").read_text())
    other = change(drawn, tmp_path / "other.jsonl", "test")
    words += ["resume=true", f"data.manifest={other}"]
    job = runs.start(words)
    assert job.wait() == [2]
    step = run / "checkpoints/step-00000002"
    assert f"error: {step}: data.manifest: test: the run began with 8 clips, found 7; resume" in job.output()
    job = runs.train([*words, "allow_changed_data=true"])
    assert "goes on with changed data: test: the run began with 8 clips, found 7" in job.output()
    assert "before.json: is measured again, because of other values" in job.output()
    after = json.loads((run / "before.json").read_text())
    assert after["fingerprint"]["data"]["test"]["clips"] == 7 and after["rows"] != before["rows"]
    assert len(runs.losses(run)) == 3


def test_a_run_written_before_fingerprints_resumes_and_says_that_it_is_not_checked(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=2", "data.val_split="]
    runs.train([*words, "stop_at=1"])
    run = tmp_path / "run"
    rows = json.loads((run / "before.json").read_text())["rows"]
    (run / "before.json").write_text(json.dumps(rows))
    state = next((run / "checkpoints").glob("step-*/state.json"))
    stored = json.loads(state.read_text())
    del stored["meta"]["data"]
    del stored["sha256"]
    state.write_text(json.dumps({**stored, "sha256": checkpoint._state_checksum(stored)}))
    job = runs.train([*words, "resume=true"])
    assert job.output().count("not checked") == 2
    assert json.loads((run / "results.json").read_text()).items() >= rows.items()


def test_zero_shot_rows_of_a_run_without_a_checkpoint_are_not_kept_for_other_clips(tmp_path, drawn):
    words = [runs.write_config(tmp_path, drawn), "steps=1", "data.val_split="]
    job = runs.start(words, fault="kill:discovla.trainer:learning_rate:1")
    assert job.wait() == [-9]
    other = change(drawn, tmp_path / "other.jsonl", "test", captions=["something else entirely"])
    job = runs.train([*words, "resume=true", f"data.manifest={other}"])
    assert "because of other values: test: the 8 clips differ in captions" in job.output()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"id": "b"}, "their ids or their order"),
        ({"captions": ("another",)}, "captions"),
        ({"frame_captions": (("a",),)}, "frame captions"),
        ({"start": 1.0}, "start or end"),
        ({"video": "longer.mp4"}, "names or sizes of the files"),
    ],
)
def test_a_fingerprint_names_each_part_that_differs(fields, words, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "longer.mp4").write_bytes(b"xx")
    values = {"id": "a", "video": tmp_path / "a.mp4", "captions": ("one",), "split": "train"}
    changed = values | fields
    changed["video"] = tmp_path / changed["video"]
    config = DataConfig(manifest=tmp_path / "m.jsonl")
    old, new = (split_fingerprint([Clip(**clip)], config) for clip in (values, changed))
    assert differences({"train": old}, {"train": new}) == [f"train: the 1 clips differ in {words}"]
    assert differences({"train": old}, {"train": old}) == []


def test_a_moved_dataset_has_the_same_fingerprint_and_a_replaced_file_has_not(tmp_path):
    config = DataConfig(manifest=tmp_path / "m.jsonl")
    fingerprints = []
    for folder, content in (("here", b"abc"), ("there", b"abc"), ("replaced", b"abcd")):
        video = tmp_path / folder / "a.mp4"
        video.parent.mkdir()
        video.write_bytes(content)
        clip = Clip(id="a", video=video, captions=("one",), split="test")
        fingerprints.append(split_fingerprint([clip], config))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
