"""`discovla preflight` names the rank and host of a problem before the run begins."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from discovla.cli import main
from discovla.commands.preflight import RankReport, first_problem, format_table, free_disk
from tests import runs
from tests.engine.launch import environment, free_port

HOST = socket.gethostname()
COMMAND = "import sys; from discovla.cli import main; sys.exit(main(sys.argv[1:]))"


def preflight(words: list, size: int) -> tuple[list[int], list[str], float]:
    """Return the exit status and output of every rank, and the seconds taken."""
    began, port = time.monotonic(), free_port()
    command = [sys.executable, "-c", COMMAND, "preflight", *map(str, words)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen(command, env=environment(rank, size, port), **pipe) for rank in range(size)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], outputs, time.monotonic() - began


def test_two_ready_processes_get_a_table(tmp_path, drawn):
    config = runs.write_config(tmp_path, drawn)
    status, (first, second), _ = preflight([config, "--mib", 2, "--free", 0.001], size=2)
    assert status == [0, 0], first + second
    lines = first.splitlines()
    assert lines[0].split() == ["rank", "host", "device", "free", "GiB", "clock", "clips"]
    for rank in (0, 1):
        assert re.fullmatch(rf" +{rank}  {HOST} +cpu +\d+\.\d +[+-]0\.\d\ds +38", lines[1 + rank])
    assert f"torch {torch.__version__}" in lines[3]
    assert re.fullmatch(r"all-reduce over 2 ranks: \d+\.\d\d GB/s through each link", lines[4])
    assert lines[5:] == ["ready"] and second == ""
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".preflight*"))


@pytest.mark.slow
def test_a_problem_of_one_rank_ends_all_and_names_rank_and_host(tmp_path, drawn):
    """The disk is full."""
    config = runs.write_config(tmp_path, drawn)
    status, (first, _), seconds = preflight([config, "--free", 1e9], size=2)
    assert status == [2, 2]
    assert re.search(
        rf"^discovla: error: rank 0 on {HOST}: {tmp_path}: expected 1000000000.0 GiB free .* found \d",
        first,
        re.M,
    )
    assert seconds < 100


def test_one_process_needs_no_launcher_and_no_config(capsys):
    assert main(["preflight", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1] == "ready"


@pytest.mark.parametrize("missing", ["manifest", "video", "shards"])
def test_missing_clips_are_named(missing, tmp_path, drawn, capsys):
    words = [str(runs.write_config(tmp_path, drawn))]
    named = "gone.jsonl"
    if missing == "manifest":
        words.append(f"data.manifest={tmp_path}/gone.jsonl")
    elif missing == "video":
        (tmp_path / "other.jsonl").write_text(drawn.read_text())  # its videos are relative to the first one
        words.append(f"data.manifest={tmp_path}/other.jsonl")
        named = f"{tmp_path}/videos/val_00000.mp4"
    else:
        words.append(f"data.shards={tmp_path}/gone.jsonl")
    assert main(["preflight", *words, "--free", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"discovla: error: rank 0 on {HOST}: ") and named in error


def reports(**changes: list) -> list[RankReport]:
    """Return reports of three ready ranks, with the given values by rank."""
    one = RankReport(
        rank=0, host="a", gpu="cpu", free=1e12, clock=1e9, versions={"torch": "2"}, clips=5, problem=None
    )
    ready = [dataclasses.replace(one, rank=rank, host=f"node{rank}") for rank in range(3)]
    return [
        dataclasses.replace(x, **{name: values[x.rank] for name, values in changes.items()}) for x in ready
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"problem": [None, "no disk", None]}, "rank 1 on node1: no disk"),
        (
            {"clock": [1e9, 1e9 + 1, 1e9 - 60]},
            "rank 2 on node2: expected a clock within 5 s of the others', found one -60.0 s off",
        ),
        (
            {"versions": [{"torch": "3"}, {"torch": "2"}, {"torch": "2"}]},
            "rank 0 on node0: torch: expected 2 as on other ranks, found 3",
        ),
        (
            {"clips": [5, 5, 4]},
            "clips: expected the same number on all ranks, found 5 on rank 0 (node0), 5 on rank 1 (node1), "
            "4 on rank 2 (node2)",
        ),
    ],
    ids=["ready", "problem", "clock", "versions", "clips"],
)
def test_the_first_problem_names_rank_and_host(changes, line):
    assert first_problem(reports(**changes)) == line


def test_a_table_without_a_config_has_no_disk_and_no_clips():
    lines = format_table(reports(free=[float("inf")] * 3, clips=[None] * 3), None).splitlines()
    assert lines[1].split() == ["0", "node0", "cpu", "-", "+0.00s", "-"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(self: Path, _: bytes) -> int:
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        free_disk(tmp_path / "a/b", 0)
