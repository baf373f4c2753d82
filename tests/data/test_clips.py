"""Clips as a source of samples."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from discovla.data.clips import ClipSource, FrameReader, FrameSettings, check_captions
from discovla.data.loader import DataConfig, LoaderShape, TrainLoader
from discovla.data.manifest import Clip
from discovla.data.samples import Pair
from tests.data.conftest import movie, numbers


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    path = movie(tmp_path_factory.mktemp("clips") / "a.mp4", 20, size=(32, 48))
    return Clip(
        id="a", video=path, captions=("one", "two words"), split="train", frame_captions=(None, ("x", "y"))
    )


def source(clip: Clip, **changes) -> ClipSource:
    fields = {
        "clips": [clip],
        "pairs": [Pair(0, 1), Pair(0, 0)],
        "reader": FrameReader(FrameSettings(frames=2, image_size=16, sample_rate=10.0)),
    }
    return ClipSource(**(fields | changes))


def test_a_sample_is_its_pair(clip):
    sample = source(clip, frame_captions=True).sample(0, 0)
    assert (sample.text, sample.frame_texts, sample.video_index, sample.bad) == (
        "two words",
        ("x", "y"),
        0,
        None,
    )
    assert sample.frames.shape == (2, 16, 16, 3)
    assert numbers(sample.frames) == [0, 19]


def test_frame_captions_are_left_out_where_they_are_not_asked_for(clip):
    assert source(clip).sample(0, 0).frame_texts is None


def test_the_span_of_a_clip_is_kept(clip):
    spanned = Clip(id="a", video=clip.video, captions=("one",), split="train", start=0.5, end=1.0)
    frames = source(spanned, pairs=[Pair(0, 0)]).sample(0, 0).frames
    assert numbers(frames) == [5, 10]


@pytest.mark.parametrize("augment", ["light", "randaugment"])
def test_augmentation_depends_on_seed_epoch_and_sample(clip, augment):
    def frames(seed: int, epoch: int, index: int) -> bytes:
        return (
            source(clip, augment=augment, seed=seed, pairs=[Pair(0, 0)] * 9)
            .sample(index, epoch)
            .frames.tobytes()
        )

    assert [frames(0, 0, i) for i in range(9)] == [frames(0, 0, i) for i in range(9)]
    for seed, epoch in ((1, 0), (0, 1)):
        assert [frames(0, 0, i) for i in range(9)] != [frames(seed, epoch, i) for i in range(9)]
    assert len({frames(0, 0, i) for i in range(9)}) > 4


def test_a_source_travels_to_a_worker(clip, tmp_path):
    reader = FrameReader(FrameSettings(frames=2, image_size=16, cache=tmp_path / "cache"))
    ours = source(clip, augment="randaugment", reader=reader)
    theirs = pickle.loads(pickle.dumps(ours))
    assert np.array_equal(ours.sample(1, 2).frames, theirs.sample(1, 2).frames)


def test_a_blank_has_the_shape_of_frames(clip):
    bad = Clip(id="b", video=Path("/none.mp4"), captions=("one",), split="train")
    sample = source(bad, pairs=[Pair(0, 0)]).sample(0, 0)
    assert sample.bad is not None
    assert (sample.bad.id, sample.bad.reason) == ("b", "there is no such file")
    assert sample.frames.shape == source(clip).sample(0, 0).frames.shape


def test_a_clip_missing_under_a_cache_is_bad_too(tmp_path):
    bad = Clip(id="b", video=tmp_path / "none.mp4", captions=("one",), split="train")
    reader = FrameReader(FrameSettings(frames=2, image_size=16, cache=tmp_path / "cache"))
    sample = source(bad, pairs=[Pair(0, 0)], reader=reader).sample(0, 0)
    assert sample.bad is not None
    assert sample.bad.reason == "there is no such file"


def test_randaugment_beside_a_cache_says_that_it_decodes_every_time(clip, tmp_path, caplog):
    config = DataConfig(
        manifest=tmp_path / "m", frames=2, augment="randaugment", cache=tmp_path / "cache", workers=0
    )
    shape = LoaderShape(
        batch_size=2, rank=0, world_size=1, seed=0, image_size=16, context_length=8, frame_captions=False
    )
    next(TrainLoader([clip], config, shape).epoch(0))
    assert "training decodes clips every time" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.frames"))


def test_captions_that_fit_are_not_counted(clip):
    assert check_captions([clip], 4, long="error", frame_captions=True) == 0


def test_long_captions_are_counted_once_each(clip):
    assert check_captions([clip], 3, long="truncate") == 1
