"""Requests to stop a run: counted when they arrive, obeyed by all ranks after the same step."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

# SIGTERM of launchers and schedulers, SIGUSR1 of SLURM's `--signal=USR1@120`
SIGNALS = ("SIGTERM", "SIGUSR1")
STOP_REASONS = (*SIGNALS, "the end of its launcher")


class StopSignals:
    """Context in which stop signals are counted instead of ending the process.

    Forked processes inherit the handlers.  Python sets handlers in the main thread only; in another thread
    nothing changes.  A launcher that is killed sends no signal to its ranks, and DeepSpeed's sends none when
    it is asked to end, so a change of the parent processes counts as a request too."""

    def __init__(self) -> None:
        self._launchers = _launcher_pids()
        self.received: dict[str, int] = dict.fromkeys(SIGNALS, 0)
        self._previous: dict[str, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                self._previous[name] = signal.signal(signal.Signals[name], self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(signal.Signals[name], signal.SIG_DFL if handler is None else handler)

    def counts(self) -> list[int]:
        """Return how often each of `STOP_REASONS` occurred in this process."""
        launcher_gone = _parent_pids(len(self._launchers)) != self._launchers
        return [*(self.received[name] for name in SIGNALS), int(launcher_gone)]

    def ignore(self) -> None:
        """Ignore the signals for good: launchers send them again to ranks that are still ending."""
        for name in self._previous:
            signal.signal(signal.Signals[name], signal.SIG_IGN)
            self._previous[name] = signal.SIG_IGN

    def _count(self, number: int, _frame: FrameType | None) -> None:
        self.received[signal.Signals(number).name] += 1


def _launcher_pids() -> list[int]:
    """Return the parent processes that belong to a launcher; none without one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun
        return _parent_pids(1)
    # the deepspeed command starts one process per machine, which starts the ranks
    return _parent_pids(2) if b"deepspeed.launcher.launch" in _read_proc(os.getppid(), "cmdline") else []


def _parent_pids(count: int) -> list[int]:
    """Return the parent, its parent and so on; 0 for a process that cannot be read."""
    pids = [os.getppid()] if count else []
    while len(pids) < count:
        fields = _read_proc(pids[-1], "stat").rpartition(b")")[2].split()  # a name may hold spaces
        pids.append(int(fields[1]) if fields else 0)
    return pids


def _read_proc(pid: int, name: str) -> bytes:
    """Read a file of /proc about a process; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
