"""Signals that ask a run to stop: noted when they come, obeyed by all processes after the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# SIGTERM of launchers and schedulers, SIGUSR1 of SLURM's `--signal=USR1@120`
NAMES = ("SIGTERM", "SIGUSR1")


class StopSignals:
    """Notes the signals from `with` on; processes forked meanwhile are not ended by them either.

    Only the main thread can take signals: in another one nothing is changed.
    """

    def __init__(self) -> None:
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
        """How often each of `NAMES` came to this process."""
        return [self.seen[name] for name in NAMES]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.seen[signal.Signals(number).name] += 1
