"""The threads of a run on a CPU sleep while they wait, and are as many as pay."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from discovla import cpu
from tests.engine.launch import ROOT


@pytest.fixture
def unset(monkeypatch) -> None:
    """Take the user's settings out of the environment; eight cores."""
    for name in (*cpu.WAITING, *cpu.COUNTS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("name", cpu.WAITING)
def test_the_users_way_of_waiting_stays(name, monkeypatch):
    monkeypatch.setenv(name, "own")
    cpu.let_threads_sleep()
    assert [os.environ.get(each) for each in cpu.WAITING] == [
        "own" if each == name else None for each in cpu.WAITING
    ]


@pytest.mark.parametrize("program", ["train", "discovla.cli"])
def test_programs_set_how_threads_wait_before_torch_is_imported(program):
    code = (
        "import sys, os, importlib\n"
        f"program = importlib.import_module({program!r})\n"
        "assert 'torch' not in sys.modules, 'imported with the program'\n"
        "try: program.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in cpu.WAITING}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "PASSIVE"


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(
    ("seconds", "best"),
    [({1: 1.0, 4: 0.5, 8: 0.3}, 8), ({1: 1.0, 4: 0.5, 8: 0.7}, 4), ({1: 0.9, 4: 1.3, 8: 3.1}, 1)],
    ids=["quiet", "half busy", "busy"],
)
def test_the_fastest_number_of_threads_is_taken_and_said(seconds, best):
    count, reason = cpu.choose_threads(1, seconds=seconds.__getitem__)
    assert count == best
    assert reason == "a sample of work took " + ", ".join(
        f"{1000 * s:.1f} ms with {n}" for n, s in seconds.items()
    )


@pytest.mark.usefixtures("unset")
def test_processes_of_one_machine_share_its_cores():
    tried = []
    cpu.choose_threads(4, seconds=lambda count: tried.append(count) or 1.0)
    assert set(tried) == {1, 2}
    assert cpu.choose_threads(8) == (1, "8 cores for 8 processes")


@pytest.mark.usefixtures("unset")
def test_one_slow_round_does_not_decide():
    times = {1: iter([1.0] * 5), 4: iter([0.5, 9.0, 0.5, 0.5, 9.0]), 8: iter([2.0] * 5)}
    assert cpu.choose_threads(1, seconds=lambda count: next(times[count]))[0] == 4


@pytest.mark.usefixtures("unset")
def test_a_resumed_run_keeps_its_number_unless_the_user_sets_one(monkeypatch):
    assert cpu.choose_threads(1, kept=3) == (3, "as the run began")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cpu.choose_threads(1, kept=3) == (torch.get_num_threads(), "OMP_NUM_THREADS")


def test_the_sample_leaves_the_number_of_threads_as_it_is():
    before = torch.get_num_threads()
    assert cpu.time_sample(1) > 0
    assert torch.get_num_threads() == before
