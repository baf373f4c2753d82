"""Decoded frames kept on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from discovla.data.cache import FrameCache
from discovla.data.config import FrameSettings
from discovla.data.dataset import FileClipReader
from discovla.data.manifest import Clip
from tests.data.conftest import movie


@pytest.fixture
def decodings(monkeypatch) -> list[Path]:
    """The videos that were decoded, in order."""
    from discovla.data import dataset

    seen: list[Path] = []
    call = dataset.Reader.__call__

    def counted(reader, reading):
        seen.append(reading.path)
        return call(reader, reading)

    monkeypatch.setattr(dataset.Reader, "__call__", counted)
    return seen


def reader(folder: Path, **changes) -> FileClipReader:
    return FileClipReader(
        FrameSettings(**({"frames": 3, "image_size": 16, "cache": folder / "cache"} | changes))
    )


def clip(folder: Path, **changes) -> Clip:
    path = folder / "a.mp4"
    if not path.exists():
        movie(path, 6)
    return Clip(**({"id": "a", "video": path, "captions": ("a",), "split": "train"} | changes))


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*.frames"))


def test_a_clip_is_decoded_once(tmp_path, decodings):
    first = reader(tmp_path).read(clip(tmp_path))
    again = reader(tmp_path).read(clip(tmp_path))
    assert len(decodings) == 1
    assert np.array_equal(first, again)
    assert again.dtype == np.uint8
    assert again.shape == (3, 16, 16, 3)


def test_nothing_but_whole_files_is_left(tmp_path):
    reader(tmp_path).read(clip(tmp_path))
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".frames", ".table"]
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize(
    "changes",
    [{"image_size": 8}, {"frames": 2}, {"sample_rate": 2.0}, {"damaged": "use"}],
    ids=["size", "frames", "rate", "damaged"],
)
def test_another_setting_is_another_file(tmp_path, changes):
    reader(tmp_path).read(clip(tmp_path))
    reader(tmp_path, **changes).read(clip(tmp_path))
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"sampling": "clip4clip"}),
        ({"sampling": "clip4clip"}, {"sampling": "clip4clip", "sampling_slice": "last"}),
        ({"sampling": "clip4clip"}, {"sampling": "t2vparser"}),
        ({"sampling": "clip2video"}, {"sampling": "clip2video", "sample_rate": 5.0}),
        (
            {"sampling": "clip2video", "sample_rate": 5.0},
            {"sampling": "clip2video", "sample_rate": 5.0, "sampling_divisor": 2},
        ),
    ],
    ids=["default", "slice", "sampling", "stored rate", "divisor"],
)
def test_another_sampling_is_another_file(tmp_path, one, other):
    reader(tmp_path, **one).read(clip(tmp_path))
    reader(tmp_path, **other).read(clip(tmp_path))
    assert len(kept(tmp_path)) == 2


def test_fewer_frames_than_asked_for_are_kept_as_they_are(tmp_path, decodings):
    settings = {"sampling": "clip2video", "sample_rate": 5.0, "frames": 12}
    first = reader(tmp_path, **settings).read(clip(tmp_path))
    again = reader(tmp_path, **settings).read(clip(tmp_path))
    assert len(decodings) == 1
    assert first.shape == (3, 16, 16, 3)
    assert np.array_equal(first, again)


def test_another_span_is_another_file(tmp_path):
    reader(tmp_path).read(clip(tmp_path))
    reader(tmp_path).read(clip(tmp_path, start=0.1))
    assert len(kept(tmp_path)) == 2


def test_a_changed_video_is_decoded_again(tmp_path, decodings):
    reader(tmp_path).read(clip(tmp_path))
    os.utime(tmp_path / "a.mp4", ns=(0, 1))
    reader(tmp_path).read(clip(tmp_path))
    assert len(decodings) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content + b"x",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"x" + content[1:],
        lambda content: content[:12] + b"\x06\0\0\0" + content[16:],
    ],
    ids=["cut", "empty", "longer", "flipped bit", "other magic", "other shape"],
)
def test_a_spoiled_file_is_made_again(tmp_path, decodings, spoil, caplog):
    first = reader(tmp_path).read(clip(tmp_path))
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert np.array_equal(reader(tmp_path).read(clip(tmp_path)), first)
    assert len(decodings) == 2
    assert path.read_bytes() == whole
    assert "not what was written, made again" in caplog.text


def test_a_full_disk_is_told_once_and_reading_goes_on(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    ours = reader(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(2):
        assert ours.read(clip(tmp_path)).shape == (3, 16, 16, 3)
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    assert not kept(tmp_path)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        ValueError, match=r"cache: expected a folder that can be written, .*file/cache: Not a dir"
    ):
        FrameCache(tmp_path / "file/cache")
