"""Frame indices: what they hold, how they are kept, and when frames can be sought by them."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from discovla.data.video import index as index_module
from discovla.data.video.index import (
    FrameIndex,
    FrameIndexStore,
    default_index_dir,
    pack_index,
    unpack_index,
)
from discovla.data.video.pyav import index_video
from tests.data.conftest import movie
from tests.data.odd_clips import KINDS, odd_clip


@pytest.fixture
def index(counting) -> FrameIndex:
    return index_video(counting)


def test_an_index_holds_the_frames_of_its_file(index):
    assert (index.count, index.packets, index.size, index.codec) == (20, 20, (64, 64), "h264")
    assert [index.seconds(frame) for frame in (0, 7, 19)] == pytest.approx([0, 0.7, 1.9])
    assert [frame for frame, _ in index.keyframes] == [0, 12]
    assert index.seekable
    assert index.fault() == ""


@pytest.mark.parametrize("name", KINDS)
def test_packing_keeps_every_field(name, tmp_path):
    index = index_video(odd_clip(tmp_path, name))
    assert unpack_index(pack_index(index)) == index


def test_the_first_frame_of_a_matroska_file_is_a_keyframe_without_a_decoding_time(tmp_path):
    assert index_video(movie(tmp_path / "clip.mkv")).keyframes[0][0] == 0


def test_the_first_picture_of_a_gradual_refresh_is_no_place_to_start(tmp_path):
    assert [frame for frame, _ in index_video(odd_clip(tmp_path, "intra-refresh")).keyframes] == [0]


@pytest.mark.parametrize(
    "change",
    [
        {"problem": "cut"},
        {"faults": 1},
        {"uniform": False},
        {"sequential": True},
        {"times": (None,) * 20},
        {"times": (5, *range(19))},
    ],
    ids=str,
)
def test_files_that_are_damaged_or_unordered_are_not_seekable(index, change):
    assert not replace(index, **change).seekable


def test_without_a_rate_in_the_header_it_is_that_of_the_times(index):
    assert replace(index, header_rate=None).rate == 10.0
    assert replace(index, header_rate=25.0).rate == 25.0
    one = replace(index, header_rate=None, count=1, times=(0,))
    assert one.rate is None
    assert replace(index, header_rate=None, times=(None,) * 20).rate is None


def test_a_file_is_found_by_another_process_until_it_changes(tmp_path):
    path = movie(tmp_path / "clip.mp4", 20)
    FrameIndexStore(tmp_path / "indices").put(path, index_video(path))
    found = FrameIndexStore(tmp_path / "indices").get(path)
    assert found is not None
    assert found.count == 20
    os.utime(path, ns=(1, 1))
    assert FrameIndexStore(tmp_path / "indices").get(path) is None


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"?" + b[41:]])
def test_a_damaged_index_is_ignored_and_written_again(counting, index, tmp_path, change, caplog):
    store = FrameIndexStore(tmp_path)
    store.put(counting, index)
    (file,) = tmp_path.rglob("*.index")
    file.write_bytes(change(file.read_bytes()))
    assert FrameIndexStore(tmp_path).get(counting) is None
    assert f"{file}: damaged frame index" in caplog.text
    store.put(counting, index)
    assert FrameIndexStore(tmp_path).get(counting) == index
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def test_processes_of_the_same_id_on_two_machines_may_write_the_same_index(
    counting, index, tmp_path, monkeypatch, caplog
):
    replace, others = Path.replace, [FrameIndexStore(tmp_path)]

    def interrupted(path, target):
        if others:
            others.pop().put(counting, index)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    FrameIndexStore(tmp_path).put(counting, index)
    assert not caplog.records
    assert FrameIndexStore(tmp_path).get(counting) == index
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".index"]


def test_a_folder_that_cannot_be_written_is_one_warning(counting, index, tmp_path, caplog):
    (tmp_path / "file").touch()
    caplog.set_level(logging.WARNING)
    store = FrameIndexStore(tmp_path / "file")
    for _ in range(2):
        store.put(counting, index)
    assert store.get(counting) == index
    assert len(caplog.records) == 1
    assert f"data.index_dir: {tmp_path}/file cannot be written (Not a directory)" in caplog.text


def test_memory_is_bounded_and_keeps_the_newest(tmp_path, index, monkeypatch):
    paths = [movie(tmp_path / f"{number}.mp4", 2) for number in range(3)]
    store = FrameIndexStore()
    store.put(paths[0], index)
    monkeypatch.setattr(index_module, "_MEMORY", 2 * len(pack_index(index)))
    for path in paths[1:]:
        store.put(path, index)
    assert [store.get(path) is None for path in paths] == [True, False, False]


def test_the_default_folder_is_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_index_dir() == Path("/x/discovla/frame_index")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_index_dir() == Path.home() / ".cache/discovla/frame_index"
