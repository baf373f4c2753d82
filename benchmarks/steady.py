"""Does a run's memory stay steady over its steps, and how long do its checkpoints hold it up.

    python benchmarks/steady.py                        2,000 steps of two processes, a checkpoint every 50
    python benchmarks/steady.py --tune full --steps 200 --evaluate-every 100 --width 512

The run is train.py's own, of a tiny model on a small drawn world, with evaluations and checkpoints.  Every
process notes each tenth step what memory it has to itself, and all that is resident; a row for each hundred
steps has the medians.  The last row says by how much the first grew after a fifth of the run, and what
checkpoints took beside the time of steps.  Rows go to --out, one JSON a line.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.faults import ROOT, SERVER, SIZES, WORDS
from benchmarks.measure import machine, read_rows, results_file, write_row
from discovla.drawn_world.synthetic import WorldSizes, draw_world

SPAN, LOOK = 100, 10  # steps of a row, and between looks


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run in `folder`: words of train.py beyond the benchmarks' own, and its processes."""

    folder: Path
    words: tuple[str, ...]
    ranks: int

    def carry_out(self, timeout: float) -> None:
        """From the first step to the results.

        Raises:
            RuntimeError: a process did not end well, or in time.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = [
            SERVER.Process(target=_rank, args=(self, rank, port, timeout)) for rank in range(self.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        for process in processes:
            process.kill()
            process.join()
        if any(process.exitcode for process in processes):
            log = (self.folder / "0.log").read_text()
            raise RuntimeError(f"ranks ended with {[p.exitcode for p in processes]}:\n{log[-2000:]}")

    def looks(self, rank: int) -> list[dict[str, Any]]:
        """What a process noted, every tenth step."""
        return read_rows(self.folder / f"{rank}.jsonl")

    def memory(self, rank: int) -> list[dict[str, Any]]:
        """For each span of steps the median of what a process had to itself."""
        spans: dict[int, list[dict[str, Any]]] = {}
        for look in self.looks(rank):
            spans.setdefault(-(-look["step"] // SPAN) * SPAN, []).append(look)
        return [
            {"rank": rank, "step": step}
            | {key: statistics.median(look[key] for look in looks) for key in ("mb", "resident_mb")}
            for step, looks in spans.items()
        ]

    def held(self) -> dict[str, Any]:
        """Checkpoints, how long one held the first process up over a step, and all over all its steps."""
        rows = [json.loads(line) for line in (self.folder / "run/metrics.jsonl").read_text().splitlines()]
        seconds = [row["held_seconds"] for row in rows if row["kind"] == "checkpoint"]
        steps = [row["step_seconds"] for row in self.looks(0)]
        return {
            "checkpoints": len(seconds),
            "held_over_step": statistics.median(seconds) / (statistics.median(steps) / LOOK),
            "held_share": sum(seconds) / sum(steps),
        }


def growth(looks: Sequence[dict[str, Any]]) -> float:
    """MB between the medians of the second and of the last fifth of what a process noted."""
    fifth = len(looks) // 5
    early, late = looks[fifth : 2 * fifth], looks[-fifth:]
    return statistics.median(row["mb"] for row in late) - statistics.median(row["mb"] for row in early)


def _rank(run: Run, rank: int, port: str, timeout: float) -> None:
    """One process: train.py's main, which notes its memory."""
    import signal

    import torch

    from train import main

    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(run.ranks), "LOCAL_RANK": str(rank)}
    os.chdir(ROOT)
    descriptor = os.open(run.folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    torch.set_num_threads(1)
    signal.alarm(int(timeout))  # nobody may outlive the benchmark
    look_in(run.folder / f"{rank}.jsonl")
    sys.exit(main(list(run.words)))


def look_in(path: Path) -> None:
    """Let the trainer of this process write a row every tenth step: its memory, and the seconds of ten."""
    import time

    import psutil

    from discovla.batch import Batch
    from discovla.trainer import Trainer

    process, step, after = psutil.Process(), Trainer._step, Trainer._after_step
    took: list[float] = []

    def timed(self: Trainer, number: int, batch: Batch) -> None:
        began = time.perf_counter()
        step(self, number, batch)
        took.append(time.perf_counter() - began)

    def looked(self: Trainer, done: int, last: int) -> None:
        after(self, done, last)
        if done % LOOK == 0:
            info = process.memory_full_info()
            row = {"step": done, "mb": info.uss / 1e6, "resident_mb": info.rss / 1e6}
            write_row(path, {**row, "step_seconds": sum(took)})
            took.clear()

    setattr(Trainer, "_step", timed)  # noqa: B010, other names of its parameters do not matter
    setattr(Trainer, "_after_step", looked)  # noqa: B010


def prepare(folder: Path, given: argparse.Namespace) -> Run:
    """A drawn world and the words of a run on it."""
    sizes = {**SIZES}
    for side in ("vision_cfg", "text_cfg"):
        sizes[side] = {**SIZES[side], "width": given.width}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    world = WorldSizes(train=24, val=6, test=8, siblings=0)
    words = {
        "directory": folder / "run",
        "model.architecture": folder / "sizes.json",
        "data.manifest": draw_world(folder / "world", sizes=world, workers=1),
        "batch_size": given.batch,
        "steps": given.steps,
        "checkpoint_every": given.checkpoint_every,
        "evaluate_every": given.evaluate_every,
        "method.tune": given.tune,
        "engine.strategy": given.strategy,
        "resume": "false",
    }
    given_words = (*WORDS, *(f"{key}={value}" for key, value in words.items()))
    return Run(folder=folder, words=given_words, ranks=given.ranks)


def main(words: Sequence[str] | None = None) -> int:
    """Run, write rows, say how steady it was."""
    parser = argparse.ArgumentParser(description="Note the memory of a run's processes over its steps.")
    add = partial(parser.add_argument, type=int, metavar="N")
    for name, value in {"steps": 2000, "ranks": 2, "checkpoint-every": 50, "evaluate-every": 500}.items():
        add(f"--{name}", default=value)
    add("--batch", default=4, help="clips of a step")
    add("--width", default=64, help="of both towers")
    parser.add_argument("--tune", choices=("lora", "full"), default="lora")
    parser.add_argument("--strategy", choices=("torch", "deepspeed"), default="deepspeed")
    parser.add_argument("--timeout", type=float, default=3000.0, metavar="S")
    parser.add_argument("--out", type=Path, help="file of results; default: one of the day and commit")
    given = parser.parse_args(words)
    if given.steps < 5 * LOOK:
        parser.error(f"--steps: expected at least {5 * LOOK}, found {given.steps}")
    where = machine("cpu")
    out = given.out or results_file(where, "steady")
    what = {"name": "steady", **vars(given) | {"out": None}}
    SERVER.set_forkserver_preload(["train", "discovla.engine.deepspeed", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as made:
        run = prepare(Path(made), given)
        run.carry_out(given.timeout)
        found = [run.memory(rank) for rank in range(given.ranks)]
        ends = {"kind": "whole", **run.held()}
        ends["growth_mb"] = [growth(run.looks(rank)) for rank in range(given.ranks)]
    for rows in found:
        for row in rows:
            write_row(out, {**what, "kind": "memory", **row})
    print(ends)
    write_row(out, {**what, **ends, **where})
    return 0


if __name__ == "__main__":
    sys.exit(main())
