"""Who holds the others up is found by the time that each took by itself."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from discovla.engine.distributed import World
from discovla.engine.lifecycle.pace import Pace, Share, slow

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Sleeper(nn.Module):
    def forward(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


def test_reading_and_towers_are_timed_apart_and_averaged_over_steps():
    tower = Sleeper()
    pace = Pace(ALONE, [tower], every=2, name="me")

    def batches():
        for _ in range(4):
            time.sleep(0.03)
            yield 0.01

    found = []
    for seconds in pace.reading(batches()):
        tower(seconds)
        tower(seconds)  # such as captions and frame captions
        time.sleep(0.05)  # collectives and backward count for nothing
        found.append(pace.step())
    assert [shares is None for shares in found] == [True, False, True, False]
    for shares in (found[1], found[3]):
        (share,) = shares
        assert 0.03 <= share.reading < 0.06 and 0.02 <= share.towers < 0.05


def test_towers_are_not_timed_while_a_step_is_recorded(monkeypatch):
    tower = Sleeper()
    pace = Pace(replace(ALONE, device=torch.device("cuda")), [tower], every=1, name="me")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", None)  # none may be recorded
    tower(0.0)
    (share,) = pace.step()
    assert share.towers == 0


def shares(*totals: float) -> list[Share]:
    return [Share(name=f"rank {r}", reading=total / 2, towers=total / 2) for r, total in enumerate(totals)]


@pytest.mark.parametrize(
    ("totals", "named"),
    [
        ((1.0,), []),
        ((0.1, 0.3), [1]),
        ((0.2, 0.2, 0.25, 0.2), []),
        ((9.0, 0.2, 0.2, 7.0), [0, 3]),
        ((0.001, 0.01), []),
    ],
    ids=["alone", "two", "alike", "two of four", "too little to matter"],
)
def test_a_rank_is_slow_beside_the_median_of_the_others(totals, named):
    assert [line.split(" is slow")[0] for line in slow(shares(*totals))] == [f"rank {rank}" for rank in named]
