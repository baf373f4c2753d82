"""Batches from shards, which are those from the clips' files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from discovla.batch import Batch
from discovla.data.dataset import read_clips
from discovla.data.loader import DataConfig, TrainLoader, video_batches
from discovla.data.manifest import read_manifest
from discovla.data.video.errors import DecodeError
from tests.data.conftest import batch_spec
from tests.data.shards.server import served
from tests.data.shards.world import FRAMES, SIZE, make_manifest, make_shards

FIELDS = ("text_ids", "text_mask", "frames", "frame_mask", "video_index", "valid")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_manifest(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, world):
    """Return a function that makes shards of given settings once."""
    folder = tmp_path_factory.mktemp("made")

    def make(**changes) -> Path:
        out = folder / "-".join(["x", *(f"{k}-{v}" for k, v in changes.items())])
        if not out.exists():
            make_shards(world, out, **changes)
        return out

    return make


def config(world: Path, **changes) -> DataConfig:
    fields = {"manifest": world, "frames": FRAMES, "sample_rate": 5.0, "workers": 0, "decode_seconds": 60.0}
    return DataConfig(**(fields | changes))


def batches(data: DataConfig, *, epoch: int = 1, start: int = 0, **changes) -> list[Batch]:
    loader = TrainLoader(read_clips(data, "train"), data, batch_spec(**changes))
    return list(loader.epoch(epoch, start=start))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)
        assert [(clip.id, clip.reason) for clip in a.bad] == [(clip.id, clip.reason) for clip in b.bad]


CASES = {
    "none": ({}, {}),
    "light": ({"augment": "light"}, {}),
    "light from full size": ({"augment": "light"}, {"size": None}),
    "randaugment": ({"augment": "randaugment"}, {"size": None}),
    "resized_crop": ({"augment": "resized_crop"}, {"size": None}),
    "clip2video": (
        {"sampling": "clip2video", "sample_rate": 10.0},
        {"sampling": "clip2video", "sample_rate": 10.0, "keep": "candidates"},
    ),
    "t2vparser": (
        {"sampling": "t2vparser", "sample_rate": 1.0},
        {"sampling": "t2vparser", "sample_rate": 1.0, "keep": "candidates"},
    ),
    "clip4clip": ({"sampling": "clip4clip"}, {"sampling": "clip4clip"}),
}


SLOW = ("randaugment",)  # it imports timm


@pytest.mark.parametrize("case", [pytest.param(w, marks=[pytest.mark.slow] * (w in SLOW)) for w in CASES])
def test_training_batches_from_shards_equal_those_from_videos_including_bad_clips(case, made, world):
    data_keys, shard_settings = CASES[case]
    expected = batches(config(world, **data_keys))
    found = batches(config(world, shards=str(made(**shard_settings)), **data_keys))
    assert_same(found, expected)
    assert sum(len(batch.bad) for batch in found) == 1


def test_frame_captions_are_read_from_shards(made, world):
    changes = {"missing_frame_captions": "drop"}
    expected = batches(config(world, **changes), frame_captions=True)
    found = batches(config(world, shards=str(made()), **changes), frame_captions=True)
    assert_same(found, expected)
    assert torch.equal(found[0].frame_text_ids, expected[0].frame_text_ids)


def test_ranks_read_slices_of_a_batch_and_an_epoch_starts_at_any_step(made, world):
    data = config(world, shards=str(made()))
    whole = batches(data)
    shares = [batches(data, rank=rank, world_size=2, start=1) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(whole) - 1
    for i, batch in enumerate(whole[1:]):
        both = [share[i] for share in shares]
        assert torch.equal(torch.cat([part.frames for part in both]), batch.frames)
        assert torch.equal(torch.cat([part.text_ids for part in both]), batch.text_ids)
    order = [batch.video_index.tolist() for batch in batches(data, epoch=2)]
    assert order != [batch.video_index.tolist() for batch in whole]


@pytest.mark.parametrize("place", ["folder", "server"])
def test_workers_give_the_batches_of_one_process(place, made, world):
    with served(made()) as (address, _):
        shards = str(made()) if place == "folder" else address
        found = batches(config(world, workers=2, shards=shards))
    assert_same(found, batches(config(world)))


def test_evaluation_batches_from_shards_equal_those_from_files(made, world):
    plain, sharded = config(world), config(world, shards=str(made()))
    clips = read_clips(sharded, "val")
    expected = list(video_batches(read_manifest(world, split="val"), plain, SIZE, 2))
    found = list(video_batches(clips, sharded, SIZE, 2))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(found, expected, strict=True))
    with pytest.raises(DecodeError, match=r"1 clips cannot be evaluated: 'text' .*: not a video file"):
        list(video_batches(read_clips(sharded, "train"), sharded, SIZE, 8))


def test_shards_need_neither_manifest_nor_videos(made, world, tmp_path):
    data = DataConfig(shards=str(made()), frames=FRAMES, sample_rate=5.0, workers=0)
    assert_same(batches(data), batches(config(world)))
    with pytest.raises(ValueError, match=r"manifest\n.*expected a manifest, or data.shards"):
        DataConfig(frames=FRAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "randaugment"}, "expected whole frames, which this augment needs, found 16"),
        ({"frames": FRAMES + 2}, "found no frame"),
        ({"damaged": "use"}, "damaged: expected 'refuse', with which the shards .* found 'use'"),
        ({"sampling": "t2vparser", "sample_rate": 1.0}, "sampling = 't2vparser'"),
    ],
    ids=["full", "frames", "damaged", "sampling"],
)
def test_shards_of_other_settings_are_refused_before_training(changes, message, made, world):
    with pytest.raises(ValueError, match=message):
        batches(config(world, **({"shards": str(made())} | changes)))


def test_shards_of_the_frames_of_evaluation_are_refused_by_random_training_alone(made, world):
    random = {"sampling": "t2vparser", "sample_rate": 1.0}
    data = config(world, shards=str(made(**random)), **random)
    assert list(video_batches(read_clips(data, "val"), data, SIZE, 2))
    with pytest.raises(ValueError, match=r"found no frame \d+ of clip .* keep = 'sampled'"):
        batches(data)


def test_evaluation_reads_small_frames_whatever_training_needs(made, world):
    data = config(world, shards=str(made()), augment="resized_crop")
    assert list(video_batches(read_clips(data, "val"), data, SIZE, 2))
