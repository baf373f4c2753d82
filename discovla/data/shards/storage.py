"""Read byte ranges of files in a local folder, or below a URL (http, https, s3, gs ...) through fsspec."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
Ranges: TypeAlias = Sequence[tuple[int, int]]  # offset and size in bytes

OPEN_FILES = 64  # held open by each process
ATTEMPTS = 5  # of a remote read
PAUSE = 0.2  # seconds before the second attempt, doubled before each further one
DEADLINE = 240.0  # seconds after which no further attempt starts
RANGE_SECONDS = 60.0  # limit of one attempt to read frames
FILE_SECONDS = 300.0  # limit of one attempt to read an index, which may be large
TRANSIENT_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)


class StorageError(Exception):
    """A file, or part of one, that cannot be read; the message names its path or URL."""


class LocalStorage:
    """Files of a local folder, read by `pread`, which takes a third of the time of fsspec for small frames.

    It pickles, as `RemoteStorage` does, so that `DataLoader` workers receive it.
    """

    stable = True  # bytes that were read once are the same when read again

    def __init__(self, root: str) -> None:
        self._root = Path(root)
        self._open: OrderedDict[str, int] = OrderedDict()  # descriptors, the least recently used first

    def __getstate__(self) -> dict[str, object]:
        return {"_root": self._root, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def path(self, file: str) -> str:
        """Return the path or URL of a file."""
        return str(self._root / file)

    def size(self, file: str) -> int | None:
        """Return the bytes of a file, or None if finding out takes a request."""
        with self._named(file):
            return (self._root / file).stat().st_size

    def read(self, file: str) -> bytes:
        """Return the content of a file.

        Raises:
            StorageError: the file cannot be read.
        """
        with self._named(file):
            return (self._root / file).read_bytes()

    def read_ranges(self, file: str, ranges: Ranges) -> list[bytes]:
        """Return the bytes of each range.

        Raises:
            StorageError: the file cannot be read, or is shorter.
        """
        with self._named(file):
            if file not in self._open:
                if len(self._open) >= OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                self._open[file] = os.open(self._root / file, os.O_RDONLY | os.O_CLOEXEC)
            self._open.move_to_end(file)
            contents = [_pread(self._open[file], offset, size) for offset, size in ranges]
        _check_lengths(self.path(file), ranges, contents)
        return contents

    @contextmanager
    def _named(self, file: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path(file)}: {error.strerror}") from error


class RemoteStorage:
    """Files below a URL, read through fsspec; a read that fails transiently is repeated.

    Endpoint, credentials and other options come from the environment: the variables of the protocol's own
    package, or fsspec's (`FSSPEC_S3_ENDPOINT_URL=...`).

    Args:
        root: URL. The query of an http(s) URL (`?token=...`) is sent with every request.
    """

    stable = False

    def __init__(self, root: str) -> None:
        self._is_http = root.startswith(("http://", "https://"))
        url, mark, query = root.partition("?") if self._is_http else (root, "", "")
        self._root, self._query = url.rstrip("/"), mark + query
        # fsspec's event loop does not survive a fork, so each process opens its own filesystem. A child keeps
        # that of its parent: closing it would wait for a thread that the child does not have.
        self._filesystems: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filesystems": {}}

    def path(self, file: str) -> str:
        return f"{self._root}/{file}"

    def size(self, file: str) -> int | None:
        return None

    def read(self, file: str) -> bytes:
        url = self._url(file)
        return self._repeat(file, FILE_SECONDS, lambda filesystem, limit: filesystem.cat_file(url, **limit))

    def read_ranges(self, file: str, ranges: Ranges) -> list[bytes]:
        urls = [self._url(file)] * len(ranges)
        starts = [offset for offset, _ in ranges]
        ends = [offset + size for offset, size in ranges]

        def read(filesystem: Any, limit: dict[str, float]) -> list[bytes]:
            contents = filesystem.cat_ranges(urls, starts, ends, on_error="return", **limit)
            for content in contents:
                if isinstance(content, Exception):
                    raise content
            return contents

        contents = self._repeat(file, RANGE_SECONDS, read)
        _check_lengths(self.path(file), ranges, contents)
        return contents

    def _url(self, file: str) -> str:
        return f"{self._root}/{quote(file) if self._is_http else file}{self._query}"

    def _filesystem(self) -> Any:
        """Return the filesystem of this process, opened at the first use."""
        if os.getpid() not in self._filesystems:
            import fsspec.core  # takes 60 ms

            protocol = self._root.partition("://")[0]
            # a range of a compressed answer would be other bytes
            options = {"headers": {"Accept-Encoding": "identity"}} if self._is_http else {}
            try:
                self._filesystems[os.getpid()], _ = fsspec.core.url_to_fs(self._root, **options)
            except ImportError as error:
                extra = {"s3": "s3", "gs": "gs", "gcs": "gs"}.get(protocol)
                hint = f"; pip install 'discovla[{extra}]'" if extra else ""
                raise StorageError(f"{self._root}: {protocol}:// needs a package: {error}{hint}") from error
            except ValueError as error:
                expected = "expected a folder, http, https, s3, gs or another protocol of fsspec"
                raise StorageError(f"{self._root}: {expected}, found {protocol!r}: {error}") from error
        return self._filesystems[os.getpid()]

    def _repeat(self, file: str, seconds: float, read: Callable[[Any, dict[str, float]], Value]) -> Value:
        """Call `read` until it succeeds, up to `ATTEMPTS` times; s3fs and gcsfs repeat requests themselves.

        Args:
            seconds: limit of one attempt.
            read: called with the filesystem and the keyword arguments that limit its time.
        """
        filesystem = self._filesystem()
        limit = {"timeout": seconds} if filesystem.async_impl else {}
        attempts = 1 if hasattr(filesystem, "retries") else ATTEMPTS
        deadline = time.monotonic() + DEADLINE
        attempt, pause = 1, PAUSE
        while True:
            try:
                return read(filesystem, limit)
            except Exception as error:  # every filesystem has its own exceptions
                reason = self._reason(error, seconds)
                if not _is_transient(error):
                    raise StorageError(f"{self.path(file)}: {reason}") from error
                if attempt == attempts or time.monotonic() + pause > deadline:
                    after = f"not read in {attempt} attempts: " if attempt > 1 else ""
                    raise StorageError(f"{self.path(file)}: {after}{reason}") from error
            logger.warning("%s: %s, attempt %d of %d", self.path(file), reason, attempt, attempts)
            time.sleep(pause)
            attempt, pause = attempt + 1, 2 * pause

    def _reason(self, error: Exception, seconds: float) -> str:
        """Describe an error in one line, without the query, which may be a secret."""
        status = _status(error)
        if isinstance(error, TimeoutError):
            return f"no complete answer within {seconds:g} s"
        if isinstance(error, FileNotFoundError):
            return "no such file"
        if status == 416:
            return "cut off: the server has no such bytes (HTTP 416)"
        if status is not None:
            return f"the server answers HTTP {status}"
        name, text = type(error).__name__, str(error)
        if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
            name, text = os.strerror(error.errno), error.strerror or ""
        text = " ".join(text.split())
        if self._query:
            text = text.replace(self._query, "")
        return name if text in ("", name) else f"{name}: {text}"


def open_storage(root: str) -> LocalStorage | RemoteStorage:
    """Return the files below a local folder or a URL."""
    root = root.removeprefix("file://")
    return RemoteStorage(root) if "://" in root else LocalStorage(root)


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    """Read `size` bytes, or fewer at the end of the file."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (rest := os.pread(descriptor, size - len(content), offset + len(content))):
        content += rest
    return content


def _check_lengths(path: str, ranges: Ranges, contents: Sequence[bytes]) -> None:
    """Raise StorageError if a range has fewer or more bytes than requested."""
    for (offset, size), content in zip(ranges, contents, strict=True):
        expected = f"expected {size} bytes at {offset}, found {len(content)}"
        if len(content) < size:
            raise StorageError(f"{path}: cut off: {expected}")
        if len(content) > size:
            raise StorageError(f"{path}: {expected}: the server does not answer range requests")


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an exception of aiohttp (`status`) or gcsfs (`code`)."""
    name = "status" if hasattr(error, "status") else "code"
    status = getattr(error, name, None)
    return status if isinstance(status, int) else None


def _is_transient(error: Exception) -> bool:
    """Return True if the same read may succeed a moment later."""
    status = _status(error)
    if status is not None:
        return status in TRANSIENT_STATUS
    permanent = (
        FileNotFoundError,
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
        ValueError,
        TypeError,
    )
    return not isinstance(error, permanent)
