"""Checkpoints written while training goes on: by one thread, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class CheckpointWriter:
    """Runs what writes a checkpoint in a thread of its own.

    One write is in flight at most: the next waits for it.  What goes wrong in it is raised by whichever
    method is called next.  When the interpreter ends, it waits for a write that is still going on.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write, once the write before is done.

        Args:
            write: touches no tensor that training changes.
        """
        self.wait()
        self._last = self._thread.submit(write)

    def check(self) -> None:
        """Raise the error of a write that has ended with one."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written; raises the error of the last write."""
        last = self._last
        if last is not None:
            try:
                last.result()
            finally:
                self._last = None

    def leave(self, within: float) -> None:
        """Before this process is ended from another thread: give a write that is going on so many seconds."""
        last = self._last
        if last is not None:
            wait([last], timeout=within)
