"""What may pass is tried again, a set number of times and with growing pauses."""

from __future__ import annotations

import pytest

from discovla.data import retry
from discovla.data.retry import Passing, Tries


class Ask:
    """Fails as often as told, then gives 7."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.asked = list(errors), 0

    def __call__(self) -> int:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", found.append)
    return found


def test_pauses_double_up_to_the_longest_and_each_failure_is_told(pauses):
    told: list[str] = []
    ask = Ask(*(Passing(word) for word in "abcd"))
    assert Tries(count=5, wait=0.5, longest=1.5).of(ask, told.append) == 7
    assert pauses == [0.5, 1.0, 1.5, 1.5]
    assert told == [f"{word}, attempt {number} of 5" for number, word in enumerate("abcd", 1)]


def test_the_last_failure_is_raised_without_a_pause_after_it(pauses):
    ask = Ask(*(Passing(word) for word in "abc"))
    with pytest.raises(Passing, match="c"):
        Tries(count=3, wait=1.0).of(ask)
    assert (ask.asked, pauses) == (3, [1.0, 2.0])


def test_what_will_not_pass_is_raised_at_once(pauses):
    ask = Ask(ValueError("no such key"))
    with pytest.raises(ValueError, match="no such key"):
        Tries(count=3, wait=1.0).of(ask)
    assert (ask.asked, pauses) == (1, [])
