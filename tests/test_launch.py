"""The launch scripts start runs, and stop and take them up again as their schedulers ask."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests import runs
from tests.engine.launch import LAUNCHER, ROOT, free_port

SRUN = """#!/usr/bin/env bash
# two tasks, as SLURM would start them: a signal to the step goes to each of them
options=()
while [[ $1 == --* ]]; do [[ $1 == --output=* ]] && out=${1#--output=}; shift; done
pids=()
for task in 0 1; do
  SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=$task "$@" >> "${out/\\%t/$task}" 2>&1 &
  pids+=($!)
done
echo "${pids[@]}" > "$TASKS"
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" > "$REQUEUED"
"""


def environment(folder: Path, **extra: object) -> dict[str, str]:
    """Without a launcher's variables, the test's interpreter and stubs first."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    env |= {"PATH": f"{folder}:{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(ROOT)}
    return env | {name: str(value) for name, value in extra.items()}


def stubs(folder: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.mark.slow
def test_a_slurm_job_that_is_warned_saves_requeues_itself_and_goes_on(tmp_path, drawn):
    stubs(tmp_path)
    config = runs.write_config(tmp_path, drawn)
    requeued, tasks, metrics = tmp_path / "requeued", tmp_path / "tasks", tmp_path / "run/metrics.jsonl"
    words = [
        "bash",
        ROOT / "launch/slurm.sbatch",
        config,
        "steps=40",
        "data.val_split=",
        "checkpoint_every=40",
    ]
    env = environment(
        tmp_path,
        SLURM_JOB_ID=7,
        SLURM_JOB_NODELIST="here",
        REQUEUED=requeued,
        TASKS=tasks,
        LOGS=tmp_path / "logs",
    )
    job = subprocess.Popen(words, cwd=ROOT, env=env)
    deadline = time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b'"train"') < 2:
        assert job.poll() is None and time.monotonic() < deadline, log(tmp_path)
        time.sleep(0.01)
    for pid in tasks.read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    assert job.wait(100) == 0, log(tmp_path)
    assert requeued.read_text().split() == ["requeue", "7"], log(tmp_path)
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+) of 40, which is saved", log(tmp_path))
    assert stopped and 2 <= int(stopped[1]) < 40
    requeued.unlink()
    assert subprocess.run(words, cwd=ROOT, env=env, timeout=300).returncode == 0, log(tmp_path)
    assert len(runs.losses(tmp_path / "run")) == 40
    assert f"resuming at step {stopped[1]} of 40" in log(tmp_path)
    assert not requeued.exists()


def log(folder: Path) -> str:
    """What the first task wrote."""
    path = folder / "logs/0.log"
    return path.read_text() if path.exists() else "no log"


@pytest.mark.slow
def test_torchrun_checks_the_machine_trains_and_keeps_a_log_of_each_rank(tmp_path, drawn):
    words = ["bash", ROOT / "launch/torchrun.sh", runs.write_config(tmp_path, drawn), "steps=2"]
    env = environment(tmp_path, GPUS=2, RENDEZVOUS=f"localhost:{free_port()}", LOGS=tmp_path / "logs")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready" in done.stdout and "all-reduce over 2 ranks" in done.stdout
    assert len(runs.losses(tmp_path / "run")) == 2
    logs = sorted((tmp_path / "logs").rglob("stdout.log"))
    assert [path.parent.name for path in logs] == ["0", "1"]
    assert "text to video" in logs[0].read_text()


STRUCK = """
import os, sys
from train import main
from tests.runs import _arrange
if os.environ["RANK"] == "0":
    _arrange(*os.environ["FAULT"].split(":"))
sys.exit(main(sys.argv[1:]))
"""
STEP, WRITE = "discovla.trainer:learning_rate", "discovla.engine.checkpoint:_write_tensors"


def struck(launcher: list, fault: str, words: list, folder: Path) -> tuple[int, str]:
    """Status and output of a run that a fault befalls under a launcher; no process of it is left."""
    (folder / "struck.py").write_text(STRUCK)
    command = [str(word) for word in (*launcher, folder / "struck.py", *words)]
    with (folder / "output.txt").open("w+") as output:
        env = environment(folder, FAULT=fault)
        job = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
        status = job.wait(120)
        deadline = time.monotonic() + 30
        while left := [
            p for p in psutil.process_iter(["cmdline"]) if command[-1] in (p.info["cmdline"] or [])
        ]:
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.1)
        output.seek(0)
        return status, output.read()


@pytest.mark.slow
def test_launchers_that_are_asked_to_end_leave_a_run_that_goes_on_bit_for_bit(tmp_path, drawn):
    schedule = ("data.val_split=", "steps=8", "checkpoint_every=3", "data.workers=2")
    words = [runs.write_config(tmp_path, drawn), *schedule]
    runs.train([*words, f"directory={tmp_path}/whole"], size=2)
    words += ["resume=true", f"directory={tmp_path}/run"]
    deepspeed = ["deepspeed", "-q", "--num_accelerators", 2, "--master_port", free_port()]
    # of a rank, in the middle of a step: all end with the status that says so
    status, output = struck(deepspeed, f"SIGTERM:{STEP}:2", words, tmp_path)
    assert "train.py: stopped by SIGTERM after step 2 of 8, which is saved" in output
    assert status == 75, output
    # of the command, in the middle of a save: it dies at once, and the ranks see that it has
    status, output = struck(deepspeed, f"SIGTERM^2:{WRITE}:1", words, tmp_path)
    stopped = re.search(r"stopped by the end of its launcher after step ([345]) of 8, which is saved", output)
    assert stopped, output
    assert status == -signal.SIGTERM
    # of torchrun, by the warning of SLURM
    handled = re.search(r'--signals-to-handle "(\S+)"', (ROOT / "launch/torchrun.sh").read_text())
    assert handled
    torchrun = [
        "torchrun",
        "--signals-to-handle",
        handled[1],
        "--nproc-per-node",
        2,
        "--master-port",
        free_port(),
    ]
    status, output = struck(torchrun, f"SIGUSR1^1:{STEP}:1", words, tmp_path)
    assert f"stopped by SIGUSR1 after step {int(stopped[1]) + 1} of 8, which is saved" in output
    assert status == 1, output
    runs.train(words, size=2)
    assert runs.records(tmp_path / "run") == runs.records(tmp_path / "whole")
    ours, theirs = (runs.tensors(tmp_path / name, 8) for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
