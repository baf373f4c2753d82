"""Frames sampled from a clip."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from discovla.data.sampling import (
    Sampling,
    divide_stored,
    frame_indices,
    second_indices,
    segment_indices,
    slice_indices,
    stored_indices,
)


def test_frames_are_those_of_the_golden_file(golden):
    cases = json.loads((golden / "discovla/frame_sampling.json").read_text())["cases"]
    assert cases
    for case in cases:
        indices = frame_indices(
            case["length"],
            case["fps"],
            case["max_frames"],
            sample_rate=case["framerate"],
            start=case.get("start_s"),
            end=case.get("end_s"),
        )
        assert indices == case["indices"], case


def test_a_clip_shorter_than_the_frames_repeats_them():
    assert frame_indices(3, 10.0, 5) == [0, 0, 1, 1, 2]


def test_as_many_positions_as_frames_are_kept_unchanged():
    assert frame_indices(9, 4.0, 3) == [0, 4, 8]


@pytest.mark.parametrize(("rate", "stride"), [(1.5, 2), (2.5, 2), (3.5, 4)])
def test_a_half_stride_rounds_to_even(rate, stride):
    assert frame_indices(2 * stride + 1, rate, 3) == [0, stride, 2 * stride]


def test_a_sample_rate_scales_the_stride():
    assert frame_indices(41, 20.0, 5, sample_rate=2.0) == [0, 10, 20, 30, 40]


def test_a_stride_of_zero_is_refused_with_its_rate():
    with pytest.raises(
        ValueError, match=r"sample_rate: expected at most 0.8 for a 0.4 fps clip, found 1, .* stride of 0"
    ):
        frame_indices(30, 0.4, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 25.0, 12), "count: expected at least 1 frame that decodes, found 0"),
        ((10, 0.0, 12), "rate: expected frames per second above 0, found 0.0"),
        ((10, float("nan"), 12), "rate: expected frames per second above 0, found nan"),
        ((10, 25.0, 0), "frames: expected at least 1, found 0"),
    ],
    ids=["no frames", "no rate", "rate nan", "frames 0"],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        frame_indices(*arguments)


def test_a_span_after_the_end_names_the_length_of_the_clip():
    with pytest.raises(
        ValueError, match=r"start: expected a time before .* \(3.000 s, 30 frames\), found 5 s"
    ):
        frame_indices(30, 10.0, 4, start=5.0, end=6.0)


def test_a_negative_time_is_refused():
    with pytest.raises(ValueError, match=r"start: expected seconds not below 0, found -1\.0"):
        frame_indices(30, 10.0, 4, start=-1.0)


def test_a_start_alone_runs_to_the_last_frame():
    assert frame_indices(31, 10.0, 3, start=1.0) == [10, 20, 30]


def golden_cases(golden, key: str) -> list[dict]:
    cases = json.loads((golden / "clip2video/frame_sampling.json").read_text())["cases"]
    chosen = [case for case in cases if key in case]
    assert chosen
    return chosen


def test_clip2video_samples_the_frames_of_the_golden_file(golden):
    for case in golden_cases(golden, "clip2video_eval_indices"):
        indices = divide_stored(case["n_frames"], case["divisor"], case["max_frames"])
        assert indices == case["clip2video_eval_indices"], case


def test_clip2video_samples_the_golden_frames_of_clips_at_the_stored_rate(golden):
    for case in golden_cases(golden, "clip2video_eval_indices"):
        if not case["clip2video_eval_indices"]:
            continue
        sampling = Sampling(
            frames=case["max_frames"], sampler="clip2video", sample_rate=5.0, divisor=case["divisor"]
        )
        assert sampling.indices(case["n_frames"], 5.0) == case["clip2video_eval_indices"], case


def test_clip4clip_keeps_the_frames_of_the_golden_file(golden):
    for case in golden_cases(golden, "clip4clip_uniform_indices"):
        indices = slice_indices(list(range(case["n_frames"])), case["max_frames"], "even")
        assert indices == case["clip4clip_uniform_indices"], case
        sampling = Sampling(frames=case["max_frames"], sampler="clip4clip")
        assert sampling.indices(case["n_frames"], 1.0) == case["clip4clip_uniform_indices"], case


def test_seconds_are_counted_by_the_whole_part_of_the_rate():
    assert second_indices(100, 29.97) == [0, 29, 58, 87]


def test_several_frames_of_a_second_lie_a_whole_stride_apart():
    assert second_indices(100, 29.97, sample_rate=2.0) == [0, 14, 29, 43, 58, 72, 87]


def test_seconds_start_and_end_with_the_span():
    assert second_indices(100, 10.9, span=(1.5, 3.5)) == [15, 25, 35]


@pytest.mark.parametrize(
    ("slice", "kept"), [("even", [0, 3, 7]), ("first", [0, 1, 2]), ("last", [5, 6, 7])], ids=str
)
def test_too_many_frames_are_cut_to_the_slice_of_the_config(slice, kept):
    assert slice_indices(list(range(8)), 3, slice) == kept
    assert slice_indices([4, 9], 3, slice) == [4, 9]


def test_stored_frames_are_the_frames_shown_at_their_times():
    assert stored_indices(12, 10.0) == [0, 2, 4, 6, 8, 10]
    assert stored_indices(13, 12.5) == [0, 2, 5, 7, 10]
    assert stored_indices(40, 10.0, span=(2.0, 3.0)) == [20, 22, 24, 26, 28, 30]


def test_stored_frames_repeat_those_of_a_slower_clip():
    assert stored_indices(5, 2.0) == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4]


def test_jitter_shifts_all_but_the_ends_by_up_to_half_the_first_gap():
    drawn = [divide_stored(151, 1, 6, random.Random(i)) for i in range(1500)]
    assert {tuple(row[::5]) for row in drawn} == {(0, 150)}
    for place, middle in ((1, 30), (2, 60), (4, 120)):
        assert {row[place] for row in drawn} == set(range(middle - 15, middle + 15))


def test_jitter_shifts_among_the_divided_frames():
    left = divide_stored(151, 2, 75)
    drawn = [divide_stored(151, 2, 6, random.Random(i)) for i in range(800)]
    assert {row[1] for row in drawn} == set(left[14 - 7 : 14 + 7])


def test_jitter_leaves_short_gaps_and_unthinned_frames_unchanged():
    assert divide_stored(60, 1, 12, random.Random(0)) == divide_stored(60, 1, 12)  # gap 5, so h = 2
    assert divide_stored(24, 2, 12, random.Random(0)) == divide_stored(24, 2, 12)
    assert divide_stored(90, 1, 1, random.Random(0)) == [0]
    assert any(
        divide_stored(73, 1, 12, random.Random(i)) != divide_stored(73, 1, 12) for i in range(5)
    )  # h = 3


def test_evaluation_samples_the_middle_of_each_segment():
    assert segment_indices(25, 30.0, 12) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23]
    assert segment_indices(61, 30.0, 3) == [10, 30, 50]
    assert segment_indices(91, 10.0, 3, span=(3.0, 9.0)) == [40, 60, 80]


def test_segments_shorter_than_a_frame_round_half_to_even():
    assert segment_indices(7, 30.0, 12) == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6]
    assert segment_indices(1, 30.0, 4) == [0, 0, 0, 0]


def test_training_samples_any_frame_of_a_segment_ends_included():
    drawn = [segment_indices(26, 30.0, 10, generator=random.Random(i)) for i in range(300)]
    edges = [0, 2, 5, 8, 10, 12, 15, 18, 20, 22, 25]  # 2.5 i, half to even
    for i in range(10):
        assert {row[i] for row in drawn} == set(range(edges[i], edges[i + 1] + 1))


@pytest.mark.parametrize("sampler", ["clip2video", "t2vparser"])
def test_random_sampling_depends_on_the_seed_alone(sampler):
    def frames(seed: str | None) -> list[int]:
        return Sampling(frames=4, sampler=sampler, sample_rate=5.0, seed=seed).indices(900, 30.0)

    random.seed(1)
    first = [frames(f"0/0/{i}") for i in range(8)]
    random.seed(2)
    assert [frames(f"0/0/{i}") for i in range(8)] == first
    assert [frames(f"0/1/{i}") for i in range(8)] != first
    assert len({tuple(row) for row in first}) == 8
    assert frames(None) not in first


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "discovla"},
        {"sampler": "clip4clip", "slice": "last"},
        {"sampler": "clip2video", "sample_rate": 5.0, "divisor": 2, "start": 2.0, "end": 21.0},
        {"sampler": "t2vparser", "start": 3.5, "end": 5.0},
    ],
    ids=lambda options: options["sampler"],
)
def test_candidates_hold_the_frames_of_every_seed_and_few_others(options):
    sampling = Sampling(frames=4, **options)
    seen = {index for seed in range(900) for index in replace(sampling, seed=str(seed)).indices(400, 12.5)}
    seen |= set(sampling.indices(400, 12.5))
    candidates = sampling.candidates(400, 12.5)
    assert candidates == sorted(set(candidates))
    assert seen <= set(candidates)
    # CLIP2Video moves frames by less than half of what lies between them, so that some are out of reach
    assert len(seen) >= 0.6 * len(candidates)


@pytest.mark.parametrize("sampler", ["discovla", "clip4clip"])
def test_the_other_samplings_ignore_the_seed(sampler):
    sampling = Sampling(frames=4, sampler=sampler, seed="0/0/1")
    assert not sampling.is_random
    assert sampling.indices(900, 30.0) == Sampling(frames=4, sampler=sampler).indices(900, 30.0)


@pytest.mark.parametrize(
    ("options", "count", "rate", "message"),
    [
        (
            {"sampler": "clip4clip"},
            9,
            0.9,
            "rate: expected at least 1 fps for sampling = 'clip4clip', found 0.9",
        ),
        (
            {"sampler": "clip4clip", "sample_rate": 11},
            9,
            10.0,
            "sample_rate: expected a whole number of 1..10 for a 10 fps clip, found 11",
        ),
        ({"sampler": "clip4clip", "sample_rate": 2.5}, 9, 10.0, "expected a whole number .* found 2.5"),
        (
            {"sampler": "clip2video", "sample_rate": 5.0, "divisor": 3},
            4,
            10.0,
            "sampling_divisor: expected at most the 2 frames stored at 5 a second, found 3",
        ),
        ({"sampler": "clip2video", "divisor": 0}, 9, 10.0, "divisor, frames: expected at least 1 each"),
        ({"sampler": "t2vparser"}, 0, 10.0, "count: expected at least 1 frame that decodes, found 0"),
        (
            {"sampler": "t2vparser", "start": 5.0},
            9,
            10.0,
            r"start: expected a time before .* \(0.900 s, 9 frames\), found 5 s",
        ),
        (
            {"sampler": "clip4clip", "start": 5.0},
            9,
            10.0,
            r"start: expected a time before .* \(0.900 s, 9 frames\), found 5 s",
        ),
        ({"sampler": "clip5"}, 9, 10.0, "sampler: expected one of discovla, clip4clip, .* found 'clip5'"),
        ({"sampler": "clip4clip", "slice": "odd"}, 90, 10.0, "slice: expected one of even, .* found 'odd'"),
    ],
    ids=str,
)
def test_a_sampling_without_frames_is_refused_with_the_reason(options, count, rate, message):
    with pytest.raises(ValueError, match=message) as error:
        Sampling(**({"frames": 4} | options)).indices(count, rate)
    assert "\n" not in str(error.value)
