"""Search through HTTP beside search in this process, and clients that search at the same time.

    python benchmarks/serve.py INDEX [--queries 300] [--clients 32] [--out FILE]

`discovla serve` runs as a process of its own. Ten searches in this process and ten of the same texts over one
HTTP connection take turns; either is first in every second round. Both processes compute on one thread.

Rows are one JSON a line. ms_p50: of a search by the clock; cpu_ms: processor time of a search, of the process
that searches. added_ms_p50: what the client waits beyond the `seconds` of the response, so the queue, the
encoding of the response, HTTP and the client. For the clients, each of which searches again once it has its
answer: p50 and p99 of all requests, and those that were not answered with 200.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.measure import ROOT, machine, results_file, write_row
from discovla.search.index import Index

BLOCK = 10  # searches of one kind before the other
HITS = 24  # as the page asks for
WARM_UP = 20
SUBJECTS = (
    "a red circle",
    "two squares",
    "a dog",
    "a man",
    "a green ring",
    "children",
    "a car",
    "a white cross",
)
ACTIONS = ("moves left", "jumps", "grows", "meets another", "stops", "is seen", "turns", "passes by")
PLACES = ("at the top", "in a garden", "below", "at night", "on the left", "in a street", "outside", "twice")


def texts(count: int) -> list[str]:
    """Return different queries."""
    return [" ".join(words) for words in islice(product(SUBJECTS, ACTIONS, PLACES), count)]


@contextmanager
def served(index: Path) -> Iterator[tuple[psutil.Process, int]]:
    """Serve an index in a process; yield it and its port."""
    code = [sys.executable, "-m", "discovla", "serve", str(index), "--port", "0"]
    with subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise ValueError(f"{index}: the server ended with status {process.wait()}")
        try:
            yield psutil.Process(process.pid), int(match[1])
        finally:
            process.terminate()


def cpu_seconds(process: psutil.Process) -> float:
    """Return the processor time that a process has used."""
    used = process.cpu_times()
    return used.user + used.system


def fetch(connection: http.client.HTTPConnection, text: str) -> tuple[float, float, int]:
    """Search over HTTP; return milliseconds, those that the response reports, and its status."""
    began = time.perf_counter()
    connection.request("GET", f"/api/search?q={quote(text)}&k={HITS}")
    response = connection.getresponse()
    content = response.read()
    took = 1000 * (time.perf_counter() - began)
    inside = 1000 * json.loads(content)["seconds"] if response.status == 200 else 0.0
    return took, inside, response.status


def beside_in_process(
    index: Index, process: psutil.Process, port: int, queries: Sequence[str]
) -> dict[str, Any]:
    """Compare searches in this process with the same ones over HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    own, this = [], psutil.Process()
    answers = []
    cpu = {"in_process": 0.0, "server": 0.0}

    def search_here(some: Sequence[str]) -> None:
        before = cpu_seconds(this)
        for text in some:
            began = time.perf_counter()
            index.search(text, HITS)
            own.append(1000 * (time.perf_counter() - began))
        cpu["in_process"] += cpu_seconds(this) - before

    def search_there(some: Sequence[str]) -> None:
        before = cpu_seconds(process)
        answers.extend(fetch(connection, text) for text in some)
        cpu["server"] += cpu_seconds(process) - before

    for text in queries[:WARM_UP]:
        index.search(text, HITS)
        fetch(connection, text)
    for turn, first in enumerate(range(0, len(queries), BLOCK)):
        kinds = (search_here, search_there) if turn % 2 else (search_there, search_here)
        for search in kinds:
            search(queries[first : first + BLOCK])
    statuses = [status for _, _, status in answers]
    return {
        "name": "HTTP beside in-process",
        "searches": len(queries),
        "errors": sum(status != 200 for status in statuses),
        "in_process_ms_p50": statistics.median(own),
        "http_ms_p50": statistics.median(took for took, _, _ in answers),
        "added_ms_p50": statistics.median(took - inside for took, inside, _ in answers),
        "in_process_cpu_ms": 1000 * cpu["in_process"] / len(queries),
        "server_cpu_ms": 1000 * cpu["server"] / len(queries),
    }


def at_once(process: psutil.Process, port: int, queries: Sequence[str], clients: int) -> dict[str, Any]:
    """Measure clients that search at the same time."""
    answers: list[tuple[float, float, int]] = []

    def search(share: Sequence[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        answers.extend([fetch(connection, text) for text in share])

    per_client = max(BLOCK, len(queries) // clients)
    shares = [
        [queries[(c * per_client + i) % len(queries)] for i in range(per_client)] for c in range(clients)
    ]
    before, began = cpu_seconds(process), time.perf_counter()
    threads = [threading.Thread(target=search, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    times = sorted(took for took, _, _ in answers)
    p50, p99 = statistics.median(times), times[int(0.99 * (len(times) - 1))]
    return {
        "name": "clients at once",
        "clients": clients,
        "searches": len(answers),
        "errors": clients * per_client - sum(status == 200 for _, _, status in answers),
        "ms_p50": p50,
        "ms_p99": p99,
        "p99_by_p50": p99 / p50,
        "searches_s": len(answers) / seconds,
        "server_cpu_ms": 1000 * (cpu_seconds(process) - before) / len(answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=Path)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = machine("cpu")
    out = arguments.out or results_file(where, "serve")
    queries = texts(arguments.queries)
    with Index.open(arguments.index, read_only=True) as index, served(arguments.index) as (process, port):
        status = index.status()
        where |= {"model": status.model, "moments": status.moments, "threads": 1}
        for row in (
            beside_in_process(index, process, port, queries),
            at_once(process, port, queries, arguments.clients),
        ):
            write_row(out, where | row)
            print(json.dumps(row))


if __name__ == "__main__":
    main()
