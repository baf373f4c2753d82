"""Clips as a source of samples."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from discovla.data.config import FrameSettings
from discovla.data.dataset import ClipDataset, FileClipReader, Pair, check_captions
from discovla.data.loader import DataConfig, TrainLoader
from discovla.data.manifest import Clip
from tests.data.conftest import batch_spec, movie, numbers


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    path = movie(tmp_path_factory.mktemp("clips") / "a.mp4", 20, size=(32, 48))
    return Clip(
        id="a", video=path, captions=("one", "two words"), split="train", frame_captions=(None, ("x", "y"))
    )


def source(clip: Clip, **changes) -> ClipDataset:
    fields = {
        "clips": [clip],
        "pairs": [Pair(0, 1), Pair(0, 0)],
        "reader": FileClipReader(FrameSettings(frames=2, image_size=16, sample_rate=10.0)),
    }
    return ClipDataset(**(fields | changes))


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


def test_a_crop_of_a_training_clip_is_one_part_of_all_its_frames(tmp_path):
    def ramp(i: int, height: int, width: int) -> np.ndarray:
        return np.broadcast_to(np.linspace(0, 255, width, dtype=np.uint8)[None, :, None], (height, width, 3))

    clip = Clip(id="a", video=movie(tmp_path / "a.mp4", 20, draw=ramp), captions=("one",), split="train")
    reader = FileClipReader(FrameSettings(frames=2, image_size=16, sample_rate=10.0))
    cuts = [reader.read_augmented(clip, "resized_crop", f"0/0/{i}") for i in range(6)]
    assert {cut.shape for cut in cuts} == {(2, 16, 16, 3)}
    for cut in cuts:
        assert np.abs(cut[0].astype(int) - cut[1]).max() <= 8, "the frames of the clip are the same picture"
    spans = [np.ptp(cut[0, 8, :, 0]) for cut in cuts]
    assert max(spans) - min(spans) > 30, "parts of other sizes show more or less of the ramp"


def test_a_source_travels_to_a_worker(clip, tmp_path):
    reader = FileClipReader(FrameSettings(frames=2, image_size=16, cache=tmp_path / "cache"))
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
    reader = FileClipReader(FrameSettings(frames=2, image_size=16, cache=tmp_path / "cache"))
    sample = source(bad, pairs=[Pair(0, 0)], reader=reader).sample(0, 0)
    assert sample.bad is not None
    assert sample.bad.reason == "there is no such file"


@pytest.mark.parametrize("augment", ["randaugment", "resized_crop"])
def test_what_changes_full_frames_beside_a_cache_says_that_it_decodes_every_time(
    augment, clip, tmp_path, caplog
):
    config = DataConfig(
        manifest=tmp_path / "m", frames=2, augment=augment, cache=tmp_path / "cache", workers=0
    )
    shape = batch_spec()
    next(TrainLoader([clip], config, shape).epoch(0))
    assert "training decodes clips every time" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.frames"))


def test_captions_that_fit_are_not_counted(clip):
    assert check_captions([clip], 4, long="error", frame_captions=True) == 0


def test_long_captions_are_counted_once_each(clip):
    assert check_captions([clip], 3, long="truncate") == 1


def seen(reader: FileClipReader, clip: Clip, seeds: range) -> list[tuple[int, ...]]:
    """The numbers of the frames of training samples."""
    return [tuple(numbers(reader.read_augmented(clip, "none", f"0/0/{i}"))) for i in seeds]


def test_a_sample_of_too_few_frames_is_filled_with_placeholders_that_are_counted(clip):
    reader = FileClipReader(FrameSettings(frames=5, image_size=16, sampling="clip4clip"))
    sample = source(clip, reader=reader).sample(0, 0)
    assert sample.shown == 2
    assert numbers(sample.frames) == [0, 10, 0, 0, 0]
    assert not sample.frames[2:].any()


def test_placeholders_are_no_part_of_a_light_augmentation(clip):
    reader = FileClipReader(FrameSettings(frames=5, image_size=16, sampling="clip4clip"))
    frames = source(clip, reader=reader, augment="light").sample(0, 0).frames
    assert not frames[2:].any()


@pytest.mark.parametrize("augment", ["none", "light", "randaugment"])
def test_frames_drawn_for_training_are_those_of_the_sample(clip, augment):
    def frames(epoch: int, index: int) -> bytes:
        reader = FileClipReader(FrameSettings(frames=3, image_size=16, sampling="t2vparser"))
        ours = source(clip, augment=augment, reader=reader, pairs=[Pair(0, 0)] * 6)
        return ours.sample(index, epoch).frames.tobytes()

    first = [frames(0, i) for i in range(6)]
    assert [frames(0, i) for i in range(6)] == first
    assert [frames(1, i) for i in range(6)] != first
    assert len(set(first)) > 1


def test_a_cache_of_frames_for_testing_is_not_taken_for_training_that_draws_them(clip, tmp_path):
    settings = FrameSettings(frames=3, image_size=16, sampling="t2vparser", cache=tmp_path / "cache")
    fixed = numbers(FileClipReader(settings).read(clip))
    assert fixed == [3, 9, 16]
    drawn = seen(FileClipReader(settings), clip, range(8))
    assert len(set(drawn)) > 4
    assert numbers(FileClipReader(settings).read(clip)) == fixed
    assert len(list((tmp_path / "cache").rglob("*.frames"))) == 1


def test_a_cache_serves_training_on_frames_that_stay(clip, tmp_path):
    settings = FrameSettings(frames=4, image_size=16, sampling="clip4clip", cache=tmp_path / "cache")
    assert seen(FileClipReader(settings), clip, range(2)) == [(0, 10)] * 2
    assert len(list((tmp_path / "cache").rglob("*.frames"))) == 1


def test_jitter_beside_a_cache_says_that_it_decodes_every_time(clip, tmp_path, caplog):
    config = DataConfig(
        manifest=tmp_path / "m", frames=2, sampling="t2vparser", cache=tmp_path / "cache", workers=0
    )
    shape = batch_spec()
    next(TrainLoader([clip], config, shape).epoch(0))
    assert "sampling = 't2vparser' draws frames anew in each epoch, training decodes" in caplog.text


def test_a_clip_that_its_sampling_leaves_nothing_of_is_bad(clip):
    settings = FrameSettings(
        frames=2, image_size=16, sampling="clip2video", sample_rate=5.0, sampling_divisor=11
    )
    sample = source(clip, reader=FileClipReader(settings)).sample(0, 0)
    assert sample.bad is not None
    assert sample.bad.reason.startswith("sampling_divisor: expected at most the 10 frames stored")
