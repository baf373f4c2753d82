"""Work in processes that may hang or crash: each item has a time limit, and a lost process is replaced."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import ForkingPickler
from typing import IO, Generic, TypeAlias, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")
Answer: TypeAlias = tuple[Value | None, Exception | None]

START_LIMIT = 120.0  # seconds a process may take to import what it does, on a machine that is busy
_WORD = 8  # bytes of a count
_LATE = 5.0  # seconds after its limit at which a process that did not end itself is killed
_ENTRY = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from discovla.data.sandbox import serve; serve(*map(int, sys.argv[2:]))"
)


class WorkerLost(Exception):
    """An item that its process did not survive: the process crashed, was killed or ran past the limit."""


@dataclass(frozen=True, kw_only=True)
class Result(Generic[Item, Value]):
    """What came of an item: a value, or the error that the work raised or that its process was lost."""

    item: Item
    value: Value | None = None
    error: Exception | None = None


class Sandbox(Generic[Item, Value]):
    """One process that works on one item after another, replaced after one that it does not survive.

    An item whose process ended before it had begun with it is given to a new one, once.

    The process is a new interpreter, not a fork, so that it has no locks or threads of this one, and it may
    be started from the daemonic processes of a `DataLoader`.  It ends when this process ends, at the latest
    when the item it is at reaches its limit.  It starts at the first item; after a fork of this process each
    of the two has its own.

    Args:
        work: a function of a module, found again there by name; what it takes and gives must pickle.
        limit: seconds an item may take.
    """

    _process: subprocess.Popen[bytes] | None = None
    _pipe: Connection | None = None
    _count: IO[bytes] | None = None  # where the process writes how many items it has begun
    _sent = 0  # items to the process
    _owner = 0  # the process that may use them

    def __init__(self, work: Callable[[Item], Value], *, limit: float) -> None:
        if not 0 < limit < float("inf"):
            raise ValueError(f"limit: expected seconds above 0, got {limit}")
        if getattr(work, "__module__", None) == "__main__" or "<" in getattr(work, "__qualname__", "<"):
            raise ValueError(f"work: expected a function that other processes can import, got {work!r}")
        self.work, self.limit = work, limit

    def __getstate__(self) -> dict[str, object]:
        return {"work": self.work, "limit": self.limit}

    def __enter__(self) -> Sandbox[Item, Value]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __call__(self, item: Item) -> Value:
        """Work on one item and wait for it.

        Raises:
            WorkerLost: the process did not survive it; the next item finds a new one.
            Exception: what the work raised.
        """
        self.give(item)
        value, error = self.answer()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    @property
    def pipe(self) -> Connection:
        """Where the answer to the item given comes from."""
        assert self._pipe is not None
        return self._pipe

    def give(self, item: Item) -> None:
        """Send an item to the process, which is started where there is none."""
        self._item, self._again = item, False
        self._send(item)

    def answer(self) -> Answer[Value]:
        """The answer to the item given, once it is there or late: a value or an error."""
        while True:
            wait([self.pipe], max(0.0, self.deadline - time.monotonic()))
            found = self.take()
            if found is not None:
                return found

    def take(self) -> Answer[Value] | None:
        """The answer, once `pipe` is ready or the deadline has passed.

        None where the process had ended before it began with the item, which another one has been given now:
        it is then to be waited for.  That happens once for an item.
        """
        try:
            if not self.pipe.poll(0):
                return None, self._lost(late=True)
            return self.pipe.recv()
        except (EOFError, OSError):  # OSError also where an answer breaks off
            begun = self._begun()
            lost = self._lost(late=False)
        if begun or self._again:
            return None, lost
        self._again = True
        self._send(self._item)
        return None

    def _send(self, item: Item) -> None:
        if self._owner != os.getpid():
            self._disown()
        if self._process is None:
            self._start()
        try:
            self.pipe.send(item)
        except ConnectionError:  # it was killed while it had nothing to do
            self.close()
            self._start()
            self.pipe.send(item)
        self._sent += 1
        self.deadline = time.monotonic() + self.limit + _LATE

    def _begun(self) -> bool:
        """Whether the process has begun with the item it was sent last."""
        assert self._count is not None
        return int.from_bytes(os.pread(self._count.fileno(), _WORD, 0), "little") == self._sent

    def close(self) -> None:
        """End the process, whatever it is at."""
        if self._owner != os.getpid():
            return
        process, pipe, count = self._process, self._pipe, self._count
        self._process = self._pipe = self._count = None
        if process is not None:
            process.kill()
            # One held by the system, as by a disk that does not answer, dies when it is let go.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LATE)
        for file in (pipe, count):
            if file is not None:
                file.close()

    def _start(self) -> None:
        """Start the process and wait until it has found its work."""
        self._pipe, theirs = Pipe()
        self._count, self._sent = os.fdopen(os.memfd_create("items begun"), "rb"), 0
        with theirs:
            shared = theirs.fileno(), self._count.fileno()
            command = [sys.executable, "-c", _ENTRY, json.dumps(sys.path), *map(str, shared)]
            # Its standard output is ours for errors: ours for output may be read by a program.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=shared)
        self._owner = os.getpid()
        try:
            self._pipe.send((self.work, self.limit))
            ready = self._pipe.poll(START_LIMIT)
            error = self._pipe.recv() if ready else RuntimeError(f"no answer in {START_LIMIT:g} s")
        except (EOFError, ConnectionError):
            error = RuntimeError("it ended; what it wrote to the standard error says why")
        if error is not None:
            self.close()
            raise RuntimeError(f"a process for {self.work.__qualname__} did not start: {error}") from error

    def _lost(self, *, late: bool) -> WorkerLost:
        """Why there is no answer, after the process is ended."""
        process = self._process
        assert process is not None
        code = None
        if not late:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(_LATE)
        self.close()
        if late or code == -signal.SIGALRM:
            return WorkerLost(f"took longer than {self.limit:g} s")
        if code is not None and code < 0:
            return WorkerLost(f"its process died of {signal.Signals(-code).name}")
        return WorkerLost(f"its process ended with status {code}")

    def _disown(self) -> None:
        """Leave the process of before a fork to the one that started it."""
        for file in (self._pipe, self._count):
            if file is not None:
                file.close()
        if self._process is not None:
            self._process.returncode = 0  # it is no child of ours, so there is nothing to wait for
        self._process = self._pipe = self._count = None
        self._owner = os.getpid()


def run_sandboxed(
    work: Callable[[Item], Value], items: Iterable[Item], *, workers: int, limit: float
) -> Generator[Result[Item, Value], None, None]:
    """Work on items in several processes and give what came of each, in the order in which they end.

    An item is taken from `items` when a process is free for it.  No process is left when the iterator ends,
    is closed or is dropped.

    Args:
        work, limit: as of `Sandbox`.
        workers: processes, at least 1.

    Raises:
        RuntimeError: a process does not start.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    free: list[Sandbox[Item, Value]] = [Sandbox(work, limit=limit) for _ in range(workers)]
    busy: dict[Connection, tuple[Sandbox[Item, Value], Item]] = {}
    queue = iter(items)
    try:
        while True:
            while free and (given := next(queue, _END)) is not _END:
                worker = free.pop()
                worker.give(given)  # type: ignore[arg-type]
                busy[worker.pipe] = (worker, given)  # type: ignore[assignment]
            if not busy:
                return
            for pipe in _answered(busy):
                worker, item = busy.pop(pipe)
                answer = worker.take()
                if answer is None:
                    busy[worker.pipe] = (worker, item)
                    continue
                value, error = answer
                free.append(worker)
                yield Result(item=item, value=value, error=error)
    finally:
        for worker in [*free, *(worker for worker, _ in busy.values())]:
            worker.close()


