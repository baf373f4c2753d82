"""Memory of a run's processes over its steps, and the time that checkpoints take from training.

The processes are observed from outside: their memory by the system, steps and checkpoints by metrics.jsonl.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import runs
from tests.soak.recording import record
from tests.soak.test_kills import count_steps

INTERVAL, SPAN = 10, 100  # steps between samples, and steps of a row


@pytest.mark.parametrize(
    ("steps", "checkpoint_every", "timeout"),
    [
        pytest.param(300, 10, 200, marks=pytest.mark.slow),
        pytest.param(2000, 50, 3000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
def test_memory_stays_steady_over_steps_and_checkpoints(steps, checkpoint_every, timeout, tmp_path, drawn):
    """Batches, states and checkpoints are some 100 KB each, so keeping one per step would show."""
    words = [runs.write_config(tmp_path, drawn), f"steps={steps}", f"checkpoint_every={checkpoint_every}"]
    words += ["batch_size=4", f"evaluate_every={steps // 2}", "engine.strategy=deepspeed"]
    job = runs.start(words, size=2)
    samples = sample_memory(job, tmp_path / "run")
    assert job.wait(timeout) == [0, 0], job.output()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    whole = {
        "kind": "whole",
        **checkpoint_cost(rows, batch_size=4),
        "growth_mb": [growth(samples[rank]) for rank in (0, 1)],
    }
    facts = {"steps": steps, "ranks": 2, "checkpoint_every": checkpoint_every, "batch": 4}
    for rank in (0, 1):
        for row in medians(samples[rank]):
            record("steady", {**facts, "kind": "memory", "rank": rank, **row})
    record("steady", {**facts, **whole})
    assert whole["checkpoints"] >= steps // checkpoint_every
    assert max(whole["growth_mb"]) <= 8
    assert whole["held_share"] < 0.5


def sample_memory(job: runs.Job, directory: Path) -> list[list[dict[str, float]]]:
    """Sample the memory of each rank every `INTERVAL` steps until the run ends."""
    processes = [psutil.Process(process.pid) for process in job.processes]
    samples: list[list[dict[str, float]]] = [[] for _ in processes]
    due = INTERVAL
    while all(process.is_alive() for process in job.processes):
        time.sleep(0.05)
        step = count_steps(directory)
        if step < due:
            continue
        due = step - step % INTERVAL + INTERVAL
        for own, process in zip(samples, processes, strict=True):
            try:
                memory = process.memory_full_info()
            except psutil.Error:  # it has just ended
                return samples
            own.append({"step": step, "mb": memory.uss / 1e6, "resident_mb": memory.rss / 1e6})
    return samples


def medians(samples: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return the medians of the samples of each `SPAN` steps."""
    spans: dict[int, list[dict[str, float]]] = {}
    for sample in samples:
        spans.setdefault(-(-int(sample["step"]) // SPAN) * SPAN, []).append(sample)
    return [
        {"step": step} | {key: statistics.median(x[key] for x in group) for key in ("mb", "resident_mb")}
        for step, group in spans.items()
    ]


def growth(samples: Sequence[dict[str, float]]) -> float:
    """Return the MB between the medians of the second and the last fifth of the samples."""
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    return statistics.median(x["mb"] for x in late) - statistics.median(x["mb"] for x in early)


def checkpoint_cost(rows: Sequence[dict[str, Any]], batch_size: int) -> dict[str, float]:
    """Return the number of checkpoints and the time they hold rank 0 up, in steps and as a share."""
    held = [row["held_seconds"] for row in rows if row["kind"] == "checkpoint"]
    steps = [batch_size / row["clips_per_second"] for row in rows if row["kind"] == "train"]
    return {
        "checkpoints": len(held),
        "held_over_step": statistics.median(held) / statistics.median(steps),
        "held_share": sum(held) / sum(steps),
    }


def test_growth_leaves_out_the_first_fifth():
    samples = [{"mb": mb} for mb in (1.0, 90.0, 100.0, 102.0, 100.0, 100.0, 100.0, 100.0, 103.0, 104.0)]
    assert growth(samples) == 103.5 - 101.0
