"""Frames read from shards in a local folder."""

from __future__ import annotations

import json
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from discovla.data.manifest import read_manifest
from discovla.data.shards.reader import Shards
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import read_frames, resize_and_crop
from tests.data.shards.world import FRAMES, SIZE, make_manifest, make_shards, sampling

MOVING = {"sampling": "clip2video", "sample_rate": 10.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory, cut_off) -> Path:
    return make_manifest(tmp_path_factory.mktemp("reader"), cut_off)


@pytest.fixture(scope="module")
def made(tmp_path_factory, world):
    """Return a function that makes shards of given settings once."""
    folder = tmp_path_factory.mktemp("made")

    def make(**changes) -> Path:
        out = folder / "-".join(f"{k}-{v}" for k, v in changes.items()) / "shards"
        if not out.exists():
            make_shards(world, out, **changes)
        return out

    return make


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """Return a copy of raw shards to damage."""
    return Path(shutil.copytree(made(), tmp_path / "shards"))


def fitted(image: Image.Image) -> np.ndarray:
    return resize_and_crop(image, SIZE)


def good(clips):
    return [clip for clip in clips if clip.id not in ("text", "cut")]


def test_raw_frames_equal_those_of_the_videos_bit_for_bit(made, world):
    shards = pickle.loads(pickle.dumps(Shards(made())))
    clips = good(read_manifest(world))
    for clip in reversed(clips):
        expected = read_frames(clip.video, sampling(clip), fitted).frames
        assert np.array_equal(shards.frames(clip, sampling(clip), None), expected)
    found = [(c.id, c.captions, c.split, c.start, c.frame_captions) for c in good(shards.clips)]
    assert found == [(c.id, c.captions, c.split, c.start, c.frame_captions) for c in clips]
    assert [clip.id for clip in shards.split("val")] == ["clip/2.x"]
    with pytest.raises(ValueError, match="expected clips of the split 'dev', found train 6, val 1"):
        shards.split("dev")


def test_whole_frames_are_transformed_as_those_of_the_videos(made, world):
    shards = Shards(made(size=None))
    for clip in good(read_manifest(world)):
        expected = read_frames(clip.video, sampling(clip), lambda image: fitted(image.rotate(9))).frames
        assert np.array_equal(shards.frames(clip, sampling(clip), lambda i: fitted(i.rotate(9))), expected)


@pytest.mark.parametrize("sampler", ["clip2video", "t2vparser"])
def test_candidates_contain_the_frames_of_every_seed_of_a_random_sampling(sampler, made, world):
    moving = {"clip2video": {"sample_rate": 10.0}, "t2vparser": {"sample_rate": 1.0}}[sampler]
    shards = Shards(made(sampling=sampler, keep="candidates", **moving))
    clip = read_manifest(world)[3]
    drawn = [sampling(clip, seed, sampler=sampler, **moving) for seed in (None, *map(str, range(12)))]
    shards.check(shards.clips, lambda c: sampling(c, "0", sampler=sampler, **moving), size=SIZE)
    for one in drawn:
        assert np.array_equal(shards.frames(clip, one, None), read_frames(clip.video, one, fitted).frames)
    if sampler == "t2vparser":
        assert len({tuple(one.indices(20, 10.0)) for one in drawn}) > 5


def test_jpeg_frames_are_close_to_those_of_the_videos(made, world):
    shards = Shards(made(format="jpeg", quality=95))
    for clip in good(read_manifest(world)):
        expected = read_frames(clip.video, sampling(clip), fitted).frames
        found = shards.frames(clip, sampling(clip), None)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 6  # grey frames, of which JPEG changes little


def test_a_clip_without_frames_raises_the_recorded_reason(made, world):
    shards, clips = Shards(made()), {clip.id: clip for clip in read_manifest(world)}
    with pytest.raises(DecodeError, match=r"text.mp4: not a video file"):
        shards.frames(clips["text"], sampling(clips["text"]), None)
    with pytest.raises(DecodeError, match=r"cut_off.mp4: damaged: "):
        shards.frames(clips["cut"], sampling(clips["cut"]), None)


