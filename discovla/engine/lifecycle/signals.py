"""What asks a run to stop: noted when it comes, obeyed by all processes after the same step."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

# SIGTERM of launchers and schedulers, SIGUSR1 of SLURM's `--signal=USR1@120`
NAMES = ("SIGTERM", "SIGUSR1")
REASONS = (*NAMES, "the end of its launcher")


class StopSignals:
    """Notes the signals from `with` on; processes forked meanwhile are not ended by them either.

    Only the main thread can take signals: in another one nothing is changed.  A launcher that is killed
    leaves its processes without a signal, and so does that of DeepSpeed where it is asked to end: that the
    processes above this one are no longer there counts too.
    """

    def __init__(self) -> None:
        self._above = _launcher()
        self.seen: dict[str, int] = dict.fromkeys(NAMES, 0)
        self._before: dict[str, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                self._before[name] = signal.signal(signal.Signals[name], self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(signal.Signals[name], signal.SIG_DFL if handler is None else handler)

    def counts(self) -> list[int]:
        """How often each of `REASONS` came to this process."""
        return [*(self.seen[name] for name in NAMES), int(_above(len(self._above)) != self._above)]

    def ignore(self) -> None:
        """From now on, for good: launchers send them to ranks that end a moment after another."""
        for name in self._before:
            signal.signal(signal.Signals[name], signal.SIG_IGN)
            self._before[name] = signal.SIG_IGN

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.seen[signal.Signals(number).name] += 1


def _launcher() -> list[int]:
    """The processes above this one that are to live as long as it does: none without a launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun
        return _above(1)
    # the command starts a process for each machine, and that one the ranks
    return _above(2) if b"deepspeed.launcher.launch" in _read(os.getppid(), "cmdline") else []


def _above(count: int) -> list[int]:
    """The process that started this one, and so on upwards; 0 for one that cannot be seen."""
    found = [os.getppid()] if count else []
    while len(found) < count:
        fields = _read(found[-1], "stat").rpartition(b")")[2].split()  # a name may hold spaces
        found.append(int(fields[1]) if fields else 0)
    return found


def _read(pid: int, name: str) -> bytes:
    """What the system tells of a process; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
