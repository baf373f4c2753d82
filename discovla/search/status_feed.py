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
HEARTBEAT_SECONDS = 15.0  # between comments that keep a quiet stream open through proxies
_STATUS = TypeAdapter(IndexStatus)
_LOG = logging.getLogger(__name__)


class StatusFeed:
    """State of an index, read once a second for all listeners.

    `follow` reads it and makes new moments searchable; `events` yields server-sent events until `close`.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._latest = ""
        self._error = ""
        self._closed = False
        self._changed = asyncio.Condition()

    async def follow(self) -> None:
        """Refresh the index and read its state until `close`."""
        while not self._closed:
            await self._read()
            await asyncio.sleep(POLL_SECONDS)

    async def read(self) -> str:
        """Return the state as JSON."""
        if not self._latest:
            await self._read()
        return self._latest

    async def events(self) -> AsyncIterator[str]:
        """Yield the state as server-sent events: at once, and whenever it changes."""
        sent, spoken = "", time.monotonic()
        while not self._closed:
            if self._latest != sent:
                sent, spoken = self._latest, time.monotonic()
                yield f"data: {sent}\n\n"
            elif time.monotonic() - spoken > HEARTBEAT_SECONDS:
                spoken = time.monotonic()
                yield ": nothing has changed\n\n"
            await self._wait()

    def close(self) -> None:
        """End `follow` and all streams, within a second."""
        self._closed = True

    async def _read(self) -> None:
        try:
            await asyncio.to_thread(self._index.refresh)
            status = await asyncio.to_thread(self._index.status)
        except (OSError, RuntimeError, ValueError) as error:  # such as an index that `--rebuild` replaces now
            if str(error) != self._error:
                _LOG.warning("the index cannot be read: %s; its last state is served", error)
            self._error = str(error)
            return
        self._error = ""
        self._latest = _STATUS.dump_json(status).decode()
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self) -> None:
        """Wait for the next reading, at most a second."""
        try:
            async with asyncio.timeout(POLL_SECONDS), self._changed:
                await self._changed.wait()
        except TimeoutError:
            pass
