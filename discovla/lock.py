"""One writer per folder: a lock file that names its holder and shows that it lives."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from discovla.files import pid_namespace

logger = logging.getLogger(__name__)

NAME = "writer.lock"
BEAT_SECONDS = 5.0  # between two changes of a lock file by its holder
STALE_SECONDS = 30.0  # a lock of another machine that does not change for so long has no living holder
_SIZE = 512  # bytes of a lock file; a fixed size, so that it is rewritten in place


class LockHeld(ValueError):
    """Another process writes to the folder; the message names it."""


class WriterLock:
    """Lock of a folder, as a context; `writer.lock` in it holds the host, process and a counter.

    Creating a file exclusively is atomic on NFS too.  A holder of the same machine lives as long as its
    process does.  The holder of another machine, or of another container, lives as long as the counter
    changes: clocks and file times are not compared, because those of two machines differ.

    Args:
        folder: made if it is missing.
        purpose: the writer, for messages: "run", "discovla shard".
        on_lost: called from a thread with one line if another process has taken the lock, which happens if
            this one was suspended for longer than `STALE_SECONDS`.
        on_wait: called again and again while the lock of another machine is watched; may raise.
    """

    def __init__(
        self,
        folder: Path,
        purpose: str,
        *,
        on_lost: Callable[[str], None] | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.purpose = folder / NAME, purpose
        self._on_lost, self._on_wait = on_lost, on_wait
        self._record: dict[str, Any] = {
            "purpose": purpose,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(os.getpid()),
            "pids": pid_namespace(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "token": uuid.uuid4().hex,
            "beat": 0,
        }
        self._mutex, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, also from a holder that has ended without releasing it.

        Raises:
            LockHeld: another process holds it.
        """
        self._create(self.path)
        self._thread = threading.Thread(target=self._beat, name="writer lock", daemon=True)
        self._thread.start()

    def move(self, folder: Path, *, renamed: Path) -> None:
        """Lock the new `folder` once the locked one has been renamed to `renamed`, and release that."""
        with self._mutex:
            self.path = renamed / NAME
            self._create(folder / NAME)
            self.path = folder / NAME
            _unlink_if(renamed / NAME, self._record["token"])

    def check(self) -> None:
        """Raise LockHeld if this process no longer holds the lock."""
        with self._mutex:
            record = _read(self.path)
        if record is None or record.get("token") != self._record["token"]:
            raise LockHeld(self._lost_line(record))

    def release(self) -> None:
        """Remove the lock file if it still is that of this process."""
        if self._record["pid"] != os.getpid():  # a forked process
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=BEAT_SECONDS)
        with self._mutex, suppress(OSError):
            for claim in self.path.parent.glob(f".{NAME}.*"):  # of processes that were killed
                claim.unlink(missing_ok=True)
            _unlink_if(self.path, self._record["token"])

    def _create(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                self._write_new(path)
            except FileExistsError:
                if not self._replace_stale(path):
                    continue
            return

    def _write_new(self, path: Path) -> None:
        """Write the record of this process to a file that must not exist."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._content())
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)  # of a full disk
            raise

    def _replace_stale(self, path: Path) -> bool:
        """Replace the lock file of a holder that has ended; return False if another process was faster.

        The new record is written to a claim, a file named by the content of the stale lock, so that one
        process alone can create it.  The claim replaces the lock file if that still has the same content.

        Raises:
            LockHeld: the holder has not ended.
        """
        content = _content(path)
        if content is None:
            return False
        holder = _parse(content)
        lives = _holder_lives(holder)
        if lives is None:
            logger.warning(
                "%s: watching for %g s whether %s still writes here", path, STALE_SECONDS, _named(holder)
            )
            lives = self._changes(path, content)
        if lives:
            raise LockHeld(
                f"{path.parent}: expected no other writer, found {_named(holder)}, which is writing here; "
                "wait for it to end or choose another folder"
            )
        claim = path.with_name(f".{NAME}.{hashlib.sha256(content).hexdigest()[:16]}")
        try:
            self._write_new(claim)
        except FileExistsError:
            if not self._changes(path, content):
                claim.unlink(missing_ok=True)  # its process has ended before it replaced the lock
            return False
        if _content(path) != content:
            claim.unlink(missing_ok=True)
            return False
        logger.warning("%s: %s has ended without releasing the lock; taking it over", path, _named(holder))
        try:
            claim.replace(path)
        except FileNotFoundError:  # another process removed the claim, as that of a process that had ended
            return False
        return True

    def _changes(self, path: Path, content: bytes) -> bool:
        """Return True once a lock file changes, False if it does not within `STALE_SECONDS`."""
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            self._on_wait()
            if _content(path) != content:
                return True
            time.sleep(min(0.2, STALE_SECONDS / 10))
        return False

    def _beat(self) -> None:
        """Change the lock file every `BEAT_SECONDS`, and notice if it is no longer this process's."""
        written = time.monotonic()
        while not self._ended.wait(BEAT_SECONDS):
            try:
                with self._mutex:
                    if self._ended.is_set():
                        return
                    with self.path.open("r+b") as file:
                        record = _parse(file.read())
                        mine = record.get("token") == self._record["token"]
                        if mine:
                            self._record["beat"] += 1
                            file.seek(0)
                            file.write(self._content())
                            file.flush()
                            os.fsync(file.fileno())
                written = time.monotonic()
            except OSError as error:  # ESTALE of NFS, a server that restarts, a file that is being moved
                mine, record = time.monotonic() - written < STALE_SECONDS, None
                if mine:
                    logger.warning("%s: cannot be renewed, trying again: %s", self.path, error.strerror)
            if not mine:
                line = self._lost_line(record)
                logger.error("%s", line)
                if self._on_lost is not None:
                    self._on_lost(line)
                return

    def _content(self) -> bytes:
        return json.dumps(self._record).encode().ljust(_SIZE - 1) + b"\n"

    def _lost_line(self, record: dict[str, Any] | None) -> str:
        holder = "no lock file" if record is None else _named(record)
        return (
            f"{self.path}: expected the lock of this process, found {holder}: this process was suspended or "
            "cut off from the file system, and another writer may have taken the folder over"
        )


def _content(path: Path) -> bytes | None:
    """Return the bytes of a lock file, None if there is none; a stale NFS handle is opened again."""
    for attempt in range(3):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            if attempt == 2:
                raise
            time.sleep(0.1)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    content = _content(path)
    return None if content is None else _parse(content)


def _parse(content: bytes) -> dict[str, Any]:
    """Return the record of a lock file; empty if it is incomplete."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _unlink_if(path: Path, token: str) -> None:
    """Remove a lock file if it is that of the holder with this token."""
    record = _read(path)
    if record is not None and record.get("token") == token:
        path.unlink(missing_ok=True)


def _named(holder: dict[str, Any]) -> str:
    """Return a holder in words."""
    if not holder:
        return "a process that left no name"
    return (
        f"another {holder.get('purpose')} (process {holder.get('pid')} on {holder.get('host')}, since "
        f"{holder.get('since')})"
    )


def _holder_lives(holder: dict[str, Any]) -> bool | None:
    """Return True if the process of a lock lives, None if it cannot be seen from this one."""
    if not holder or holder.get("pids") != pid_namespace():
        return None
    return holder.get("process") == _process(int(holder["pid"]))


def _process(pid: int) -> str | None:
    """Return the id of a process and when it started; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else f"{pid} {int(fields[19])}"
