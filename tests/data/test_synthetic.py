import json
import logging

import av
import numpy as np
import pytest

from discovla.data.drawing import COLOURS
from discovla.data.manifest import check_clips, read_manifest
from discovla.data.scenes import FRAMES, PARTS, RATE, film, make_scene
from discovla.data.synthetic import SAMPLED, WorldSizes, draw_world, encode, first_caption
from discovla.data.tokens import Tokenizer
from discovla.data.wording import CONTEXT_LENGTH, WORDS

SIZES = WorldSizes(train=30, val=5, test=5, siblings=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world, drawn by one process."""
    return draw_world(tmp_path_factory.mktemp("world"), sizes=SIZES, workers=1)


def contents(manifest):
    """The bytes of every file of a world, but for world.json."""
    folder = manifest.parent
    return {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.suffix in {".mp4", ".jsonl"}
    }


def decoded(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_two_processes_draw_the_same_bytes_as_one(world, tmp_path):
    again = draw_world(tmp_path / "world", sizes=SIZES, workers=2)
    assert contents(again) == contents(world)


def test_another_seed_draws_another_world(world, tmp_path):
    other = draw_world(tmp_path, seed=1, sizes=WorldSizes(train=0, val=0, test=5, siblings=0), workers=1)
    same = {name for name, content in contents(other).items() if content == contents(world)[name]}
    assert same == set()


def test_a_larger_world_holds_the_same_clips(world, tmp_path):
    larger = draw_world(tmp_path, sizes=WorldSizes(train=0, val=7, test=0, siblings=0), workers=1)
    videos = {name: content for name, content in contents(larger).items() if name.suffix == ".mp4"}
    shared = videos.keys() & contents(world).keys()
    assert len(shared) == SIZES.val
    assert all(videos[name] == contents(world)[name] for name in shared)


def test_the_manifest_holds_as_many_clips_of_each_split_as_asked(world):
    clips = read_manifest(world)
    assert {split: sum(c.split == split for c in clips) for split in PARTS} == {
        "train": 30,
        "val": 5,
        "test": 5,
        "siblings": 8,
    }


def test_a_clip_is_h264_of_the_stated_length_and_rate(world):
    with av.open(str(read_manifest(world)[0].video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.width, stream.height, stream.average_rate) == (64, 64, RATE)
        assert sum(1 for _ in container.decode(stream)) == FRAMES


def test_no_scene_is_in_two_splits():
    facts = {split: {make_scene(0, split, i).facts for i in range(300)} for split in PARTS}
    for a in PARTS:
        for b in PARTS:
            assert a == b or not facts[a] & facts[b]


def test_siblings_share_their_actors_and_nothing_else():
    for group in range(20):
        scenes = [make_scene(0, "siblings", group * 4 + i) for i in range(4)]
        assert len({frozenset((a.shape, a.colour) for a in scene.actors) for scene in scenes}) == 1
        assert len({scene.facts for scene in scenes}) == 4


def test_training_clips_have_three_captions_with_a_still_caption_per_sampled_frame(world):
    clips = read_manifest(world, split="train")
    check_clips(clips, frames=SAMPLED)
    assert all(len(clip.captions) == 3 and len(clip.frame_captions or ()) == 3 for clip in clips)


def test_clips_of_other_splits_have_one_caption_and_no_still_captions(world):
    rest = [clip for clip in read_manifest(world) if clip.split != "train"]
    assert all(len(clip.captions) == 1 and clip.frame_captions is None for clip in rest)


def every_text(manifest):
    for clip in read_manifest(manifest):
        yield from clip.captions
        for texts in clip.frame_captions or ():
            yield from texts or ()


def test_captions_keep_to_the_vocabulary(world):
    assert {word for text in every_text(world) for word in text.split()} <= set(WORDS)


def test_captions_leave_two_tokens_of_the_context_free(world):
    tokenizer = Tokenizer(CONTEXT_LENGTH)
    assert max(tokenizer.length(text) for text in every_text(world)) <= CONTEXT_LENGTH - 2


def test_the_first_caption_made_from_the_facts_is_that_of_the_manifest(world):
    test = read_manifest(world, split="test")
    assert [first_caption(0, "test", i)[2] for i in range(len(test))] == [clip.captions[0] for clip in test]


def test_an_interrupted_world_is_gone_on_with(tmp_path, world):
    sizes = WorldSizes(train=3, val=0, test=0, siblings=2)
    manifest = draw_world(tmp_path, sizes=sizes, workers=1)
    whole = contents(manifest)
    kept = tmp_path / "videos/train_00000.mp4"
    before = kept.stat().st_mtime_ns
    manifest.unlink()
    for name in ("train_00001", "siblings_00000"):
        (tmp_path / f"videos/{name}.mp4").unlink()
    assert contents(draw_world(tmp_path, sizes=sizes, workers=1)) == whole
    assert kept.stat().st_mtime_ns == before


def test_a_finished_world_is_left_alone(world, caplog):
    before = {p: p.stat().st_mtime_ns for p in world.parent.rglob("*")}
    with caplog.at_level(logging.INFO):
        assert draw_world(world.parent, sizes=SIZES, workers=1) == world
    assert {p: p.stat().st_mtime_ns for p in world.parent.rglob("*")} == before
    assert "all 48 clips are there" in caplog.text


def test_other_parameters_are_refused(world):
    with pytest.raises(ValueError, match=r"world\.json: expected the world .*'seed': 7.* found .*'seed': 0"):
        draw_world(world.parent, seed=7, sizes=SIZES, workers=1)


def test_a_manifest_that_is_no_worlds_is_not_overwritten(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"manifest\.jsonl: expected world\.json beside it"):
        draw_world(tmp_path, sizes=SIZES, workers=1)
    assert (tmp_path / "manifest.jsonl").read_text() == "mine"


def test_a_spoilt_world_json_is_named(tmp_path):
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(ValueError, match=r"world\.json: expected the parameters of a drawn world as JSON"):
        draw_world(tmp_path, sizes=SIZES, workers=1)


def test_the_recorded_parameters_are_those_asked_for(world):
    found = json.loads((world.parent / "world.json").read_text())
    assert (found["seed"], found["sizes"]["train"]) == (0, 30)


@pytest.mark.parametrize("size", ["train", "val", "test", "siblings"])
def test_a_negative_number_of_clips_is_refused(size):
    with pytest.raises(ValueError, match=rf"{size}: expected at least 0 clips, got -1"):
        WorldSizes(**{size: -1})


@pytest.mark.parametrize("index", range(12))
def test_a_decoded_clip_shows_the_front_actor_in_its_colour_where_it_is(index, tmp_path):
    scene = make_scene(0, "test", index)
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode(film(scene, 0, "test", index)))
    frames = decoded(path)
    for i in range(0, FRAMES, RATE):
        thing = scene.actors[1].seen(i / FRAMES)
        if thing is None:
            continue
        rows, columns = np.mgrid[:64, :64]
        near = np.hypot(columns - thing.x, rows - thing.y) < thing.radius
        colour = np.abs(frames[i].astype(int) - COLOURS[thing.colour]).max(-1) < 70
        assert (near & colour).sum() > 0.25 * near.sum(), (i, thing)
