"""Signals to the worker processes of a loader."""

from __future__ import annotations

import subprocess
import sys
import time

# in a process of its own: a fork of this one would have the threads that libraries of other tests start
WORKER = """
import time
from discovla.data.loader import _init_worker
_init_worker(0)
print("ready", flush=True)
time.sleep(60)
"""


def test_only_the_parent_can_end_a_worker_by_sigterm():
    with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        for name in ("TERM", "USR1"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        time.sleep(0.5)
        assert worker.poll() is None
        worker.terminate()
        assert worker.wait(20) == 0
