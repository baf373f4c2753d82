"""Counting bad clips and writing them to a list."""

from __future__ import annotations

import json

import pytest

from discovla.batch import BadClip
from discovla.data.quarantine import Quarantine


def bad(n: int) -> BadClip:
    return BadClip(id=f"clip{n}", video=f"clip{n}.mp4", reason="moov atom not found")


def test_each_bad_clip_is_written_once_with_its_reason(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", clips=100, share=0.5)
    quarantine.add([bad(1), bad(2)], write=True)
    quarantine.add([bad(1)], write=True)
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["clip1", "clip2"]
    assert rows[0]["reason"] == "moov atom not found"


def test_too_many_bad_clips_stop_the_run_and_name_the_last(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", clips=100, share=0.01)
    quarantine.add([bad(1)], write=True)
    with pytest.raises(
        ValueError, match=r"expected at most 1\.00% of 100 clips .* found 2, the last 'clip2'"
    ):
        quarantine.add([bad(2)], write=True)


def test_a_resumed_run_continues_the_count_and_drops_a_line_cut_short(tmp_path):
    path = tmp_path / "q.jsonl"
    Quarantine(path, clips=100, share=0.5).add([bad(1)], write=True)
    with path.open("a") as file:
        file.write('{"id": "clip2", "vi')
    quarantine = Quarantine(path, clips=100, share=0.5)
    assert set(quarantine.known) == {"clip1"}
    quarantine.add([bad(2)], write=True)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["clip1", "clip2"]


def test_only_the_writing_process_changes_the_file(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", clips=100, share=0.5)
    quarantine.add([bad(1)], write=False)
    assert not quarantine.path.exists()
    assert set(quarantine.known) == {"clip1"}
