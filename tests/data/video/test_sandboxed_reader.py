"""Frames read in a process with a time limit, which is replaced when it is lost."""

from __future__ import annotations

import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from discovla.data.dataset import FileClipReader
from discovla.data.loader import DataConfig, TrainLoader
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import (
    FrameRequest,
    SandboxedReader,
    read_frames,
    read_request,
    resize_and_crop,
)
from discovla.data.video.index import FrameIndexStore
from tests.data.conftest import batch_spec, movie
from tests.data.odd_clips import odd_clip


def request(path: Path, **changes) -> FrameRequest:
    return FrameRequest(path=path, sampling=Sampling(frames=4, sample_rate=10.0), image_size=16, **changes)


@pytest.fixture(scope="module")
def reader() -> SandboxedReader:
    reader = SandboxedReader(60.0)
    yield reader
    reader.close()


def test_another_process_gives_the_same_frames(counting, reader):
    asked = request(counting)
    wanted = read_frames(counting, asked.sampling, lambda image: resize_and_crop(image, 16)).frames
    for _ in range(2):
        assert np.array_equal(reader(asked), wanted)
    assert np.array_equal(read_request(asked), wanted)


def test_readers_of_a_thread_share_a_process_and_those_of_another_have_their_own(counting, reader):
    reader(request(counting))
    process = reader.sandbox._process
    later = SandboxedReader(60.0)
    later(request(counting))
    assert later.sandbox._process is process
    with ThreadPoolExecutor(1) as thread:
        thread.submit(later, request(counting)).result()
        assert thread.submit(lambda: later.sandbox).result() is not reader.sandbox
    assert SandboxedReader(61.0).sandbox is not reader.sandbox


def test_an_augmentation_is_the_same_there(tmp_path, reader):
    path = odd_clip(tmp_path, "short-gop")
    for augment in ("randaugment", "resized_crop"):
        asked = request(path, augment=augment, seed="0/1/2")
        assert np.array_equal(reader(asked), read_request(asked))
        assert not np.array_equal(reader(asked), reader(request(path)))


def test_what_is_wrong_with_a_file_is_told_as_here(tmp_path, reader):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DecodeError, match=r"text.mp4: not a video file"):
        reader(request(tmp_path / "text.mp4"))


def test_a_process_that_is_killed_is_replaced(counting, reader):
    wanted = reader(request(counting))
    process = reader.sandbox._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with suppress(DecodeError):  # a file that it was given before it was seen to be gone
        reader(request(counting))
    assert np.array_equal(reader(request(counting)), wanted)


def test_a_file_that_takes_too_long_is_named_and_the_next_is_read(counting, tmp_path, monkeypatch):
    slow = movie(tmp_path / "slow.mp4", 60, size=(256, 256))
    small = SandboxedReader(0.002)
    with pytest.raises(DecodeError, match=r"slow.mp4: not decoded: took longer than 0.002 s"):
        small(request(slow))
    assert small.sandbox._process is None
    monkeypatch.setattr(small.sandbox, "limit", 60.0)
    assert small(request(counting)).shape == (4, 16, 16, 3)
    small.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_marks_a_clip_that_takes_too_long(tmp_path, workers):
    paths = [movie(tmp_path / f"{name}.mp4", 60, size=(256, 256)) for name in "ab"]
    pairs = [Clip(id=path.stem, video=path, captions=("one",), split="train") for path in paths]
    config = DataConfig(manifest=tmp_path, frames=2, workers=workers, decode_seconds=0.002)
    shape = batch_spec()
    (batch,) = TrainLoader(pairs, config, shape).epoch(0)
    assert not batch.valid.any()
    assert {bad.reason for bad in batch.bad} == {"not decoded: took longer than 0.002 s"}


def test_a_reader_travels(counting, reader):
    other = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(other(request(counting)), reader(request(counting)))
    other.close()


def test_a_decoder_that_is_not_there_is_refused_before_request(monkeypatch):
    monkeypatch.setattr("discovla.data.video.torchcodec.missing", lambda: "torchcodec is not installed")
    with pytest.raises(ValueError, match="decoder: torchcodec is not installed"):
        FileClipReader(DataConfig(manifest=Path("none"), decoder="torchcodec"), 16)


def test_processes_share_the_indices_of_their_folder(counting, reader, tmp_path):
    reader(request(counting, index_dir=tmp_path))
    assert FrameIndexStore(tmp_path).get(counting) is not None
