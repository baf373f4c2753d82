"""Signals to the worker processes of a loader."""

from __future__ import annotations

import subprocess
import sys

# A fork, as the loader's workers are: it has none of the threads that numpy and torch start when they are
# imported, and those would take the signal. The fork is one of a new process, because other tests have left
# threads in this one.
LOADER = """
import multiprocessing, os, subprocess, time
from discovla.data.loader import _init_worker

def work(ready):
    _init_worker(0)
    ready.set()
    time.sleep(60)

context = multiprocessing.get_context("fork")
ready = context.Event()
worker = context.Process(target=work, args=(ready,))
worker.start()
assert ready.wait(20)
for name in ("TERM", "USR1"):
    subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
worker.join(0.5)
print("after others' signals:", worker.exitcode)
worker.terminate()
worker.join(20)
print("after the parent's signal:", worker.exitcode)
worker.kill()
"""


def test_only_the_parent_can_end_a_worker_by_sigterm():
    loader = subprocess.run([sys.executable, "-c", LOADER], capture_output=True, text=True, timeout=120)
    assert loader.stdout == "after others' signals: None\nafter the parent's signal: 0\n", loader.stderr
