"""The launch scripts start runs, and stop and take them up again as their schedulers ask."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
