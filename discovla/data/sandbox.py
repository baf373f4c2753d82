"""Work in processes that may hang or crash: each item has a time limit, a lost process is replaced."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import struct
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

START_LIMIT = 120.0  # seconds a process may take for its imports, on a busy machine
_WORD = 8  # bytes of a counter
_GRACE = 5.0  # seconds after its limit at which a process that did not end itself is killed
STALL_LIMIT = 60.0  # seconds without a byte, after which a transfer that has begun is given up
_ENTRY = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from discovla.data.sandbox import serve; serve(*map(int, sys.argv[2:]))"
)


class WorkerLost(Exception):
    """The process of an item crashed, was killed or ran past the time limit."""


@dataclass(frozen=True, kw_only=True)
class Result(Generic[Item, Value]):
    """The value of an item, or the error: of the work, or `WorkerLost`."""

    item: Item
    value: Value | None = None
    error: Exception | None = None


class Sandbox(Generic[Item, Value]):
    """A process that works on one item after another, replaced when it is lost.

    The process is a new interpreter, not a fork: it holds no locks or threads of this one, and the daemonic
    processes of a `DataLoader` can start it.  It starts with the first item and ends with this
    process, at the latest at the time limit of its item.  After a fork of this process each of the two has
    its own.  If the process ends before it has begun an item, the item is sent to a new one, once.

    Args:
        work: function of a module, which the process imports by name; items and values must pickle.
        limit: seconds for an item.
    """

    _process: subprocess.Popen[bytes] | None = None
    _pipe: Connection | None = None
    _counter: IO[bytes] | None = None  # number of items that the process has begun
    _sent = 0  # number of items sent to the process
    _owner = 0  # process that started it

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
        """Return the value of one item.

        Raises:
            WorkerLost: the process is lost; the next item starts a new one.
            Exception: raised by the work.
        """
        self.submit(item)
        value, error = self.answer()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    @property
    def pipe(self) -> Connection:
        """The pipe on which the answer arrives."""
        assert self._pipe is not None
        return self._pipe

    def submit(self, item: Item) -> None:
        """Send an item to the process, which is started if there is none."""
        self._item, self._resent = item, False
        self._send(item)

    def answer(self) -> Answer[Value]:
        """Wait for the answer to the item, a value or an error, up to its time limit."""
        while True:
            wait([self.pipe], max(0.0, self.deadline - time.monotonic()))
            answer = self.receive()
            if answer is not None:
                return answer

    def receive(self) -> Answer[Value] | None:
        """Return the answer once `pipe` is ready or the deadline has passed.

        Returns None if the process had ended before it began the item: the item has then been sent to a new
        process, whose answer is to be waited for.
        """
        try:
            if not self.pipe.poll(0):
                return None, self._lost(late=True)
            return self.pipe.recv()
        except BlockingIOError:
            return None, self._lost(late=False, reason=f"stopped within its answer for {STALL_LIMIT:g} s")
        except (EOFError, OSError):  # OSError also if an answer breaks off
            begun = self._begun()
            lost = self._lost(late=False)
        if begun or self._resent:
            return None, lost
        self._resent = True
        self._send(self._item)
        return None

    def close(self) -> None:
        """End the process, even in the middle of an item."""
        if self._owner != os.getpid():
            return
        process, pipe, counter = self._process, self._pipe, self._counter
        self._process = self._pipe = self._counter = None
        if process is not None:
            process.kill()
            # A process that waits for the system, as for a disk that does not answer, dies once it returns.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        for file in (pipe, counter):
            if file is not None:
                file.close()

    def _send(self, item: Item) -> None:
        if self._owner != os.getpid():
            self._disown()
        if self._process is None:
            self._start()
        try:
            self.pipe.send(item)
        except (ConnectionError, BlockingIOError):  # it was killed or suspended while idle
            self.close()
            self._start()
            self.pipe.send(item)
        self._sent += 1
        self.deadline = time.monotonic() + self.limit + _GRACE

    def _begun(self) -> bool:
        """Return True if the process has begun the last item."""
        assert self._counter is not None
        return int.from_bytes(os.pread(self._counter.fileno(), _WORD, 0), "little") == self._sent

    def _start(self) -> None:
        """Start the process and wait until it has imported its work."""
        self._pipe, theirs = Pipe()
        _limit_stalls(self._pipe)
        self._counter, self._sent = os.fdopen(os.memfd_create("items begun"), "rb"), 0
        with theirs:
            shared = theirs.fileno(), self._counter.fileno()
            command = [sys.executable, "-c", _ENTRY, json.dumps(sys.path), *map(str, shared)]
            # Its standard output is our standard error: a program may read our standard output.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=shared)
        self._owner = os.getpid()
        try:
            self._pipe.send((self.work, self.limit))
            ready = self._pipe.poll(START_LIMIT)
            error = self._pipe.recv() if ready else RuntimeError(f"no answer in {START_LIMIT:g} s")
        except (EOFError, ConnectionError):
            error = RuntimeError("it ended; its standard error says why")
        except BlockingIOError:
            error = RuntimeError(f"it was suspended for {STALL_LIMIT:g} s")
        if error is not None:
            self.close()
            raise RuntimeError(f"a process for {self.work.__qualname__} did not start: {error}") from error

    def _lost(self, *, late: bool, reason: str | None = None) -> WorkerLost:
        """End the process and return why it is lost."""
        process = self._process
        assert process is not None
        if reason is not None:
            self.close()
            return WorkerLost(reason)
        code = None
        if not late:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(_GRACE)
        self.close()
        if late or code == -signal.SIGALRM:
            return WorkerLost(f"took longer than {self.limit:g} s")
        if code is not None and code < 0:
            return WorkerLost(f"its process died of {signal.Signals(-code).name}")
        return WorkerLost(f"its process ended with status {code}")

    def _disown(self) -> None:
        """Leave the process to the parent of this process, which started it before a fork."""
        for file in (self._pipe, self._counter):
            if file is not None:
                file.close()
        if self._process is not None:
            self._process.returncode = 0  # no child of this process: there is nothing to wait for
        self._process = self._pipe = self._counter = None
        self._owner = os.getpid()


def run_sandboxed(
    work: Callable[[Item], Value], items: Iterable[Item], *, workers: int, limit: float
) -> Generator[Result[Item, Value], None, None]:
    """Work on items in several processes and yield their results, in the order in which they end.

    The next item is taken from `items` when a process is free.  No process is left when the generator ends,
    is closed or is dropped.

    Args:
        work, limit: as for `Sandbox`.
        workers: number of processes, at least 1.

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
            while free and (item := next(queue, _END)) is not _END:
                sandbox = free.pop()
                sandbox.submit(item)  # type: ignore[arg-type]
                busy[sandbox.pipe] = (sandbox, item)  # type: ignore[assignment]
            if not busy:
                return
            for pipe in _ready(busy):
                sandbox, item = busy.pop(pipe)
                answer = sandbox.receive()
                if answer is None:
                    busy[sandbox.pipe] = (sandbox, item)
                    continue
                value, error = answer
                free.append(sandbox)
                yield Result(item=item, value=value, error=error)
    finally:
        for sandbox in [*free, *(sandbox for sandbox, _ in busy.values())]:
            sandbox.close()


