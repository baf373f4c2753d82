"""Follow an index that another process may write, and tell its state to those who listen."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from pydantic import TypeAdapter

from discovla.search.index import Index
from discovla.search.records import IndexStatus

POLL_SECONDS = 1.0
POLL_SHARE = 0.05  # of the time that reading a large index may take
HEARTBEAT_SECONDS = 15.0  # between comments that keep a quiet stream open through proxies
_STATUS = TypeAdapter(IndexStatus)
_LOG = logging.getLogger(__name__)


class StatusFeed:
    """State of an index, read once for all listeners.

    `follow` makes new moments searchable and reads the state while somebody listens, once a second, or less
    often if that would take more than `POLL_SHARE` of the time.  `events` ends at `close`.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._latest = ""
        self._listeners = 0
        self._error = ""
        self._closed = asyncio.Event()
        self._changed = asyncio.Condition()

    async def follow(self) -> None:
        """Refresh the index until `close`."""
        while not self._closed.is_set():
            began = time.monotonic()
            await asyncio.to_thread(self._refresh)
            if self._listeners and not self._error:
                await self.read()
            pause = max(POLL_SECONDS, (time.monotonic() - began) / POLL_SHARE)
            try:
                async with asyncio.timeout(pause):
                    await self._closed.wait()
            except TimeoutError:
                pass

    async def read(self) -> str:
        """Return the state as JSON, and send it to the listeners."""
        status = await asyncio.to_thread(self._index.status)
        self._latest = _STATUS.dump_json(status).decode()
        async with self._changed:
            self._changed.notify_all()
        return self._latest

    async def events(self) -> AsyncIterator[str]:
        """Yield the state as server-sent events: at once, and whenever it changes."""
        self._listeners += 1
        try:
            latest, spoken = await self.read(), time.monotonic()
            yield f"data: {latest}\n\n"
            while not self._closed.is_set():
                await self._wait()
                if self._latest != latest:
                    latest, spoken = self._latest, time.monotonic()
                    yield f"data: {latest}\n\n"
                elif time.monotonic() - spoken > HEARTBEAT_SECONDS:
                    spoken = time.monotonic()
                    yield ": nothing has changed\n\n"
        finally:
            self._listeners -= 1

    def close(self) -> None:
        """End `follow` at once and all streams within a second."""
        self._closed.set()

    def _refresh(self) -> None:
        """Read what another process has written; if that fails, as in a rebuild, what is in memory stays."""
        try:
            self._index.refresh()
            self._error = ""
        except (OSError, RuntimeError, ValueError) as error:
            if str(error) != self._error:
                _LOG.warning("the index cannot be read: %s; what is in memory is served", error)
            self._error = str(error)

    async def _wait(self) -> None:
        """Wait for the next reading, at most a second."""
        try:
            async with asyncio.timeout(POLL_SECONDS), self._changed:
                await self._changed.wait()
        except TimeoutError:
            pass
