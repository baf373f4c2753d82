import numpy as np
import pytest

from discovla.report.intervals import NAMES, gains, intervals
from discovla.retrieval.metrics import summary
from discovla.retrieval.ranks import Ranks


def ranks(n=400, seed=0):
    return np.random.default_rng(seed).geometric(0.2, n)


@pytest.mark.parametrize("n", [1, 2, 7, 400])
def test_values_are_those_of_the_table(n):
    drawn = ranks(n)
    expected = summary(Ranks(ties_against=drawn, optimistic=drawn))
    assert {name: found.value for name, found in intervals(drawn).items()} == pytest.approx(
        {name: expected[name] for name in NAMES}
    )


def test_intervals_are_equal_on_every_call_and_hold_the_value():
    first = intervals(ranks())
    assert first == intervals(ranks())
    assert all(found.low <= found.value <= found.high for found in first.values())


def test_the_interval_of_a_share_has_the_width_of_its_standard_error():
    found = intervals(ranks(), resamples=4000)["R@1"]
    error = np.sqrt(found.value * (100 - found.value) / 400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_captions_of_one_clip_do_not_count_as_independent():
    drawn = np.repeat(ranks(40), 10)
    together = intervals(drawn, np.repeat(np.arange(40), 10))["R@1"]
    alone = intervals(drawn)["R@1"]
    assert together.value == alone.value
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_a_gain_on_the_same_queries_is_surer_than_two_intervals():
    before = ranks() + 1
    after = before - (np.arange(400) % 4 == 0)
    gain, one = gains(before, after)["MnR"], intervals(after)["MnR"]
    assert gain.value == pytest.approx(-0.25) and gain.high < 0
    assert gain.high - gain.low < (one.high - one.low) / 2


def test_large_sets_are_resampled_in_blocks_with_equal_results(monkeypatch):
    whole = intervals(ranks(50), resamples=30)
    monkeypatch.setattr("discovla.report.intervals.CELLS", 50 * 7)
    assert intervals(ranks(50), resamples=30) == whole
