"""Parts of files, from a folder or from a server."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import urllib3
from urllib3.exceptions import HTTPError

from discovla.data.retry import PASSING, Passing, Tries

logger = logging.getLogger(__name__)

TRIES = Tries(count=5, wait=0.2)  # of a request
_TIMEOUT = urllib3.Timeout(connect=10, read=60)
_OPEN_FILES = 64


class Unread(Exception):
    """A file or part of one that cannot be had; the message names it."""


class Files(Protocol):
    """Files below a root.  They are sent to worker processes, so they must pickle.

    stay: whether what was read once reads the same again.
    """

    stay: bool

    def name(self, file: str) -> str:
        """The whole path or address of a file."""
        ...

    def size(self, file: str) -> int | None:
        """Bytes of a file; None where that is not known without asking for them."""
        ...

    def whole(self, file: str) -> bytes:
        """All of a file."""
        ...

    def part(self, file: str, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset` on."""
        ...


def files_at(root: str | Path) -> Files:
    """Files of a folder, or below an http(s) address."""
    text = str(root)
    return HttpFiles(text) if text.startswith(("http://", "https://")) else LocalFiles(text)


class LocalFiles:
    """Files of a folder.

    The number of those held open has a bound, and nothing of them stays in memory.
    """

    stay = True

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self._open: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def name(self, file: str) -> str:
        return str(self.root / file)

    def size(self, file: str) -> int | None:
        try:
            return (self.root / file).stat().st_size
        except OSError as error:
            raise Unread(f"{self.name(file)}: {error.strerror}") from error

    def whole(self, file: str) -> bytes:
        try:
            return (self.root / file).read_bytes()
        except OSError as error:
            raise Unread(f"{self.name(file)}: {error.strerror}") from error

    def part(self, file: str, offset: int, size: int) -> bytes:
        found = b""
        try:
            descriptor = self._descriptor(file)
            while len(found) < size and (
                more := os.pread(descriptor, size - len(found), offset + len(found))
            ):
                found = found + more if found else more
        except OSError as error:
            raise Unread(f"{self.name(file)}: {error.strerror}") from error
        if len(found) < size:
            raise Unread(f"{self.name(file)}: cut off: expected {size} bytes at {offset}, found {len(found)}")
        return found

    def _descriptor(self, file: str) -> int:
        """An open file, in place of the one that was not used for longest."""
        if file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = os.open(self.root / file, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(file)
        return self._open[file]


class HttpFiles:
    """Files of a server that answers range requests.

    A request that fails, or whose answer ends early, is made again; each process has its own connections.

    Args:
        root: address they lie below; what follows a `?` in it is sent with each.
    """

    stay = False

    def __init__(self, root: str) -> None:
        path, mark, query = root.partition("?")
        self.root, self._query = path.rstrip("/"), mark + query
        self._pool: urllib3.PoolManager | None = None
        self._owner = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}

    def name(self, file: str) -> str:
        return f"{self.root}/{file}"

    def size(self, file: str) -> int | None:
        return None

    def whole(self, file: str) -> bytes:
        return self._tried(file, {}, 200)

    def part(self, file: str, offset: int, size: int) -> bytes:
        found = self._tried(file, {"Range": f"bytes={offset}-{offset + size - 1}"}, 206)
        if len(found) != size:
            raise Unread(f"{self.name(file)}: cut off: expected {size} bytes at {offset}, found {len(found)}")
        return found

    def _tried(self, file: str, headers: dict[str, str], status: int) -> bytes:
        """The body of an answer, asked for until it comes or there is no more hope."""
        name = self.name(file)
        try:
            return TRIES.of(
                lambda: self._asked(file, headers, status), lambda why: logger.warning("%s: %s", name, why)
            )
        except Passing as error:
            raise Unread(f"{name}: not read in {TRIES.count} attempts: {error}") from error

    def _asked(self, file: str, headers: dict[str, str], status: int) -> bytes:
        """The body of one answer.

        Raises:
            Passing: it did not come whole, or the server asks to come back.
            Unread: the answer is another and will stay so.
        """
        if self._pool is None or self._owner != os.getpid():  # connections do not survive a fork
            self._pool, self._owner = urllib3.PoolManager(maxsize=4), os.getpid()
        # frames are compressed as far as they will be, and a range of something recoded would be another
        headers = headers | {"Accept-Encoding": "identity"}
        name = self.name(file)
        try:
            answer = self._pool.request(
                "GET",
                name + self._query,
                headers=headers,
                timeout=_TIMEOUT,
                retries=False,
                preload_content=False,
            )
            with _let_go(answer):
                if answer.status in PASSING:
                    raise Passing(f"the server answers {answer.status}")
                if answer.status != status:
                    raise Unread(f"{name}: {_refusal(answer.status, status)}")
                return answer.read()
        except (HTTPError, OSError) as error:
            raise Passing(_words(error)) from error


@contextmanager
def _let_go(answer: urllib3.BaseHTTPResponse) -> Iterator[None]:
    """Give the connection of an answer back, or close it where its body was not read."""
    try:
        yield
    except BaseException:
        answer.close()
        raise
    finally:
        answer.release_conn()


def _refusal(found: int, wanted: int) -> str:
    """What an answer means that is not the one expected."""
    if found == 416:
        return "cut off: the server has no such bytes (416)"
    if (found, wanted) == (200, 206):
        return "expected a server that answers range requests (206), found one that sends whole files (200)"
    return f"expected the answer {wanted}, found {found}"


def _words(error: Exception) -> str:
    """An error without the objects that urllib3 names in it."""
    text = " ".join(str(error.args[0] if error.args else "").split())
    return type(error).__name__ if "object at 0x" in text or not text else text
