"""Frames read in a process that can be replaced."""

from __future__ import annotations

import os
import pickle
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from discovla.data import dataset
from discovla.data.config import FrameSettings
from discovla.data.dataset import FileClipReader
from discovla.data.loader import DataConfig, TrainLoader
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling, clip_sampling
from discovla.data.video import frames
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import FrameRequest, SandboxedReader, read_frames, read_request
from discovla.data.video.resize import resize_and_crop
from tests.data.conftest import batch_spec, movie
from tests.data.odd_clips import odd_clip


def reading(path: Path, **changes) -> FrameRequest:
    return FrameRequest(path=path, sampling=Sampling(frames=4, sample_rate=10.0), image_size=16, **changes)


@pytest.fixture(scope="module")
def reader() -> SandboxedReader:
    reader = SandboxedReader(60.0)
    yield reader
    reader.close()


def test_another_process_gives_the_same_frames(counting, reader):
    asked = reading(counting)
    wanted = read_frames(counting, asked.sampling, lambda image: resize_and_crop(image, 16)).frames
    for _ in range(2):
        assert np.array_equal(reader(asked), wanted)
    assert np.array_equal(read_request(asked), wanted)


def test_an_augmentation_is_the_same_there(tmp_path, reader):
    path = odd_clip(tmp_path, "short-gop")
    for augment in ("randaugment", "resized_crop"):
        asked = reading(path, augment=augment, seed="0/1/2")
        assert np.array_equal(reader(asked), read_request(asked))
        assert not np.array_equal(reader(asked), reader(reading(path)))


def test_what_is_wrong_with_a_file_is_told_as_here(tmp_path, reader):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DecodeError, match=r"text.mp4: not a video file"):
        reader(reading(tmp_path / "text.mp4"))


def test_a_process_that_is_killed_is_replaced(counting, reader):
    wanted = reader(reading(counting))
    process = reader._worker._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with suppress(DecodeError):  # a file that it was given before it was seen to be gone
        reader(reading(counting))
    assert np.array_equal(reader(reading(counting)), wanted)


def test_a_file_that_takes_too_long_is_named_and_the_next_is_read(counting, tmp_path):
    slow = movie(tmp_path / "slow.mp4", 60, size=(256, 256))
    small = SandboxedReader(0.002)
    with pytest.raises(DecodeError, match=r"slow.mp4: not decoded: took longer than 0.002 s"):
        small(reading(slow))
    assert small._worker._process is None
    small._worker.limit = 60.0
    assert small(reading(counting)).shape == (4, 16, 16, 3)
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
    assert np.array_equal(other(reading(counting)), reader(reading(counting)))
    other.close()


def test_a_decoder_that_is_not_there_is_refused_before_reading(monkeypatch):
    monkeypatch.setattr(frames, "missing", lambda: "torchcodec is not installed")
    with pytest.raises(ValueError, match="decoder: torchcodec is not installed"):
        FileClipReader(FrameSettings(frames=2, image_size=16, decoder="torchcodec"))


def test_frames_of_another_decoder_are_not_those_in_the_cache(counting, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "check_decoder", lambda name: None)
    clip = Clip(id="a", video=counting, captions=("one",), split="train")
    keys = set()
    for decoder in ("pyav", "torchcodec", "auto"):
        settings = FrameSettings(frames=2, image_size=16, cache=tmp_path, decoder=decoder)
        clip_reader = FileClipReader(settings)
        keys.add(clip_reader._cache.key(counting, clip_reader._spec(clip_sampling(settings, clip))))
    assert len(keys) == 3
