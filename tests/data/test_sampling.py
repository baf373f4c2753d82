"""Frames sampled from a clip."""

from __future__ import annotations

import json

import pytest

from discovla.data.sampling import frame_indices


def test_frames_are_those_of_the_golden_file(golden):
    cases = json.loads((golden / "discovla/frame_sampling.json").read_text())["cases"]
    assert cases
    for case in cases:
        found = frame_indices(
            case["length"],
            case["fps"],
            case["max_frames"],
            sample_rate=case["framerate"],
            start=case.get("start_s"),
            end=case.get("end_s"),
        )
        assert found == case["indices"], case


def test_a_clip_shorter_than_the_frames_repeats_them():
    assert frame_indices(3, 10.0, 5) == [0, 0, 1, 1, 2]


def test_as_many_positions_as_frames_are_taken_as_they_are():
    assert frame_indices(9, 4.0, 3) == [0, 4, 8]


@pytest.mark.parametrize(("rate", "stride"), [(1.5, 2), (2.5, 2), (3.5, 4)])
def test_a_half_stride_rounds_to_even(rate, stride):
    assert frame_indices(2 * stride + 1, rate, 3) == [0, stride, 2 * stride]


def test_a_sample_rate_scales_the_stride():
    assert frame_indices(41, 20.0, 5, sample_rate=2.0) == [0, 10, 20, 30, 40]


def test_a_stride_of_zero_is_refused_with_its_rate():
    with pytest.raises(ValueError, match=r"sample_rate: 1 frames .* 0.4 .* stride of 0 .* at most 0.8"):
        frame_indices(30, 0.4, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 25.0, 12), "count: expected at least 1 frame that decodes, got 0"),
        ((10, 0.0, 12), "rate: expected frames per second above 0, got 0.0"),
        ((10, float("nan"), 12), "rate: expected frames per second above 0, got nan"),
        ((10, 25.0, 0), "frames: expected at least 1, got 0"),
    ],
    ids=["no frames", "no rate", "rate nan", "none wanted"],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        frame_indices(*arguments)


def test_a_span_after_the_end_names_the_length_of_the_clip():
    with pytest.raises(ValueError, match=r"start: 5 s is frame 50, the clip ends with 29 \(3.000 s\)"):
        frame_indices(30, 10.0, 4, start=5.0, end=6.0)


def test_a_negative_time_is_refused():
    with pytest.raises(ValueError, match=r"start: expected seconds not below 0, got -1\.0"):
        frame_indices(30, 10.0, 4, start=-1.0)


def test_a_start_alone_runs_to_the_last_frame():
    assert frame_indices(31, 10.0, 3, start=1.0) == [10, 20, 30]
