"""Batches: their order, the shares of ranks, bad clips."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from discovla.batch import Batch
from discovla.data.dataset import Sample
from discovla.data.loader import (
    BatchSpec,
    DataConfig,
    TrainLoader,
    epoch_order,
    reduced_batch_size,
    text_batches,
    video_batches,
)
from discovla.data.manifest import Clip
from discovla.data.tokens import Tokenizer
from discovla.data.video.errors import DecodeError
from tests.data.conftest import STEP, batch_spec, movie

COUNT = 7  # clips, of two captions each


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Clip]:
    """Clips of one grey level each, by which they are told apart."""
    folder = tmp_path_factory.mktemp("loader")

    def painted(level: int):
        return lambda i, height, width: np.full((height, width, 3), level, np.uint8)

    return [
        Clip(
            id=f"clip{i}",
            video=movie(folder / f"{i}.mp4", 4, size=(32, 48), draw=painted((i + 1) * 3 * STEP)),
            captions=(f"caption {i} a", f"caption {i} b"),
            split="train",
            frame_captions=((f"still {i} x", f"still {i} y"), (f"still {i} z", f"still {i} w")),
        )
        for i in range(COUNT)
    ]


def config(**changes) -> DataConfig:
    return DataConfig(**({"manifest": Path("m.jsonl"), "frames": 2, "workers": 0} | changes))


def spec(**changes) -> BatchSpec:
    return batch_spec(**({"batch_size": 4} | changes))


def test_an_empty_path_is_none():
    assert config(index_dir="", quarantine="") == config()


def same(a: Batch, b: Batch) -> bool:
    """Return True if two batches are equal."""
    names = ("text_ids", "text_mask", "frames", "frame_mask", "video_index", "valid")
    return a.bad == b.bad and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_a_batch_has_the_frames_texts_and_indices_of_its_pairs(clips):
    batch = next(TrainLoader(clips, config(), spec()).epoch(0))
    assert batch.frames.shape == (4, 2, 16, 16, 3)
    assert batch.frames.dtype == torch.uint8
    assert batch.text_ids.shape == batch.text_mask.shape == (4, 12)
    assert batch.frame_mask.all()
    assert batch.valid.all()
    levels = batch.frames.float().mean((1, 2, 3, 4)) / (3 * STEP) - 1
    assert levels.round().long().tolist() == batch.video_index.tolist()
    for row, index in enumerate(batch.video_index.tolist()):
        texts = Tokenizer(12).encode(clips[index].captions)[0]
        assert (texts == batch.text_ids[row]).all(1).any()


def test_an_epoch_has_every_pair_but_the_last_incomplete_batch(clips):
    loader = TrainLoader(clips, config(), spec(batch_size=2))
    assert loader.steps_per_epoch == COUNT
    seen = torch.cat([batch.video_index for batch in loader.epoch(0)])
    assert seen.bincount().tolist() == [2] * COUNT
    assert TrainLoader(clips, config(), spec(batch_size=4)).steps_per_epoch == 3


def test_batches_have_one_frame_caption_per_frame(clips):
    batch = next(TrainLoader(clips, config(), spec(frame_captions=True)).epoch(0))
    assert batch.frame_text_ids.shape == (4, 2, 12)
    row = 1
    clip = clips[batch.video_index[row]]
    expected = [Tokenizer(12).encode(texts)[0] for texts in clip.frame_captions]
    caption = [Tokenizer(12).encode([text])[0][0].tolist() for text in clip.captions].index(
        batch.text_ids[row].tolist()
    )
    assert torch.equal(batch.frame_text_ids[row], expected[caption])
    assert torch.equal(batch.frame_text_mask, batch.frame_text_ids != 0)


def test_a_batch_has_clips_with_their_reverses(clips):
    both = [replace(clip, reversed_captions=("x",)) for clip in clips[:-1]]
    data = config(reversed_pairs=True)
    loader = TrainLoader([*both, clips[-1]], data, spec(batch_size=2 * COUNT + COUNT - 1))
    (batch,) = loader.epoch(0)
    index = batch.video_index.tolist()
    backwards = [(place, ~i) for place, i in enumerate(index) if i < 0]
    assert sorted(i for _, i in backwards) == list(range(COUNT - 1))
    assert all(index[place - 1] == i for place, i in backwards)
    assert sorted(i for i in index if i >= 0) == sorted([*range(COUNT)] * 2)


def test_order_depends_on_seed_and_epoch_alone():
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    torch.manual_seed(9)
    assert epoch_order(50, 0, 0).tolist() == orders[0]
    assert sorted(orders[0]) == list(range(50))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_repeated_exactly(clips, workers):
    loader = TrainLoader(clips, config(workers=workers, augment="light"), spec())
    first = list(loader.epoch(1))
    assert all(same(a, b) for a, b in zip(first, loader.epoch(1), strict=True))
    assert not any(same(a, b) for a, b in zip(first, loader.epoch(2), strict=True))


def test_batches_do_not_depend_on_workers(clips):
    mine = TrainLoader(clips, config(workers=0, augment="light"), spec()).epoch(1)
    theirs = TrainLoader(clips, config(workers=2, augment="light"), spec()).epoch(1)
    assert all(same(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_mid_epoch_gives_the_remaining_batches(clips, workers):
    loader = TrainLoader(clips, config(workers=workers, augment="light"), spec())
    all_batches = list(loader.epoch(2))
    rest = list(loader.epoch(2, start=1))
    assert len(rest) == 2
    assert all(same(a, b) for a, b in zip(all_batches[1:], rest, strict=True))


def test_an_abandoned_epoch_does_not_change_the_next(clips):
    loader = TrainLoader(clips, config(workers=2), spec())
    all_batches = list(loader.epoch(1))
    next(loader.epoch(0))
    assert all(same(a, b) for a, b in zip(all_batches, loader.epoch(1), strict=True))


def test_batches_of_all_ranks_concatenate_to_the_batch_of_one_process(clips):
    one = list(TrainLoader(clips, config(augment="light"), spec()).epoch(0))
    halves = [spec(world_size=2, rank=rank) for rank in (0, 1)]
    ranks = [list(TrainLoader(clips, config(augment="light"), half).epoch(0)) for half in halves]
    for batch, left, right in zip(one, *ranks, strict=True):
        assert torch.equal(batch.frames, torch.cat([left.frames, right.frames]))
        assert torch.equal(batch.text_ids, torch.cat([left.text_ids, right.text_ids]))
        assert torch.equal(batch.video_index, torch.cat([left.video_index, right.video_index]))


def test_reading_does_not_change_the_random_state(clips):
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    list(TrainLoader(clips, config(augment="randaugment"), spec()).epoch(0))
    list(TrainLoader(clips, config(workers=1), spec()).epoch(0))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()


def broken(clips: list[Clip], tmp_path: Path) -> list[Clip]:
    """Return the clips with a text file as the third video."""
    (tmp_path / "bad.mp4").write_text("no video")
    return [replace(clip, video=tmp_path / "bad.mp4") if i == 2 else clip for i, clip in enumerate(clips)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_clip_becomes_an_invalid_row(clips, tmp_path, workers):
    loader = TrainLoader(broken(clips, tmp_path), config(workers=workers), spec(batch_size=2))
    batches = list(loader.epoch(0))
    assert len(batches) == COUNT
    for batch in batches:
        assert batch.valid.tolist() == [index != 2 for index in batch.video_index.tolist()]
        assert len(batch.bad) == (~batch.valid).sum()
    bad = [clip for batch in batches for clip in batch.bad]
    assert [(clip.id, clip.video) for clip in bad] == [("clip2", str(tmp_path / "bad.mp4"))] * 2
    assert bad[0].reason.startswith("not a video file")


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_a_bad_clip_and_names_it(clips, tmp_path, workers):
    with pytest.raises(DecodeError) as error:
        list(video_batches(broken(clips, tmp_path), config(workers=workers), 16, 4))
    assert f"'clip2' ({tmp_path / 'bad.mp4'}): not a video file" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_read_every_clip_once_for_evaluation(clips, world_size):
    seen = []
    for rank in range(world_size):
        for batch in video_batches(clips, config(), 16, 2, rank=rank, world_size=world_size):
            assert batch.frames.shape[1:] == (2, 16, 16, 3)
            assert batch.frame_mask.shape == batch.frames.shape[:2]
            seen += batch.clip_index.tolist()
    assert seen == list(range(COUNT))


def test_some_ranks_have_no_clip_if_there_are_more_ranks_than_clips(clips):
    sizes = [len(list(video_batches(clips[:1], config(), 16, 2, rank=r, world_size=2))) for r in (0, 1)]
    assert sorted(sizes) == [0, 1]


def test_texts_are_in_order_and_cut_to_the_context():
    texts = [f"a caption number {i} of many words" for i in range(5)]
    rows = list(text_batches(texts, 6, 2))
    assert [len(ids) for ids, _ in rows] == [2, 2, 1]
    assert torch.equal(torch.cat([ids for ids, _ in rows]), Tokenizer(6).encode(texts)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "batch_size: expected a multiple of the 2 processes, found 5"),
        ({"batch_size": 0}, "batch_size: expected a multiple of the 1 processes, found 0"),
        ({"batch_size": 64}, "batch_size: expected at most the 14 training pairs, found 64"),
        ({"rank": 2, "world_size": 2}, r"rank: expected 0 .. 1, found 2"),
        (
            {"context_length": 4},
            "captions: expected at most 4 tokens, found 14 longer captions, the first of clip 'clip0' with 5",
        ),
    ],
    ids=["indivisible", "empty", "too large", "rank", "long captions"],
)
def test_an_unusable_batch_size_rank_or_caption_is_refused_before_training(clips, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainLoader(clips, config(), spec(**changes))


def test_a_missing_video_is_refused_before_training(clips, tmp_path):
    clips = [replace(clips[0], video=tmp_path / "none.mp4"), *clips[1:]]
    with pytest.raises(ValueError, match="clip 'clip0': expected a video file, found nothing"):
        TrainLoader(clips, config(), spec())


def test_frame_captions_of_another_number_are_refused_before_training(clips):
    with pytest.raises(ValueError, match="clip 'clip0': frame captions of caption 0: expected 3, found 2"):
        TrainLoader(clips, config(frames=3), spec(frame_captions=True))


def test_long_frame_captions_are_refused_only_if_they_are_used(clips):
    long = [replace(clip, frame_captions=(("word " * 40,) * 2,) * 2) for clip in clips]
    TrainLoader(long, config(), spec())
    with pytest.raises(ValueError, match="captions: expected at most 12 tokens, found 7 longer"):
        TrainLoader(long, config(), spec(frame_captions=True))


def test_truncated_captions_are_logged(clips, caplog):
    with caplog.at_level(logging.WARNING):
        TrainLoader(clips, config(long_captions="truncate"), spec(context_length=4))
    assert "captions: expected at most 4 tokens, found 14 longer" in caplog.text
    assert "they are cut" in caplog.text


def test_pairs_without_frame_captions_are_dropped_by_option(clips):
    some = [replace(clips[0], frame_captions=(None, clips[0].frame_captions[1])), *clips[1:]]
    with pytest.raises(
        ValueError,
        match=r"expected one list for each of 14 captions, found 1 .* without",
    ):
        TrainLoader(some, config(), spec(frame_captions=True))
    dropping = config(missing_frame_captions="drop")
    loader = TrainLoader(some, dropping, spec(frame_captions=True, batch_size=1))
    assert loader.steps_per_epoch == 13


@pytest.mark.parametrize("sampling", ["clip4clip", "clip2video"])
def test_missing_frames_are_black_and_masked_in_training_and_evaluation(clips, sampling):
    settings = config(sampling=sampling, sample_rate=5.0, frames=3)  # clips of 0.4 s: 2 frames
    batches = [next(TrainLoader(clips, settings, spec()).epoch(0)), *video_batches(clips, settings, 16, 4)]
    for batch in batches:
        assert batch.frames.shape[1:] == (3, 16, 16, 3)
        assert batch.frame_mask.tolist() == [[True, True, False]] * len(batch)
        assert batch.frames[:, :2].flatten(1).any(1).all()
        assert not batch.frames[:, 2].any()


@pytest.mark.parametrize("sampling", ["discovla", "t2vparser"])
def test_repeated_frames_are_not_masked(clips, sampling):
    batch = next(TrainLoader(clips, config(sampling=sampling, frames=9), spec()).epoch(0))
    assert batch.frame_mask.all()


def test_a_bad_clip_has_no_masked_frame(clips, tmp_path):
    settings = config(sampling="clip4clip", frames=3)
    for batch in TrainLoader(broken(clips, tmp_path), settings, spec(batch_size=2)).epoch(0):
        assert torch.equal(batch.frame_mask.all(1), ~batch.valid)  # the others have 1 frame


def test_frame_captions_need_the_sampling_that_they_describe(clips):
    with pytest.raises(ValueError, match=r"sampling: expected 'discovla', .* found 'clip4clip'"):
        TrainLoader(clips, config(sampling="clip4clip"), spec(frame_captions=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "clip5"}, "Input should be 'discovla'"),
        ({"sampling": "t2vparser", "sample_rate": 2.0}, "expected 1.0 with sampling = 't2vparser'"),
        ({"sampling": "clip4clip", "sample_rate": 0.5}, "expected a whole number of frames a second"),
        ({"sampling_divisor": 2}, "expected the default unless sampling = 'clip2video'"),
        ({"sampling": "clip2video", "sampling_divisor": 0}, "greater than or equal to 1"),
        (
            {"sampling": "clip2video", "sampling_slice": "last"},
            "expected the default unless sampling = 'clip4clip'",
        ),
    ],
    ids=["unknown", "no rate", "part of a frame", "divisor", "no divisor", "slice"],
)
def test_an_option_of_another_sampling_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_the_options_of_the_sampling_are_accepted():
    assert config(sampling="clip2video", sampling_divisor=2, sampling_slice="even").sampling_divisor == 2
    assert config(sampling="clip4clip", sampling_slice="last", sampling_divisor=1).sampling_slice == "last"


def test_a_start_outside_the_epoch_is_refused(clips):
    loader = TrainLoader(clips, config(), spec())
    with pytest.raises(ValueError, match=r"start: expected 0 .. 3, found 4"):
        next(loader.epoch(0, start=4))
    assert list(loader.epoch(0, start=3)) == []


class Numbers:
    """A dataset whose frames show their index and epoch."""

    frames_per_clip = 2

    def __len__(self) -> int:
        return 6

    def sample(self, index: int, epoch: int) -> Sample:
        frames = np.full((2, 4, 4, 3), 10 * epoch + index, np.uint8)
        return Sample(text=f"number {index}", frames=frames, video_index=index)


def test_any_dataset_can_be_loaded():
    loader = TrainLoader(Numbers(), config(), spec(batch_size=2))
    for batch in loader.epoch(3):
        assert batch.frames[:, 0, 0, 0, 0].tolist() == (30 + batch.video_index).tolist()
        assert batch.frame_text_ids is None


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError, match="frame"):
        config(frame=3)


def test_drawn_stills_can_be_loaded():
    from discovla.drawn_world.stills import Stills

    data = config(stills={"count": 6, "easy_epochs": 1})
    loader = TrainLoader(
        Stills(seed=1, **data.stills.model_dump()), data, spec(batch_size=3, context_length=48)
    )
    batches = list(loader.epoch(0))
    assert [len(batch) for batch in batches] == [3, 3]
    assert all(same(a, b) for a, b in zip(batches, loader.epoch(0), strict=True))


@pytest.mark.parametrize(
    ("pairs", "world_size", "size"), [(35, 1, 32), (35, 2, 32), (35, 3, 24), (5, 1, 5), (5, 2, 4), (8, 1, 8)]
)
def test_a_batch_that_is_reduced_suits_the_processes(pairs, world_size, size):
    assert reduced_batch_size(pairs, world_size) == size


def test_a_batch_larger_than_the_data_is_reduced_if_allowed(clips):
    loader = TrainLoader(clips, config(), spec(batch_size=64), reduce=True)
    assert (loader.spec.batch_size, loader.steps_per_epoch) == (8, 1)
    assert TrainLoader(clips, config(), spec(batch_size=4), reduce=True).spec.batch_size == 4
