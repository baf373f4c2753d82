"""Files that are written completely or not at all."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_UNFINISHED = ".part"
_WRITER = re.compile(rf"\.(?P<host>[0-9a-f]{{8}})\.(?P<process>\d+)\.[0-9a-f]{{8}}{re.escape(_UNFINISHED)}$")
_DAY = 86_400.0  # seconds


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a new file, which replaces `path` when the context ends.

    Until then, and after an error or a kill, `path` is what it was.  Threads, processes and machines may
    write the same path at once: one of their files remains.

    Args:
        durable: flush the file to the disk before it replaces `path`, which a power cut then leaves whole.

    Raises:
        OSError: the file cannot be written.
    """
    writer = f"{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    unfinished = path.with_name(f".{path.name}.{writer}{_UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file as `replacing` does, and make its folder; text is written in UTF-8.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent, path.name)
    with replacing(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_unfinished(folder: Path, name: str | None = None, *, only_writer: bool = False) -> None:
    """Remove files of a folder that `replacing` left unfinished in processes that were killed.

    A process of another machine or container is taken to have been killed if its file is a day old.  A file
    that cannot be removed stays.

    Args:
        name: of the one file whose remains are removed; None: those of every file.
        only_writer: no other process writes to the folder: all remains are removed.
    """
    for path in folder.glob(f".{'*' if name is None else glob.escape(name)}.*{_UNFINISHED}"):
        writer = _WRITER.search(path.name)
        if writer is None:  # a file of another program
            continue
        with suppress(OSError):
            if only_writer or _is_killed(writer["host"], writer["process"], path):
                path.unlink()


def _is_killed(host: str, process: str, path: Path) -> bool:
    """Return True if the process that writes an unfinished file has ended."""
    if host == _host():
        return not Path(f"/proc/{process}").exists()
    return time.time() - path.stat().st_mtime > _DAY


def pid_namespace() -> str:
    """Return the machine, since its start, and container in which process ids are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"  # equal to no other, not even of this process


def _host() -> str:
    """Return the machine and container in the name of an unfinished file: 8 hexadecimal digits."""
    return hashlib.sha256(pid_namespace().encode()).hexdigest()[:8]
