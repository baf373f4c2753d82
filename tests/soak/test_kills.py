"""Runs whose ranks are killed again and again: all others end and name them, and the run resumes bit for bit.

pytest -m soak tests/soak/test_kills.py                          all cases, half an hour
DISCOVLA_SOAK_RECORD=1 pytest -m soak -k "torch and training"    one case, with rows in benchmarks/results
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.soak.recording import record

LIMIT = 60.0  # seconds for the other ranks to end
START_SECONDS = 4.0  # in which a rank starts on a busy machine


@dataclass(frozen=True, kw_only=True)
class Case:
    """Kills of random ranks at random times.

    early: share of kills while ranks start, also before all have joined; the rest fall up to five steps after
    the run has resumed.
    """

    kills: int
    ranks: int = 2
    steps: int = 60
    strategy: str = "torch"
    zero_stage: int | str = "auto"
    early: float = 0.0
    seed: int = 0


CASES = {
    "torch, in training": Case(kills=20),
    "torch, at start": Case(kills=12, ranks=4, steps=12, early=1.0, seed=7),
    "zero1": Case(kills=10, strategy="deepspeed", zero_stage=1, early=0.3),
    "zero2": Case(kills=10, strategy="deepspeed", zero_stage=2, early=0.3),
    "zero3": Case(kills=6, ranks=4, strategy="deepspeed", zero_stage=3, early=0.3),
}


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_that_is_killed_again_and_again_has_the_losses_of_one_that_is_not(case, tmp_path, drawn):
    config = runs.write_config(tmp_path, drawn)
    words = [config, f"steps={case.steps}", "checkpoint_every=2", "evaluate_every=20", "resume=true"]
    words += [f"engine.strategy={case.strategy}", f"engine.zero_stage={case.zero_stage}"]
    words += ["engine.rendezvous_timeout=20"]
    facts = {**asdict(case), "limit": LIMIT}

    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    runs.train([*words, f"directory={uninterrupted}"], size=case.ranks, timeout=1800)
    draw, wrong = random.Random(case.seed), 0
    for _ in range(case.kills):
        row = kill_one([*words, f"directory={killed}"], killed, case, draw)
        wrong += bool(row["hung"]) or not (row["named"] or row["finished"])
        record("faults", facts | row)
    runs.train([*words, f"directory={killed}"], size=case.ranks, timeout=1800)
    same = runs.records(killed) == runs.records(uninterrupted)
    record("faults", {**facts, "kind": "whole", "wrong": wrong, "same losses": same})
    assert same and not wrong


def kill_one(words: list[object], directory: Path, case: Case, draw: random.Random) -> dict[str, Any]:
    """Start the run, kill a random rank and return how the others ended."""
    job = runs.start(words, size=case.ranks)
    more, pause, rank = draw.randrange(5), draw.uniform(0, 0.3), draw.randrange(case.ranks)
    starting = draw.random() < case.early
    if starting:
        pause = draw.uniform(0, START_SECONDS)
    else:
        wait_for_steps(job, directory, more)
    time.sleep(pause)
    step = count_steps(directory)
    job.processes[rank].kill()
    job.processes[rank].join()
    killed_at = time.monotonic()
    others = [other for other in range(case.ranks) if other != rank]
    for other in others:
        job.processes[other].join(max(0.0, killed_at + LIMIT - time.monotonic()))
    seconds = time.monotonic() - killed_at
    hung = [other for other in others if job.processes[other].is_alive()]
    for process in job.processes:
        process.kill()
        process.join()
    lost = rf"rank {rank} (\(.*\) has ended|missing|at .* ended before)"
    named = re.compile(rf"error.*: .*({lost}|found none of .*rank {rank} )")
    return {
        "kind": "kill",
        "starting": starting,
        "rank": rank,
        "after step": step,
        "seconds": round(seconds, 2),
        "hung": hung,
        "named": all(named.search(job.output(other)) for other in others),
        # a run that had finished before the kill names nobody
        "finished": all(job.processes[other].exitcode == 0 for other in others),
        "status": [process.exitcode for process in job.processes],
    }


def wait_for_steps(job: runs.Job, directory: Path, more: int) -> None:
    """Wait until the run has resumed and taken some more steps, or a rank has ended."""
    metrics, began = directory / "metrics.jsonl", time.time()

    def running() -> bool:
        return all(process.is_alive() for process in job.processes)

    while running() and not (metrics.exists() and metrics.stat().st_mtime > began):
        time.sleep(0.005)
    target = count_steps(directory) + more
    while running() and count_steps(directory) < target:
        time.sleep(0.005)


def count_steps(directory: Path) -> int:
    """Return the number of steps that a run has recorded."""
    metrics = directory / "metrics.jsonl"
    return metrics.read_bytes().count(b'"kind": "train"') if metrics.exists() else 0
