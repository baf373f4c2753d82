"""Time from the start of the program to the first training step of the quickstart, beside `import torch`.

    discovla train quickstart stop_at=1    draws the clips, once
    python benchmarks/start.py             one thread; --threads 2 for two

Both take turns, each in a process of its own.  The CPU time is that of the process and of its workers.  One
row goes to benchmarks/results/cpu/start.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there

from benchmarks.measure import RESULTS, machine, write_row

FILE = RESULTS / "cpu/start.jsonl"
TORCH = ("-c", "import torch, json; print(json.dumps({'kind': 'train'}), flush=True); input()")
STEP = ("-m", "discovla", "train", "quickstart", "--json", "stop_at=1")


def measure(words: Sequence[str], threads: int) -> tuple[float, float]:
    """Return seconds, and seconds of CPU time, until a program prints the JSON line of a training step."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    program = subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert program.stdout is not None
    for line in program.stdout:
        if json.loads(line)["kind"] == "train":
            wall, cpu = time.perf_counter() - began, cpu_seconds(program.pid)
            program.communicate("\n")
            return wall, cpu
    raise ValueError(f"{' '.join(words)}: expected the JSON line of a step, found none")


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process and of its children, living and ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for child in children)


def main(words: Sequence[str] | None = None) -> int:
    """Measure both in turns and write the row of results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(words)
    times: dict[str, list[tuple[float, float]]] = {"import_torch": [], "first_step": []}
    for _ in range(options.rounds):
        times["import_torch"].append(measure(TORCH, options.threads))
        with tempfile.TemporaryDirectory() as folder:
            times["first_step"].append(measure([*STEP, f"directory={folder}/run"], options.threads))
    row = {"name": "start of the quickstart", "threads": options.threads, "n": options.rounds}
    for name, pairs in times.items():
        row[f"{name}_s"] = round(statistics.median(wall for wall, _ in pairs), 2)
        row[f"{name}_cpu_s"] = round(statistics.median(cpu for _, cpu in pairs), 2)
    ratios = (
        step / alone for (_, step), (_, alone) in zip(times["first_step"], times["import_torch"], strict=True)
    )
    row["cpu_ratio_p50"] = round(statistics.median(ratios), 2)
    row["load"] = round(os.getloadavg()[0], 1)
    write_row(FILE, machine("cpu") | row)
    print(json.dumps(row, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
