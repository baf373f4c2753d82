"""Processes that hold the lock of a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLDER = """
import sys, time
from pathlib import Path
from discovla.lock import WriterLock
WriterLock(Path(sys.argv[1]), sys.argv[2]).acquire()
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(folder: Path, purpose: str) -> Iterator[subprocess.Popen]:
    """Run a process that holds the lock of a folder until it is killed."""
    command = [sys.executable, "-c", HOLDER, str(folder), purpose]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
