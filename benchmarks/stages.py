"""The quickstart by the launcher on several processes at each ZeRO stage, beside one process.

    python benchmarks/stages.py                      one process, then two at stages 0, 1, 2 and 3
    python benchmarks/stages.py --runs runs/stages   the same; what has ended there is not run again

Each row says by how much the losses of a run differ from those of one process, step by step, and what the
run ends with.  The order of samples depends on seed and epoch alone, so they differ by the rounding of sums.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.measure import ROOT, machine, results_file, write_row

ONE = "one process"


@dataclass(frozen=True, kw_only=True)
class Contest:
    """runs: a folder that keeps every run.  words: after the quickstart's, of every run."""

    runs: Path
    processes: int = 2
    stages: Sequence[int] = (0, 1, 2, 3)
    words: Sequence[str] = ()

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row a run, that of one process first.

        Raises:
            RuntimeError: a run did not end well; with the end of what it said.
        """
        base = self._run("one", 1, "auto")
        wanted = losses(base)
        yield {"name": ONE, "processes": 1, "steps": len(wanted)} | ends(base)
        for stage in self.stages:
            folder = self._run(f"zero{stage}", self.processes, stage)
            found = losses(folder)
            row = {"name": f"{self.processes} processes, zero_stage {stage}", "processes": self.processes}
            yield row | {"stage": stage, "steps": len(found)} | differences(found, wanted) | ends(folder)

    def _run(self, name: str, processes: int, stage: int | str) -> Path:
        """The folder of a run, which is carried out, or carried on with, where it has not ended."""
        folder = self.runs / name
        if (folder / "results.json").is_file():
            return folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = ["deepspeed", "-q", "--num_accelerators", str(processes), "--master_port", port]
        words = [f"directory={folder}", f"engine.zero_stage={stage}", "resume=true", *self.words]
        said = subprocess.run(
            [*launcher, "train.py", "configs/quickstart.toml", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if said.returncode:
            raise RuntimeError(f"{name}: {said.stdout[-2000:]}")
        return folder


def losses(folder: Path) -> dict[int, float]:
    """Step to loss."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def differences(found: dict[int, float], wanted: dict[int, float]) -> dict[str, Any]:
    """The largest relative difference of a loss, and its step; of the first ten steps too.

    Raises:
        ValueError: they are not of the same steps.
    """
    if found.keys() != wanted.keys() or not wanted:
        raise ValueError(f"losses: expected those of {len(wanted)} steps, found {len(found)}")
    apart = {step: abs(found[step] - loss) / abs(loss) for step, loss in wanted.items()}
    step = max(apart, key=apart.__getitem__)
    return {
        "largest": apart[step],
        "at_step": step,
        "largest_of_first_ten": max(apart[step] for step in sorted(apart)[:10]),
    }


def ends(folder: Path) -> dict[str, Any]:
    """R@1 and R@5 of the selected step both ways, and the commit of the run."""
    rows = json.loads((folder / "results.json").read_text())
    name, figures = next((n, f) for n, f in rows.items() if ", step " in n and "+" not in n)
    commit = json.loads((folder / "versions.json").read_text())["git_commit"]
    short = {way: {k: figures[way][k] for k in ("R@1", "R@5")} for way in ("t2v", "v2t")}
    return {"selected": name, **short, "commit": commit[:7]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*", help="overrides of every run, like data.cache=FOLDER")
    parser.add_argument("--runs", type=Path, help="a folder that keeps the runs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=(0, 1, 2, 3), choices=range(4))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = (args.runs or Path(folder)).resolve()
        contest = Contest(runs=runs, processes=args.processes, stages=args.stages, words=args.words)
        where = machine("cpu")
        del where["dirty"]  # a run kept from before was not of this tree
        for row in contest.rows():
            write_row(results_file(where | row, "stages"), where | row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
