"""Batches whose frames DALI makes, from files and from shards, against those of PyAV."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from discovla.batch import Batch
from discovla.data.dali.reader import TOLERANCE_MEAN, missing
from discovla.data.dataset import frame_origin, read_clips
from discovla.data.loader import DataConfig, TrainLoader, video_batches
from discovla.data.manifest import Clip, write_manifest
from discovla.data.shards.layout import ShardSettings
from discovla.data.shards.writer import write_shards
from discovla.data.video.errors import DecodeError
from discovla.data.video.index import FrameIndexStore
from tests.data.conftest import batch_spec
from tests.data.odd_clips import odd_clip

REASON = missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU refuses, a GPU reads"),
]
SIZE, FRAMES = 16, 4
FIELDS = ("text_ids", "text_mask", "frame_mask", "video_index")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Clips that DALI decodes on a CPU, one of them short, one that it refuses, and one that is no video."""
    folder = tmp_path_factory.mktemp("dali")
    (folder / "text.webm").write_text("no video")
    names = ["vp9", "mjpeg", "odd-size-vp9", "vp8-without-duration"]
    videos = [odd_clip(folder, name) for name in names] + [folder / "text.webm", odd_clip(folder, "long-gop")]
    clips = [
        Clip(id=video.stem, video=video, captions=(f"a {n}", f"another {n}"), split="train")
        for n, video in enumerate(videos)
    ]
    clips[1] = replace(clips[1], start=0.2, end=0.3)
    clips += [replace(clip, split="val", id=f"val {clip.id}") for clip in clips[:3]]
    write_manifest(folder / "manifest.jsonl", clips)
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def made(tmp_path_factory, world):
    """Return shards with given settings, made once."""
    folder = tmp_path_factory.mktemp("made")

    def make(**changes) -> str:
        out = folder / "-".join(["x", *(f"{k}-{v}" for k, v in changes.items())])
        if not out.exists():
            fields = {"frames": FRAMES, "sample_rate": 5.0, "size": SIZE, "quality": 95} | changes
            write_shards(world, out, ShardSettings(**fields), workers=0)
        return str(out)

    return make


def config(world: Path, **changes) -> DataConfig:
    fields = {"manifest": world, "frames": FRAMES, "sample_rate": 5.0, "workers": 0, "decode_seconds": 60.0}
    return DataConfig(**(fields | {"decoder": "dali"} | changes))


def loader(data: DataConfig, **changes) -> TrainLoader:
    return TrainLoader(read_clips(data, "train"), data, batch_spec(**({"batch_size": 3} | changes)))


def assert_near(batches: list[Batch], expected: list[Batch], refused: tuple[int, ...] = ()) -> int:
    """Assert that batches agree but for small differences and refused clips; return the frames compared."""
    assert len(batches) == len(expected) > 0
    compared = 0
    for a, b in zip(batches, expected, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)
        reasons = {clip.id: clip.reason for clip in b.bad}
        assert {clip.id: clip.reason for clip in a.bad if clip.id != "long-gop"} == reasons
        assert a.valid is not None and b.valid is not None
        for row, clip in enumerate(a.video_index.tolist()):
            assert bool(a.valid[row]) == (clip not in refused and bool(b.valid[row]))
            if a.valid[row]:
                errors = (a.frames[row].int() - b.frames[row].int()).abs().float().mean((1, 2, 3))
                assert errors.max() <= TOLERANCE_MEAN
                compared += int(a.frame_mask[row].sum())
            else:
                assert not a.frames[row].any()
    return compared


