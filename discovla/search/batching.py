"""One thread that answers the searches of all requests, and encodes the texts that wait together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from discovla.search.index import Index
from discovla.search.records import Query, TextQuery

BATCH = 64  # texts that are encoded at once


@dataclass(frozen=True, kw_only=True)
class _Job:
    query: Query
    work: Callable[[Query], Any]
    future: Future[Any] = field(default_factory=Future)


class SearchQueue:
    """Queue of searches in one index, answered in order by one thread.

    While a search runs, further ones wait; when it is done, all texts that wait are encoded as one batch.  A
    text that arrives alone is encoded at once.  An answer that nobody waits for any more is not computed.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._answer_all, name="search", daemon=True)
        self._thread.start()

    def submit(self, query: Query, work: Callable[[Query], Any]) -> Future[Any]:
        """Return the future result of `work(query)`, where a text comes with its embedding."""
        job = _Job(query=query, work=work)
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _answer_all(self) -> None:
        while (first := self._jobs.get()) is not None:
            batch, last = [first], False
            while len(batch) < BATCH and not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    last = True
                    break
                batch.append(job)
            self._answer([job for job in batch if job.future.set_running_or_notify_cancel()])
            if last:
                return

    def _answer(self, batch: list[_Job]) -> None:
        queries = self._with_embeddings([job.query for job in batch])
        for job, query in zip(batch, queries, strict=True):
            try:
                job.future.set_result(job.work(query))
            except Exception as error:  # the request that waits for it raises it
                job.future.set_exception(error)

    def _with_embeddings(self, queries: list[Query]) -> list[Query]:
        """Embed several texts at once; one text alone is left to the search."""
        texts = {i: query for i, query in enumerate(queries) if isinstance(query, TextQuery)}
        if len(texts) < 2:
            return queries
        try:
            embeddings = self._index.embed_texts([query.text for query in texts.values()])
        except ValueError:  # one of them cannot be encoded: each search then reports its own
            return queries
        for row, (i, query) in enumerate(texts.items()):
            queries[i] = replace(query, embedding=embeddings[row : row + 1])
        return queries
