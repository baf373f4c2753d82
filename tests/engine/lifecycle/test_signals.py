"""Requests to stop a run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.engine.launch import LAUNCHER, ROOT

CHILD = """
import os, sys, time
from discovla.engine.lifecycle.signals import StopSignals
with StopSignals() as signals:
    print(*signals.counts(), flush=True)
    sys.stdin.readline()
    deadline = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < deadline and not any(signals.counts()):
        time.sleep(0.01)
    print(*signals.counts(), flush=True)
"""
INNER = f"{sys.executable} -c '{CHILD}' $SECONDS_TO_WAIT; true"


@pytest.mark.parametrize(
    ("name", "run", "above", "gone"),
    [
        ("deepspeed.launcher.launch", "", 2, 1),
        ("deepspeed.launcher.launch", "", 1, 1),
        ("torchrun", "a run", 1, 1),
        ("torchrun", "a run", 2, 0),
        ("bash", "", 1, 0),
    ],
    ids=["deepspeed", "deepspeed on a machine", "torchrun", "the shell of torchrun", "a shell"],
)
def test_the_end_of_a_launcher_is_a_stop_request_but_that_of_a_shell_is_not(name, run, above, gone):
    """The rank has two parents: the launcher's command and the process that it starts on each machine."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    env |= {"PYTHONPATH": str(ROOT), "INNER": INNER, "SECONDS_TO_WAIT": "20" if gone else "0.3"}
    env |= {"TORCHELASTIC_RUN_ID": run} if run else {}
    outer = ["sh", "-c", f'echo $$; sh -c "echo \\$\\$; $INNER" {name}; true']
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(outer, env=env, **pipes) as job:
        assert job.stdin is not None and job.stdout is not None
        pids = [int(job.stdout.readline()) for _ in range(2)]  # the command, then its child
        assert job.stdout.readline().split() == ["0", "0", "0"]
        os.kill(pids[-above], 9)
        print(file=job.stdin, flush=True)
        assert job.stdout.readline().split() == ["0", "0", str(gone)]