@pytest.mark.parametrize(
    "augment", ["light", *(pytest.param(a, marks=pytest.mark.slow) for a in ("none", "resized_crop"))]
)
def test_training_batches_are_near_to_those_of_pyav(augment, world):
    mine = loader(config(world, augment=augment))
    batches = list(mine.epoch(1))
    expected = list(loader(config(world, augment=augment, decoder="pyav")).epoch(1))
    assert assert_near(batches, expected, refused=(5,)) >= 20
    refused = {clip.reason for batch in batches for clip in batch.bad if clip.id == "long-gop"}
    assert len(refused) == 1
    assert (
        "cannot be read by decoder = 'dali': expected one of the codecs mjpeg, vp8, vp9 on a CPU, found h264"
        in refused.pop()
    )
    # the rest of an epoch, after another was abandoned, is the same bit for bit
    next(iter(mine.epoch(2)))
    rest = list(mine.epoch(1, start=1))
    assert len(rest) == len(batches) - 1
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(rest, batches[1:], strict=True))


@pytest.mark.slow
def test_batches_do_not_depend_on_workers_or_ranks(world):
    single = list(loader(config(world, augment="light")).epoch(0))
    by_workers = list(loader(config(world, augment="light", workers=2)).epoch(0))
    shares = [
        list(loader(config(world, augment="light"), rank=rank, world_size=3).epoch(0)) for rank in range(3)
    ]
    for i, batch in enumerate(single):
        assert torch.equal(by_workers[i].frames, batch.frames)
        assert torch.equal(torch.cat([share[i].frames for share in shares]), batch.frames)
        assert by_workers[i].bad == batch.bad


@pytest.mark.slow
def test_evaluation_is_near_to_pyav_and_names_refused_clips(world):
    data = config(world)
    clips = read_clips(data, "val")
    batches = list(video_batches(clips, data, SIZE, 2))
    expected = list(video_batches(clips, config(world, decoder="pyav"), SIZE, 2))
    for a, b in zip(batches, expected, strict=True):
        assert torch.equal(a.frame_mask, b.frame_mask)
        assert torch.equal(a.clip_index, b.clip_index)
        assert (a.frames.int() - b.frames.int()).abs().float().mean() <= TOLERANCE_MEAN
    with pytest.raises(
        DecodeError,
        match=r"1 clips cannot be evaluated: 'long-gop' .* found h264",
    ):
        list(video_batches(read_clips(data, "train")[5:], data, SIZE, 2))


@pytest.mark.parametrize(
    ("changes", "augment"),
    [
        ({"format": "jpeg"}, "light"),
        pytest.param({"format": "jpeg", "size": None}, "resized_crop", marks=pytest.mark.slow),
        pytest.param({"format": "raw", "size": None}, "light", marks=pytest.mark.slow),
        pytest.param({"format": "raw", "size": None}, "resized_crop", marks=pytest.mark.slow),
        ({"format": "raw"}, "light"),
    ],
    ids=["jpeg", "jpeg of full size", "raw of full size", "raw, cropped", "raw"],
)
def test_batches_from_shards_are_near_to_those_without_dali(changes, augment, world, made):
    data = {"shards": made(**changes), "augment": augment}
    batches = list(loader(config(world, **data)).epoch(1))
    expected = list(loader(config(world, **data, decoder="pyav")).epoch(1))
    assert assert_near(batches, expected) >= 24
    if changes == {"format": "raw"}:
        assert all(torch.equal(a.frames, b.frames) for a, b in zip(batches, expected, strict=True))


def test_the_origin_of_the_pixels_names_dali_where_it_decodes(world, made):
    assert frame_origin(config(world, decoder="pyav")) == "decoded"
    assert frame_origin(config(world)) == "decoded, by dali"
    assert frame_origin(config(world, shards=made(format="raw"))) == "decoded"
    assert frame_origin(config(world, shards=made(format="jpeg"))) == "jpeg, quality 95, by dali"


def test_frame_indices_are_kept_in_their_folder(world, tmp_path):
    data = config(world, index_dir=tmp_path)
    loader(data).dataset.sample(0, 0)
    index = FrameIndexStore(tmp_path).get(read_clips(data, "train")[0].video)
    assert index is not None
    assert index.count == 40
    assert np.all(np.diff(index.times) > 0)
