import json
import logging
import shutil
import zlib

import av
import numpy as np
import pytest

from discovla.data.manifest import check_clips, read_manifest
from discovla.data.tokens import Tokenizer
from discovla.drawn_world.drawing import COLOURS, PLACES
from discovla.drawn_world.scenes import EVENTS, FRAMES, PARTS, RATE, backwards, film, make_scene
from discovla.drawn_world.synthetic import SAMPLED, WorldSizes, draw_world, encode, first_caption
from discovla.drawn_world.wording import CONTEXT_LENGTH, WORDS, phrase, tell

SIZES = WorldSizes(train=30, val=5, test=5, siblings=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Draw a small world by one process."""
    return draw_world(tmp_path_factory.mktemp("world"), sizes=SIZES, workers=1)


def contents(manifest):
    """Return the bytes of every file of a world except world.json."""
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


def test_a_larger_world_contains_the_same_clips(world, tmp_path):
    larger = draw_world(tmp_path, sizes=WorldSizes(train=0, val=7, test=0, siblings=0), workers=1)
    videos = {name: content for name, content in contents(larger).items() if name.suffix == ".mp4"}
    shared = videos.keys() & contents(world).keys()
    assert len(shared) == SIZES.val
    assert all(videos[name] == contents(world)[name] for name in shared)


def test_the_manifest_has_the_requested_number_of_clips_of_each_split(world):
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


def test_the_facts_of_a_scene_determine_its_split():
    part = {
        split: {zlib.crc32(repr(make_scene(0, split, i).facts).encode()) % 8 for i in range(60)}
        for split in PARTS
    }
    assert sorted(n for parts in part.values() for n in parts) == sorted(
        n for parts in PARTS.values() for n in parts
    )


def test_no_scene_is_in_two_splits_or_twice_in_one():
    facts = [make_scene(0, split, i).facts for split in PARTS for i in range(300)]
    assert len(set(facts)) == len(facts)


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


def test_first_caption_equals_the_first_caption_in_the_manifest(world):
    test = read_manifest(world, split="test")
    assert [first_caption(0, "test", i)[2] for i in range(len(test))] == [clip.captions[0] for clip in test]


@pytest.mark.parametrize(
    "lost", [["manifest.jsonl"], ["videos/train_00001.mp4"], ["manifest.jsonl", "videos/val_00000.mp4"]]
)
def test_an_interrupted_world_is_completed(tmp_path, lost):
    sizes = WorldSizes(train=2, val=1, test=0, siblings=0)
    whole = contents(draw_world(tmp_path, sizes=sizes, workers=1))
    kept = tmp_path / "videos/train_00000.mp4"
    before = kept.stat().st_mtime_ns
    for name in lost:
        (tmp_path / name).unlink()
    assert contents(draw_world(tmp_path, sizes=sizes, workers=1)) == whole
    assert kept.stat().st_mtime_ns == before


def test_a_complete_world_stays_unchanged(world, caplog):
    before = {p: p.stat().st_mtime_ns for p in world.parent.rglob("*")}
    with caplog.at_level(logging.INFO):
        assert draw_world(world.parent, sizes=SIZES, workers=1) == world
    assert {p: p.stat().st_mtime_ns for p in world.parent.rglob("*")} == before
    assert "all 48 clips exist" in caplog.text


def test_reversed_captions_are_true_of_the_clip_played_backwards(world):
    clips = [clip for clip in read_manifest(world) if clip.reversed_captions is not None]
    assert [clip.id for clip in clips] == [f"train_{i:05d}" for i in range(30)]
    for index, clip in enumerate(clips):
        plain = {
            phrase(tell(make_scene(0, "train", index))),
            phrase(tell(backwards(make_scene(0, "train", index)))),
        }
        words = {word for text in plain for word in text.split()} | {
            "goes",
            "remains",
            "becomes",
            "and",
            "as",
        }
        assert len(clip.reversed_captions) == 3
        for text in clip.reversed_captions:
            assert set(text.split()) <= words | {"small", "big"}
    actor = make_scene(0, "train", 0).actors[1]  # moves from the top left to the bottom right, second
    assert (actor.kind, actor.place, actor.place_to) == ("moves", "top left", "bottom right")
    assert any("from the bottom right" in text for text in clips[0].reversed_captions)


def test_a_world_of_the_version_before_keeps_its_videos_and_gets_a_new_manifest(world, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(world.parent, folder)
    for name, old, new in (
        ("world.json", '"world": 2', '"world": 1'),
        ("manifest.jsonl", "train_00003", "x"),
    ):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.mp4")}
    manifest = draw_world(folder, sizes=SIZES, workers=1)
    assert manifest.read_bytes() == world.read_bytes()
    assert (folder / "world.json").read_bytes() == (world.parent / "world.json").read_bytes()
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.mp4")} == before


def test_other_parameters_are_refused(world):
    with pytest.raises(ValueError, match=r"world\.json: expected the world .*'seed': 7.* found .*'seed': 0"):
        draw_world(world.parent, seed=7, sizes=SIZES, workers=1)


def test_a_manifest_without_world_json_is_not_overwritten(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"manifest\.jsonl: expected world\.json beside it"):
        draw_world(tmp_path, sizes=SIZES, workers=1)
    assert (tmp_path / "manifest.jsonl").read_text() == "mine"


def test_a_malformed_world_json_is_named(tmp_path):
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(ValueError, match=r"world\.json: expected the parameters of a drawn world as JSON"):
        draw_world(tmp_path, sizes=SIZES, workers=1)


def test_world_json_has_the_parameters(world):
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


def area(frame, colour, place):
    """Count the pixels of a colour within the radius of a big object around a place."""
    rows, columns = np.mgrid[:64, :64]
    near = np.hypot(columns - PLACES[place][0], rows - PLACES[place][1]) < 14
    return (near & (np.abs(frame.astype(int) - COLOURS[colour]).max(-1) < 40)).sum()


def front_acts(kind, count=6):
    """Return films whose front actor has the event, with that actor; no other object has its colours."""
    films = []
    for i in range(2000):
        scene = make_scene(0, "train", i)
        front, back = scene.actors[1], scene.actors[0]
        others = {back.colour, back.colour_to, *(thing.colour for thing in scene.distractors)}
        if front.kind == kind and not others & {front.colour, front.colour_to} - {None}:
            films.append((film(scene, 0, "train", i), front))
        if len(films) == count:
            return films
    raise AssertionError(f"only {len(films)} scenes of {kind}")


@pytest.mark.parametrize("kind", EVENTS)
def test_a_film_shows_its_event(kind):
    for frames, a in front_acts(kind):
        first, last = frames[0], frames[28]  # the first and the last that are sampled
        colour, place = a.colour_to or a.colour, a.place_to or a.place
        before, after = area(first, a.colour, a.place), area(last, colour, place)
        match kind:
            case "appears":
                assert before == 0 < 40 < after
            case "disappears":
                assert after == 0 < 40 < before
            case "grows":
                assert after > 2 * before > 0
            case "shrinks":
                assert before > 2 * after > 0
            case "moves" | "turns":
                assert min(before, after) > 40
                assert area(last, a.colour, a.place) < 0.5 * before
                assert area(first, colour, place) < 0.5 * after
            case "stays":
                assert before > 40
                assert abs(after - before) < 0.1 * before


def test_with_then_the_first_event_ends_before_the_second_begins():
    scenes = [make_scene(0, "train", i) for i in range(200)]
    ordered = [scene for scene in scenes if scene.order == "then"]
    assert 0.5 < len(ordered) / len(scenes) < 0.7
    assert all(scene.actors[0].end < scene.actors[1].start for scene in ordered)


def test_with_while_both_events_overlap():
    scenes = [scene for i in range(200) if (scene := make_scene(0, "train", i)).order == "while"]
    assert all(max(a.start for a in s.actors) < min(a.end for a in s.actors) for s in scenes)


def test_the_sampled_frames_show_the_clip_before_its_first_event_and_after_its_last():
    for i in range(200):
        actors = make_scene(0, "train", i).actors
        assert min(a.start for a in actors) > 0
        assert max(a.end for a in actors) < 28 / FRAMES
