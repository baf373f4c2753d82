"""Transfer of batches from worker processes: room in shared memory, failures, and time limits of waits."""

from __future__ import annotations

import atexit
import errno
import multiprocessing.queues
import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils.data
from torch._utils import ExceptionWrapper

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that each worker reads ahead
WAIT_SECONDS = 2.0  # between two looks at workers and signals while a batch is awaited
SUSPENDED_SECONDS = 60.0  # that a worker may be suspended (SIGSTOP) while a batch is awaited
MARGIN_SECONDS = 120.0  # for a batch, besides the time limit of its clips
EXIT_SECONDS = 5.0  # for a worker to end when the interpreter exits
RESTART_SECONDS = 15.0  # for a clip whose decoding process has to be replaced

STOPPED = ("T", "t")  # states of a suspended process in /proc
_TIMED_OUT = "DataLoader timed out"
_Loader = torch.utils.data.DataLoader[Any]


@dataclass(frozen=True, kw_only=True)
class ReadAhead:
    """Batches that the workers of a process hold at once.

    workers: reader processes.
    clips: of a batch.
    clip_bytes: of the frames of a clip.
    steps: batches that are read in all; fewer than are read ahead need less.
    """

    workers: int
    clips: int
    clip_bytes: int
    steps: int

    @property
    def batches(self) -> int:
        """Number of batches that are held at once, with the one that is handed over."""
        return min(PREFETCH * self.workers + 1, self.steps) if self.workers else 0


def check_shared_memory(*reads: ReadAhead, processes: int | None = None) -> None:
    """Refuse batches for which shared memory has no room.

    Args:
        reads: of one process, all at once: training, and validation in between.
        processes: on this machine; None for those that the launcher started.

    Raises:
        ValueError: it is too small; says what to do.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # a system without it
        return
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = status.f_bavail * status.f_frsize
    need = processes * sum(read.batches * read.clips * read.clip_bytes for read in reads)
    if need > free:
        parts = (
            f"{processes} x {read.batches} batches of {read.clips * read.clip_bytes / 2**20:.1f} MiB "
            f"({read.clips} clips)"
            for read in reads
            if read.batches
        )
        raise ValueError(
            f"{SHARED_MEMORY} is short: expected {need / 2**20:.0f} MiB free for {' and '.join(parts)}, "
            f"found {free / 2**20:.0f} MiB; set data.workers=0, a smaller batch, or give the container more "
            f"(docker run --shm-size={-(-need // 2**30) + 1}g, or --ipc=host)"
        )


def report_failed_transfers() -> None:
    """Make a worker process send the error of a failed transfer, which torch drops by default."""
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # pyright: ignore


def _send_error(queue: Any, error: Exception, item: Any) -> None:
    """Put the error in the place of the batch; runs in the feeder thread of a worker's queue."""
    if not isinstance(item, tuple):  # it broke off in the pipe
        sys.stderr.write(f"a data-loading process cannot hand over a batch: {error}\n")
        os._exit(1)
    number = errno.ENOSPC if "shared memory" in str(error) or "No space left" in str(error) else None
    number = getattr(error, "errno", None) or number or errno.EIO
    advice = "set data.workers=0 or a smaller batch"
    if number == errno.ENOSPC:
        advice += ", or give the container more shared memory (docker run --shm-size)"
    line = (
        f"a batch cannot be handed over by a data-loading process: {os.strerror(number)}: {error}; {advice}"
    )
    failure = OSError(f"{SHARED_MEMORY} is short: {line}" if number == errno.ENOSPC else line)
    queue.put((item[0], ExceptionWrapper((type(failure), failure, None), "in a data-loading process")))


def batch_seconds(clips: int, decode_seconds: float) -> float:
    """Return the seconds that a batch may take if every clip of it takes as long as it may."""
    return clips * (decode_seconds + RESTART_SECONDS) + MARGIN_SECONDS


def wait_for_batches(
    loader: _Loader, limit: float, should_stop: Callable[[], bool] | None
) -> Generator[dict[str, Any] | None, None, None]:
    """Yield the batches of a loader, whose `timeout` is `WAIT_SECONDS`; every wait for one has an end.

    Args:
        limit: seconds that a batch may take.
        should_stop: if it returns True while a batch is awaited, None is yielded as the last batch.

    Raises:
        OSError: a worker is suspended, or a batch takes longer than `limit`; the workers are ended.
    """
    atexit.unregister(_end_children)
    atexit.register(_end_children)
    iterator: Any = iter(loader)
    began = time.monotonic()
    suspended: dict[int, float] = {}
    while True:
        try:
            fields = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith(_TIMED_OUT):
                raise
            if should_stop is not None and should_stop():
                _end_workers(iterator)
                yield None
                return
            try:
                _check_workers(iterator, time.monotonic() - began, limit, suspended)
            except OSError:
                _end_workers(iterator)
                raise
            continue
        yield fields
        began = time.monotonic()
        suspended.clear()


def _check_workers(iterator: Any, waited: float, limit: float, suspended: dict[int, float]) -> None:
    now = time.monotonic()
    for worker in iterator._workers:
        if _state(worker.pid) not in STOPPED:
            suspended.pop(worker.pid, None)
        elif now - suspended.setdefault(worker.pid, now) >= SUSPENDED_SECONDS:
            raise OSError(
                f"data-loading process {worker.pid}: expected a batch, found the process suspended (SIGSTOP) "
                f"for {SUSPENDED_SECONDS:g} s"
            )
    pinning = getattr(iterator, "_pin_memory_thread", None)
    if pinning is not None and not pinning.is_alive():
        raise OSError("expected a batch, found that the thread that pins memory has ended")
    if waited > limit:
        raise OSError(
            f"expected a batch within {limit:g} s, found none: data-loading processes "
            f"{', '.join(str(worker.pid) for worker in iterator._workers)} live but deliver nothing"
        )


def _end_workers(iterator: Any) -> None:
    """Kill the workers, also suspended ones, for which the interpreter would wait when it exits."""
    if iterator._worker_pids_set:  # else their end is an error
        torch._C._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    for worker in iterator._workers:
        worker.kill()


def _end_children() -> None:
    """End child processes, also suspended ones: the interpreter waits for them without end when it exits."""
    children = [process for process in multiprocessing.active_children() if process.daemon]
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for an error
    for process in children:
        process.terminate()
    for process in children:
        process.join(EXIT_SECONDS)
        process.kill()


def _state(pid: int) -> str:
    """Return the state letter of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
