"""Signals to the worker processes of a loader."""

from __future__ import annotations

import multiprocessing
import subprocess
import time

from discovla.data.loader import _init_worker


def read(ready) -> None:
    _init_worker(0)
    ready.set()
    time.sleep(60)


def test_only_the_parent_can_end_a_worker_by_sigterm():
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=read, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(20)
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
