"""Slow ranks are found by each rank's own time per step."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from discovla.engine.distributed import World
from discovla.engine.lifecycle.pace import RankTime, RankTimer, describe_slow_ranks

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class Sleeper(nn.Module):
    def forward(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


def test_loading_and_towers_are_timed_separately_and_averaged_over_steps():
    tower = Sleeper()
    timer = RankTimer(ALONE, [tower], every=2, name="me")

    def batches():
        for _ in range(4):
            time.sleep(0.03)
            yield 0.01

    steps = []
    for seconds in timer.time_loading(batches()):
        tower(seconds)
        tower(seconds)  # as for captions and frame captions
        time.sleep(0.05)  # collectives and backward are not counted
        steps.append(timer.step())
    assert [times is None for times in steps] == [True, False, True, False]
    for (own,) in (steps[1], steps[3]):
        assert 0.03 <= own.loading < 0.06 and 0.02 <= own.towers < 0.05


def test_towers_are_not_timed_while_a_cuda_graph_is_recorded(monkeypatch):
    tower = Sleeper()
    timer = RankTimer(replace(ALONE, device=torch.device("cuda")), [tower], every=1, name="me")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", None)  # calling it would fail
    tower(0.0)
    (own,) = timer.step()
    assert own.towers == 0


def times(*totals: float) -> list[RankTime]:
    return [RankTime(name=f"rank {r}", loading=total / 2, towers=total / 2) for r, total in enumerate(totals)]


@pytest.mark.parametrize(
    ("totals", "named"),
    [
        ((1.0,), []),
        ((0.1, 0.3), [1]),
        ((0.2, 0.2, 0.25, 0.2), []),
        ((9.0, 0.2, 0.2, 7.0), [0, 3]),
        ((0.001, 0.01), []),
    ],
    ids=["alone", "two", "alike", "two of four", "below the minimum"],
)
def test_a_rank_is_slow_by_the_median_of_the_others(totals, named):
    assert [line.split(" is slow")[0] for line in describe_slow_ranks(times(*totals))] == [
        f"rank {rank}" for rank in named
    ]