_END = object()


def _limit_stalls(pipe: Connection) -> None:
    """Make a transfer over the pipe, which is a socket, fail once no byte has moved for `STALL_LIMIT`.

    An answer may be longer than the pipe's buffer, and the other process suspended in the middle of it.
    """
    limit = struct.pack("ll", int(STALL_LIMIT), int(STALL_LIMIT % 1 * 1e6))  # struct timeval
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, limit)


def _ready(busy: dict[Connection, tuple[Sandbox[Item, Value], Item]]) -> list[Connection]:
    """Wait for at least one process that has answered, ended or passed its deadline."""
    first = min(sandbox.deadline for sandbox, _ in busy.values())
    ready = wait(list(busy), max(0.0, first - time.monotonic()))
    now = time.monotonic()
    return [pipe for pipe, (sandbox, _) in busy.items() if pipe in ready or sandbox.deadline <= now]


def serve(pipe_fd: int, counter_fd: int) -> None:
    """Run the process of a `Sandbox`: answer items until the other end closes the pipe.

    The number of items begun is written to `counter_fd`, so that an item that was not begun is not blamed for
    the end of the process.

    An item past its limit ends the process by the default action of the alarm.  That needs neither the
    interpreter, which native code may hold, nor the process that started this one.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a launcher sends them to all processes
        signal.signal(number, signal.SIG_IGN)  # the process that started this one ends it
    pipe = Connection(pipe_fd)
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
            os.pwrite(counter_fd, begun.to_bytes(_WORD, "little"), 0)
            signal.setitimer(signal.ITIMER_REAL, limit)
            answer = _answer(work, item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send_answer(pipe, answer)
        except (EOFError, ConnectionError):
            return


def _answer(work: Callable[[Item], Value], item: Item) -> Answer[Value]:
    """Return the value or the error of the work; an error that does not pickle is replaced by its text."""
    try:
        return work(item), None
    except Exception as error:  # of any kind: the caller judges it
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # pickling runs code of the error
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _send_answer(pipe: Connection, answer: tuple[object, Exception | None]) -> None:
    """Send an answer, or the error of pickling its value."""
    try:
        content = ForkingPickler.dumps(answer)
    except Exception as error:  # pickling runs code of the value
        content = ForkingPickler.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    pipe.send_bytes(content)