_END = object()


def _answered(busy: dict[Connection, tuple[Sandbox[Item, Value], Item]]) -> list[Connection]:
    """The processes that gave an answer or were lost, at least one."""
    first = min(worker.deadline for worker, _ in busy.values())
    ready = wait(list(busy), max(0.0, first - time.monotonic()))
    now = time.monotonic()
    return [pipe for pipe, (worker, _) in busy.items() if pipe in ready or worker.deadline <= now]


def serve(descriptor: int, count: int) -> None:
    """The process of a `Sandbox`: answer items until the other end is closed.

    How many it has begun is written to the file `count`: one that it had not is no reason for its end.

    An item past its limit ends the process by the alarm's default action, which needs neither the
    interpreter, that native code may hold, nor the process that started this one.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they go to all of a job's processes
        signal.signal(number, signal.SIG_IGN)  # who started it ends it
    pipe = Connection(descriptor)
    try:
        work, limit = pipe.recv()
        pipe.send(None)
    except (AttributeError, ImportError) as error:
        pipe.send(RuntimeError(str(error)))
        return
    except (EOFError, ConnectionError):
        return
    begun = 0
    while True:
        try:
            item = pipe.recv()
            begun += 1
            os.pwrite(count, begun.to_bytes(_WORD, "little"), 0)
            signal.setitimer(signal.ITIMER_REAL, limit)
            answer = _answer(work, item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(pipe, answer)
        except (EOFError, ConnectionError):
            return


def _answer(work: Callable[[Item], Value], item: Item) -> tuple[Value | None, Exception | None]:
    """A value, or what the work raised; an error that would not arrive is told by its name and words."""
    try:
        return work(item), None
    except Exception as error:  # all of it is the caller's to judge
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # pickling runs whatever an error defines
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _send(pipe: Connection, answer: tuple[object, Exception | None]) -> None:
    """Send an answer, or why its value cannot be sent."""
    try:
        content = ForkingPickler.dumps(answer)
    except Exception as error:  # pickling runs whatever a value defines
        content = ForkingPickler.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    pipe.send_bytes(content)
