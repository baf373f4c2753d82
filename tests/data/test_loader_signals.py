"""Signals to the processes that read."""

from __future__ import annotations

import multiprocessing
import subprocess
import time

from discovla.data.loader import _spared_signals


def read(ready) -> None:
    _spared_signals(0)
    ready.set()
    time.sleep(60)


def test_a_reader_ends_where_its_starter_asks_and_no_other():
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    reader = fork.Process(target=read, args=(ready,), daemon=True)
    reader.start()
    assert ready.wait(20)
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(reader.pid)], check=True)
    reader.join(0.5)
    assert reader.is_alive()
    reader.terminate()
    reader.join(20)
    assert reader.exitcode == 0