def test_frames_of_a_damaged_video_are_refused_unless_damaged_is_use(made, world):
    shards, clip = Shards(made(damaged="use")), read_manifest(world)[-1]
    expected = read_frames(clip.video, sampling(clip), fitted, damaged="use").frames
    assert np.array_equal(shards.frames(clip, sampling(clip), None, damaged="use"), expected)
    with pytest.raises(DecodeError, match="damaged: "):
        shards.frames(clip, sampling(clip), None)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, SIZE + 1, "expected frames of 17 pixels, found 16 pixels; set another `discovla shard --size`"),
        ({}, None, "expected whole frames, which this augment needs, found 16 pixels"),
        (
            {"frames": FRAMES + 1},
            SIZE,
            "frames = 5, found no frame .* of clip 'clip/0.x'; the shards were made with 'discovla', 4",
        ),
        ({"sampler": "t2vparser", "sample_rate": 1.0, "seed": "0"}, SIZE, "sampling = 't2vparser'"),
    ],
    ids=["size", "full", "frames", "moving"],
)
def test_shards_without_the_sampled_frames_are_refused_before_training(changes, size, message, made):
    shards = Shards(made())
    with pytest.raises(ValueError, match=message):
        shards.check(shards.clips, lambda clip: sampling(clip, **changes), size=size)
    shards.check(shards.clips, sampling, size=SIZE)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda s: (s / "shards.json").unlink(),
            "shards.json: No such file or directory; expected the index of",
        ),
        (
            lambda s: (s / "shards.json").write_text("{"),
            "shards.json: expected the index of shards, found no",
        ),
        (lambda s: (s / "shards.json").write_text('{"version": 9}'), "expected shards of version 1, found 9"),
        (
            lambda s: (s / "clips.jsonl").write_text("{}\n"),
            "clips.jsonl: checksum differs from shards.json; `discovla shard`",
        ),
        (
            lambda s: (s / "frames.npy").unlink(),
            "frames.npy: No such file or directory; `discovla shard` writes",
        ),
        (
            lambda s: cut(s / "train-000001.tar", 3000),
            "train-000001.tar: cut off: expected 20480 bytes, found 3000",
        ),
        (
            lambda s: (s / "val-000000.tar").unlink(),
            "val-000000.tar: No such file or directory; `discovla shard`",
        ),
    ],
    ids=["no index", "no json", "version", "clips", "no rows", "cut off", "no tar"],
)
def test_a_damaged_index_is_refused_in_one_line(spoil, message, copied):
    spoil(copied)
    with pytest.raises(ValueError, match=message) as error:
        Shards(copied)
    assert "\n" not in str(error.value)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_changed_frames_are_refused_and_the_others_are_read(copied):
    shards = Shards(copied)
    tar = copied / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    at = content.index(b"00000001.frames.npy") + 512 + 128 + 5
    content[at] ^= 1
    tar.write_bytes(content)
    shards.frames(shards.clips[0], sampling(shards.clips[0]), None)
    with pytest.raises(
        DecodeError,
        match=r"train-000000.tar: frame 0 at byte \d+: expected checksum \w{8}, found \w{8}; `discovla shard",
    ):
        shards.frames(shards.clips[1], sampling(shards.clips[1]), None)
    cut(tar, 3000)
    with pytest.raises(DecodeError, match=r"train-000000.tar: cut off: expected 3072 bytes at \d+, found 0"):
        Shards.frames(shards, shards.clips[0], sampling(shards.clips[0]), None)


def test_a_corrupt_jpeg_is_named(made, tmp_path):
    out = Path(shutil.copytree(made(format="jpeg", quality=95), tmp_path / "shards"))
    shards = Shards(out)
    rows = shards._rows
    tar = out / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    offset, size = (int(rows[0][name]) for name in ("offset", "size"))
    content[offset + 2 : offset + 40] = bytes(38)
    rows["crc32"][0] = zlib.crc32(content[offset : offset + size])  # as if it had been written so
    tar.write_bytes(content)
    with pytest.raises(DecodeError, match=r"train-000000.tar: frame 0: expected a JPEG: "):
        shards.frames(shards.clips[0], sampling(shards.clips[0]), None)


def test_the_settings_are_those_of_the_index(made):
    settings = json.loads((made() / "shards.json").read_text())["settings"]
    assert (Shards(made()).settings.size, Shards(made()).settings.frames) == (
        settings["size"],
        settings["frames"],
    )
