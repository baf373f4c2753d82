"""Training pairs, the readers of their frames, and the samples they make."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from discovla.data.config import DataConfig
from discovla.data.dataset import (
    ClipDataset,
    FileClipReader,
    Pair,
    check_captions,
    clip_dataset,
    read_splits,
    training_pairs,
)
from discovla.data.manifest import Clip, write_manifest
from discovla.data.order import OrderWords
from tests.data.conftest import movie, numbers


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    path = movie(tmp_path_factory.mktemp("clips") / "a.mp4", 20, size=(32, 48))
    return Clip(
        id="a", video=path, captions=("one", "two words"), split="train", frame_captions=(None, ("x", "y"))
    )


def reader(**changes) -> FileClipReader:
    """A reader of 2 frames at 16 pixels, in this process."""
    fields = {"manifest": Path("unused"), "frames": 2, "sample_rate": 10.0}
    return FileClipReader(DataConfig(**(fields | changes)), 16, sandbox=False)


def dataset(clip: Clip, clip_reader: FileClipReader | None = None, **changes) -> ClipDataset:
    fields = {
        "clips": [clip],
        "pairs": [Pair(0, 1), Pair(0, 0)],
        "reader": clip_reader or reader(),
        "seed": 0,
    }
    return ClipDataset(**(fields | changes))


def test_a_sample_has_the_caption_and_the_frames_of_its_pair(clip):
    sample = dataset(clip, frame_captions=True).sample(0, 0)
    assert sample.text == "two words"
    assert sample.frame_captions == ("x", "y")
    assert sample.video_index == 0
    assert sample.bad is None
    assert sample.frames.shape == (2, 16, 16, 3)
    assert numbers(sample.frames) == [0, 19]


def test_a_pair_played_backwards_has_the_reversed_caption_frames_and_frame_captions(clip):
    both = replace(clip, reversed_captions=("eno", "owt"))
    made = dataset(both, clips=[both], pairs=[Pair(0, 1, backwards=True)], frame_captions=True)
    sample = made.sample(0, 0)
    assert (sample.text, sample.frame_captions) == ("owt", ("y", "x"))
    assert numbers(sample.frames) == [19, 0]


def test_reversed_pairs_follow_the_pairs_that_are_played_forwards(clip):
    both = replace(clip, reversed_captions=("eno",))
    config = DataConfig(manifest=Path("unused"), frames=2, reversed_pairs=True)
    options = {"image_size": 16, "context_length": 8, "frame_captions": False, "seed": 0}
    assert clip_dataset([both], config, **options).pairs == [
        Pair(0, 0),
        Pair(0, 1),
        Pair(0, 0, backwards=True),
    ]
    with pytest.raises(
        ValueError, match="reversed_pairs: expected training clips with reversed_captions, found 1"
    ):
        clip_dataset([clip], config, **options)
    dali = config.model_copy(update={"decoder": "dali"})
    with pytest.raises(ValueError, match="reversed_pairs: expected another decoder than 'dali'"):
        clip_dataset([both], dali, **options)


def test_a_sample_has_an_exchange_that_changes_with_the_epoch(clip):
    told = replace(clip, captions=("a door opens before it falls", "a door"))
    made = dataset(told, clips=[told], pairs=[Pair(0, 0), Pair(0, 1)], order=OrderWords())
    texts = {made.sample(0, epoch).false_text for epoch in range(3)}
    assert texts == {
        "a door closes before it falls",
        "a door opens after it falls",
        "a door opens before it rises",
    }
    assert made.sample(0, 0).tells_order
    assert (made.sample(1, 0).false_text, made.sample(1, 0).tells_order) == (None, False)


def test_samples_have_no_frame_captions_by_default(clip):
    assert dataset(clip).sample(0, 0).frame_captions is None


def test_frames_lie_within_the_span_of_a_clip(clip):
    spanned = Clip(id="a", video=clip.video, captions=("one",), split="train", start=0.5, end=1.0)
    assert numbers(reader().read(spanned)) == [5, 10]


@pytest.mark.parametrize("augment", ["light", "randaugment"])
def test_augmentation_depends_on_seed_epoch_and_sample(clip, augment):
    def frames(seed: int, epoch: int) -> list[bytes]:
        augmented = dataset(clip, reader(augment=augment), seed=seed, pairs=[Pair(0, 0)] * 9)
        return [augmented.sample(index, epoch).frames.tobytes() for index in range(9)]

    first = frames(0, 0)
    assert first == frames(0, 0)
    assert first != frames(1, 0)
    assert first != frames(0, 1)
    assert len(set(first)) > 4


@pytest.mark.parametrize("augment", ["light", "randaugment", "resized_crop"])
def test_evaluation_has_no_augmentation(clip, augment):
    assert np.array_equal(reader(augment=augment).read(clip), reader().read(clip))


def test_a_crop_is_the_same_part_of_all_frames_of_a_clip(tmp_path):
    def ramp(i: int, height: int, width: int) -> np.ndarray:
        return np.broadcast_to(np.linspace(0, 255, width, dtype=np.uint8)[None, :, None], (height, width, 3))

    clip = Clip(id="a", video=movie(tmp_path / "a.mp4", 20, draw=ramp), captions=("one",), split="train")
    cropping = reader(augment="resized_crop")
    cuts = [cropping.read(clip, f"0/0/{i}") for i in range(6)]
    assert {cut.shape for cut in cuts} == {(2, 16, 16, 3)}
    for cut in cuts:
        assert np.abs(cut[0].astype(int) - cut[1]).max() <= 8, "both frames show the same picture"
    spans = [np.ptp(cut[0, 8, :, 0]) for cut in cuts]
    assert max(spans) - min(spans) > 30, "crops of other sizes show more or less of the ramp"


def test_a_pickled_dataset_gives_the_same_samples(clip):
    original = dataset(clip, reader(augment="randaugment"))
    copy = pickle.loads(pickle.dumps(original))
    assert np.array_equal(original.sample(1, 2).frames, copy.sample(1, 2).frames)


def test_a_clip_without_frames_gives_a_bad_sample(clip):
    missing = Clip(id="b", video=Path("/none.mp4"), captions=("one",), split="train")
    sample = dataset(missing, pairs=[Pair(0, 0)]).sample(0, 0)
    assert sample.frames is None
    assert (sample.bad.id, sample.bad.reason) == ("b", "there is no such file")


def test_a_clip_from_which_nothing_is_sampled_is_bad(clip):
    sample = dataset(clip, reader(sampling="clip2video", sample_rate=5.0, sampling_divisor=11)).sample(0, 0)
    assert sample.bad.reason.startswith("sampling_divisor: expected at most the 10 frames stored")


def test_a_short_clip_gives_fewer_frames(clip):
    short = dataset(clip, reader(frames=5, sampling="clip4clip", sample_rate=1.0))
    assert short.frames_per_clip == 5
    assert numbers(short.sample(0, 0).frames) == [0, 10]


@pytest.mark.parametrize("augment", ["none", "light", "randaugment"])
def test_random_sampling_depends_on_the_sample(clip, augment):
    def frames(epoch: int) -> list[bytes]:
        random_reader = reader(frames=3, sampling="t2vparser", sample_rate=1.0, augment=augment)
        random_dataset = dataset(clip, random_reader, pairs=[Pair(0, 0)] * 6)
        return [random_dataset.sample(i, epoch).frames.tobytes() for i in range(6)]

    first = frames(0)
    assert frames(0) == first
    assert frames(1) != first
    assert len(set(first)) > 1


def test_evaluation_samples_the_same_frames_each_time(clip):
    random_reader = reader(frames=3, sampling="t2vparser", sample_rate=1.0)
    assert numbers(random_reader.read(clip)) == [3, 9, 16]
    assert len({tuple(numbers(random_reader.read(clip, f"0/0/{i}"))) for i in range(8)}) > 4
    assert numbers(random_reader.read(clip)) == [3, 9, 16]


def test_captions_that_fit_are_not_counted(clip):
    assert check_captions([clip], 4, long="error", frame_captions=True) == 0


def test_long_captions_are_counted_once_each(clip):
    assert check_captions([clip], 3, long="truncate") == 1


def unread_clip(name: str, **changes) -> Clip:
    fields = {
        "id": name,
        "video": Path(f"/{name}.mp4"),
        "captions": (f"{name} 0", f"{name} 1"),
        "split": "train",
    }
    return Clip(**(fields | changes))


def test_pairs_go_clip_by_clip():
    pairs = training_pairs([unread_clip("a"), unread_clip("b")], frame_captions=False, missing="error")
    assert pairs == [Pair(0, 0), Pair(0, 1), Pair(1, 0), Pair(1, 1)]


def test_pairs_follow_the_caption_order():
    clips = [unread_clip("a", caption_order=(5, 1)), unread_clip("b", caption_order=(0, 7))]
    pairs = training_pairs(clips, frame_captions=False, missing="error")
    assert pairs == [Pair(1, 0), Pair(0, 1), Pair(0, 0), Pair(1, 1)]


def test_a_caption_order_of_some_clips_only_is_refused():
    clips = [unread_clip("a", caption_order=(0, 1)), unread_clip("b")]
    with pytest.raises(ValueError, match="caption_order: expected all 2 clips to have one, found 1"):
        training_pairs(clips, frame_captions=False, missing="error")


def test_pairs_without_frame_captions_are_dropped_and_counted(caplog):
    clips = [unread_clip("a", frame_captions=(None, ("x",))), unread_clip("b")]
    assert training_pairs(clips, frame_captions=True, missing="drop") == [Pair(0, 1)]
    assert "3 of 4 captions have no frame captions and are left out" in caplog.text


def test_a_set_without_any_frame_captions_is_refused():
    with pytest.raises(ValueError, match="frame captions: none of 2 captions has any"):
        training_pairs([unread_clip("a")], frame_captions=True, missing="drop")


def write_splits(folder: Path, splits: tuple[str, ...] = ("train", "train", "val", "test")) -> Path:
    clips = []
    for number, split in enumerate(splits):
        video = folder / f"{number}.mp4"
        video.write_bytes(b"x")
        clips.append(unread_clip(str(number), video=video, split=split))
    write_manifest(folder / "m.jsonl", clips)
    return folder / "m.jsonl"


def test_splits_are_read_by_their_use(tmp_path):
    splits = read_splits(DataConfig(manifest=write_splits(tmp_path)))
    assert {use: [clip.id for clip in clips] for use, clips in splits.items()} == {
        "train": ["0", "1"],
        "val": ["2"],
        "test": ["3"],
    }


@pytest.mark.parametrize("options", [{"val_split": "train"}, {"test_split": "train"}])
def test_evaluation_on_the_training_split_is_refused(options, tmp_path):
    config = DataConfig(manifest=write_splits(tmp_path), **options)
    with pytest.raises(ValueError, match="data: expected other splits to select and test on than to train"):
        read_splits(config)


@pytest.mark.parametrize(
    ("splits", "options"),
    [
        (("train", "val"), {}),
        (("train", "val"), {"test_split": "val"}),
        (("train", "val", "test"), {"test_split": ""}),
        (("train", "val", "test"), {"test_split": "val"}),
    ],
)
def test_the_final_evaluation_may_be_of_the_validation_split(splits, options, tmp_path):
    config = DataConfig(manifest=write_splits(tmp_path, splits), **options)
    assert {use: clips[0].split for use, clips in read_splits(config).items()} == {
        "train": "train",
        "val": "val",
        "test": "val",
    }


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (("train", "val"), {"test_split": "test"}, "expected clips of the split 'test'.*prepare --test N"),
        (("train", "val"), {"test_split": "dev"}, "expected clips of the split 'dev'"),
        (("train", "val"), {"val_split": ""}, "expected clips of the split 'test'"),
        (("train",), {}, "expected clips of the split 'val'.*prepare --val N"),
        (("train", "val"), {"val_split": "", "test_split": ""}, "test_split: expected a split to evaluate"),
    ],
)
def test_a_split_that_is_named_and_missing_is_refused(splits, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_splits(DataConfig(manifest=write_splits(tmp_path, splits), **options))


def test_quarantine_takes_clips_from_training_only(tmp_path):
    quarantine = tmp_path / "quarantine.jsonl"
    rows = (f'{{"id": "{i}", "video": "v", "reason": "r"}}\n' for i in (1, 3))
    quarantine.write_text("".join(rows))
    splits = read_splits(DataConfig(manifest=write_splits(tmp_path), quarantine=quarantine))
    assert [clip.id for clip in splits["train"]] == ["0"]
    assert [clip.id for clip in splits["test"]] == ["3"]


def test_stills_need_no_training_split(tmp_path):
    config = DataConfig(manifest=write_splits(tmp_path, ("val", "test")), stills={"count": 3})
    assert set(read_splits(config)) == {"val", "test"}
