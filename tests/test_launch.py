"""The launch scripts start, stop and resume runs as their schedulers request."""

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

from discovla.errors import EXIT_STOPPED
from tests import runs
from tests.engine.launch import LAUNCHER, ROOT, free_port

SRUN = """#!/usr/bin/env bash
# two tasks, as SLURM starts them: a signal to the step reaches each of them
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
SSH = """#!/usr/bin/env bash
[[ $* == *"hostname -I" ]] && echo 127.0.0.1 || echo here
"""
PDSH = """#!/usr/bin/env bash
# each host is this machine; %n is its number
while [[ $1 == -* ]]; do case $1 in -w) hosts=$2 ;& -f) shift 2 ;; *) shift ;; esac; done
n=0 pids=() status=0
for host in ${hosts//,/ }; do bash -c "${*//%n/$n}" & pids+=($!); n=$((n + 1)); done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" > "$REQUEUED"
"""


def environment(folder: Path, **extra: object) -> dict[str, str]:
    """Return an environment without launcher variables, with the stubs and the test's interpreter first."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    env |= {"PATH": f"{folder}:{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(ROOT)}
    return env | {name: str(value) for name, value in extra.items()}


def stubs(folder: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ssh", SSH), ("pdsh", PDSH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.mark.slow
def test_a_slurm_job_saves_at_the_warning_requeues_itself_and_resumes(tmp_path, drawn):
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
    """Return the output of the first task."""
    path = folder / "logs/0.log"
    return path.read_text() if path.exists() else "no log"


SCHEDULE = ("data.val_split=", "steps=30", "checkpoint_every=9")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, drawn) -> Path:
    """The directory of an uninterrupted run on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    runs.train([runs.write_config(folder, drawn), *SCHEDULE], size=2)
    return folder / "run"


def assert_resumes(words: list, folder: Path, whole: Path) -> None:
    """Assert that a stopped run resumes to the results of an uninterrupted one, bit for bit."""
    assert 0 < len(runs.records(folder / "run")) < 30
    runs.train([*words, "resume=true"], size=2)
    assert runs.records(folder / "run") == runs.records(whole)
    ours, theirs = runs.tensors(folder / "run", 30), runs.tensors(whole, 30)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def start(words: list, folder: Path, **extra: object) -> subprocess.Popen:
    """Start a run by a script and wait until it has taken two steps."""
    with (folder / "output.txt").open("w") as file:
        env = environment(folder, LOGS=folder / "logs", **extra)
        job = subprocess.Popen(words, env=env, stdout=file, stderr=file)
    deadline = time.monotonic() + 200
    while steps(folder) < 2:
        assert job.poll() is None and time.monotonic() < deadline, output(folder)
        time.sleep(0.01)
    return job


def steps(folder: Path) -> int:
    """Return the number of steps that the run has recorded."""
    metrics = folder / "run/metrics.jsonl"
    return metrics.read_bytes().count(b'"train"') if metrics.exists() else 0


def rank_of(folder: Path, rank: int) -> psutil.Process:
    """Return the process of a rank; its data-loading processes are younger."""
    processes = [p for p in processes_of(folder) if p.environ().get("RANK") == str(rank)]
    return min(processes, key=lambda p: p.create_time())


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that have this folder's config on their command line."""
    config = str(folder / "small.toml")
    return [p for p in psutil.process_iter(["cmdline"]) if config in (p.info["cmdline"] or [])]


def assert_none_left(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while running := processes_of(folder):
        assert time.monotonic() < deadline, f"still running: {running}"
        time.sleep(0.1)


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) == (script.suffix == ".sh")


def test_the_command_runs_as_a_module():
    """The launch scripts start `discovla preflight` in this form."""
    command = [sys.executable, "-m", "discovla.cli", "--version"]
    done = subprocess.run(command, env=environment(ROOT), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("discovla ")


@pytest.mark.slow
def test_torchrun_checks_restarts_lost_ranks_forwards_signals_and_keeps_logs(tmp_path, drawn, whole):
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE]
    where = {"GPUS": 2, "RENDEZVOUS": f"localhost:{free_port()}"}
    job = start(["bash", ROOT / "launch/torchrun.sh", *words], tmp_path, **where)
    rank_of(tmp_path, 1).kill()
    before, deadline = steps(tmp_path), time.monotonic() + 100
    while steps(tmp_path) <= before + 1:  # until all are restarted
        assert job.poll() is None and time.monotonic() < deadline, output(tmp_path)
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 1, output(tmp_path)
    assert "ready" in output(tmp_path) and "all-reduce over 2 ranks" in output(tmp_path)
    logs = sorted((tmp_path / "logs").rglob("stderr.log"))
    attempts = [f"attempt_{n}" for n in (0, 0, 1, 1)]
    assert [path.parts[-3:-1] for path in logs] == list(zip(attempts, "0101", strict=True))
    assert re.search(r"error: rank 1 \(.*\) has ended before the run was over", logs[0].read_text())
    assert "train.py: stopped by SIGUSR1 after step " in logs[2].read_text()
    assert_none_left(tmp_path)
    assert_resumes(words, tmp_path, whole)


@pytest.mark.slow
def test_deepspeed_on_two_machines_ends_with_the_status_of_a_stopped_rank(tmp_path, drawn, whole):
    stubs(tmp_path)
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE, "data.workers=2"]
    job = start(["bash", ROOT / "launch/deepspeed.sh", *words], tmp_path, HOSTFILE=tmp_path / "hostfile")
    rank_of(tmp_path, 1).terminate()
    assert job.wait(60) == EXIT_STOPPED, output(tmp_path)
    assert "ready" in output(tmp_path) and "all-reduce over 2 ranks" in output(tmp_path)
    first, second = sorted((tmp_path / "logs").glob("*_rank?.log"))
    assert "train.py: stopped by SIGTERM after step " in first.read_text()
    assert "error" not in second.read_text()
    assert_none_left(tmp_path)
    assert_resumes(words, tmp_path, whole)


WITH_FAULT = """
import os, sys
from train import main
from tests.runs import _inject
if os.environ["RANK"] == "0":
    _inject("SIGTERM^2", "discovla.engine.checkpoint", "_write_tensors", "1")
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_end_if_their_deepspeed_ends_during_a_save_and_the_run_resumes(tmp_path, drawn, whole):
    """The command dies of SIGTERM at once without a signal to its ranks."""
    (tmp_path / "with_fault.py").write_text(WITH_FAULT)
    words = [runs.write_config(tmp_path, drawn), *SCHEDULE, "data.workers=2"]
    command = ["deepspeed", "-q", "--num_accelerators", "2", "--master_port", str(free_port())]
    job = start([*command, tmp_path / "with_fault.py", *words], tmp_path)
    assert job.wait(60) == -signal.SIGTERM, output(tmp_path)
    assert_none_left(tmp_path)
    stopped = "train.py: stopped by the end of its launcher after step "
    assert re.search(stopped + r"[1-9]\d? of 30, which is saved", output(tmp_path)), output(tmp_path)
    assert_resumes(words, tmp_path, whole)
