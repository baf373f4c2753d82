"""Kill processes of a run again and again: do the others end and name them, is the end as if never killed.

    python benchmarks/faults.py --kills 20 --ranks 2       20 kills -9 of a random rank at random times
    python benchmarks/faults.py --kills 6 --ranks 4 --strategy deepspeed --zero-stage 3 --early 0.3

Each kill hits a random rank of a small training run up to five steps after it was taken up; then
every other process must end by itself within --limit seconds, with one line that names the lost rank, and the
run is started again with resume=true.  In the end its losses must be those of a run that nothing befell, bit
for bit.  One row a kill, and one of the whole, go to --out, one JSON a line.  With --early that share of the
kills falls upon a rank that starts: also before all have come together, of which the others tell that it did
not come.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from benchmarks.measure import machine, results_file, write_row
from discovla.drawn_world.synthetic import WorldSizes, draw_world

TOWER = {"width": 64, "layers": 2, "mlp_ratio": 2.0}
SIZES = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "patch_size": 32, "head_width": 32, **TOWER},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "heads": 2, **TOWER},
}
WORDS = (
    "configs/quickstart.toml",
    "seed=3",
    "batch_size=16",
    "evaluate_every=20",
    "checkpoint_every=2",
    "model.pretrained=random",
    "method.lora_rank=2",
    "method.fused_vision_blocks=1",
    "method.fused_text_blocks=1",
    "data.workers=0",
    "engine.device=cpu",
    "engine.rendezvous_timeout=20",
    "resume=true",
)
ROOT = Path(__file__).parents[1]
STARTING = 4.0  # seconds in which a rank starts on a machine that is busy
SERVER = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A small world, where runs on it go, and how they run."""

    folder: Path
    manifest: Path
    engine: tuple[str, ...]
    steps: int

    def words(self, name: str) -> list[str]:
        """The words of train.py for a run of this name."""
        given = {
            "directory": self.folder / name,
            "model.architecture": self.folder / "sizes.json",
            "data.manifest": self.manifest,
            "steps": self.steps,
        }
        return [*WORDS, *self.engine, *(f"{key}={value}" for key, value in given.items())]


def start(place: Place, name: str, ranks: int) -> tuple[list[Any], list[Path]]:
    """The processes of a run and the files of what they say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [place.folder / f"{name}.{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        log.unlink(missing_ok=True)
        env = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        processes.append(SERVER.Process(target=_rank, args=(place.words(name), str(log), env)))
        processes[-1].start()
    return processes, logs


def _rank(words: list[str], log: str, env: dict[str, str]) -> None:
    """One process: train.py's main with its output in a file."""
    import torch

    from train import main

    os.environ.update(env)
    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    torch.set_num_threads(1)
    sys.exit(main(words))


def steps_of(place: Place, name: str) -> int:
    """How many steps a run has written down."""
    path = place.folder / name / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def written_since(place: Place, name: str, moment: float) -> bool:
    """Whether the processes of a run have come together and begun with its steps since then."""
    path = place.folder / name / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > moment


def wait_for_a_step(place: Place, processes: Sequence[Any], more: int) -> None:
    """Until the processes have come together, begun with their steps and taken some, or one has ended."""
    begun = time.time()
    while not written_since(place, "killed", begun) and all(process.is_alive() for process in processes):
        time.sleep(0.005)
    target = steps_of(place, "killed") + more
    while steps_of(place, "killed") < target and all(process.is_alive() for process in processes):
        time.sleep(0.005)


def kill_once(place: Place, ranks: int, draw: random.Random, *, limit: float, early: float) -> dict[str, Any]:
    """Start the run, kill a rank at some step and moment, and see how the others end."""
    processes, logs = start(place, "killed", ranks)
    more, pause, rank = draw.randrange(5), draw.uniform(0, 0.3), draw.randrange(ranks)
    starting = draw.random() < early
    if starting:
        pause = draw.uniform(0, STARTING)
    else:
        wait_for_a_step(place, processes, more)
    time.sleep(pause)
    step = steps_of(place, "killed")
    processes[rank].kill()
    processes[rank].join()
    began = time.monotonic()
    others = [r for r in range(ranks) if r != rank]
    for other in others:
        processes[other].join(max(0.0, began + limit - time.monotonic()))
    seconds = time.monotonic() - began
    hung = [r for r in others if processes[r].is_alive()]
    for process in processes:
        process.kill()
        process.join()
    # a run that was over before the blow has nobody to name
    finished = all(processes[r].exitcode == 0 for r in others)
    gone = rf"rank {rank} (\(.*\) has ended|did not come|at .* ended before)"
    told = re.compile(rf"error.*: .*({gone}|found none of .*rank {rank} )")
    named = all(told.search(logs[r].read_text()) for r in others)
    return {
        "kind": "kill",
        "starting": starting,
        "rank": rank,
        "after step": step,
        "seconds": round(seconds, 2),
        "hung": hung,
        "named": named,
        "finished": finished,
        "status": [process.exitcode for process in processes],
    }


def whole(place: Place, name: str, ranks: int) -> list[float]:
    """Let a run come to its end; the losses of its steps.

    Raises:
        RuntimeError: it does not end well.
    """
    processes, logs = start(place, name, ranks)
    for process in processes:
        process.join(1800)
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{name}: {[p.exitcode for p in processes]}:\n{logs[0].read_text()[-2000:]}")
    lines = (place.folder / name / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]


def main(words: Sequence[str] | None = None) -> int:
    """Kill, write rows, compare."""
    parser = argparse.ArgumentParser(description="Kill ranks of a run at random and compare its end.")
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--ranks", type=int, default=2, metavar="W")
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    parser.add_argument("--strategy", choices=("torch", "deepspeed"), default="torch")
    parser.add_argument("--zero-stage", choices=range(4), type=int, help="of deepspeed, default: auto")
    early = "share of kills while the ranks start"
    parser.add_argument("--early", type=float, default=0.0, metavar="SHARE", help=early)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60.0, metavar="S", help="for the others to end")
    parser.add_argument("--out", type=Path, help="file of results; default: one of the day and commit")
    given = parser.parse_args(words)
    engine = [f"engine.strategy={given.strategy}"]
    if given.zero_stage is not None:
        engine.append(f"engine.zero_stage={given.zero_stage}")
    where = machine("cpu")
    out, draw = given.out or results_file(where, "faults"), random.Random(given.seed)
    SERVER.set_forkserver_preload(["train", "discovla.engine.deepspeed", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "sizes.json").write_text(json.dumps(SIZES))
        manifest = draw_world(
            folder / "world", sizes=WorldSizes(train=24, val=6, test=8, siblings=0), workers=1
        )
        place = Place(folder=folder, manifest=manifest, engine=tuple(engine), steps=given.steps)
        expected = whole(place, "whole", given.ranks)
        wrong = 0
        for number in range(given.kills):
            row = kill_once(place, given.ranks, draw, limit=given.limit, early=given.early)
            wrong += bool(row["hung"]) or not (row["named"] or row["finished"])
            print(f"kill {number + 1}: {row}", flush=True)
            write_row(out, {"name": "faults", **vars(given) | {"out": None}, **row, **where})
        same = whole(place, "killed", given.ranks) == expected
    row = {"kind": "whole", "kills": given.kills, "wrong": wrong, "same losses": same}
    print(row)
    write_row(out, {"name": "faults", **vars(given) | {"out": None}, **row, **where})
    return 0 if same and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
