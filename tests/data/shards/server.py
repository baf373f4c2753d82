"""Shards behind an address, on a server that can be made to fail."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Shards over HTTP: `faults` says what befalls the n-th request for the same bytes of a path."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.seen, self._same = folder, {}, Counter(), Counter()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/").partition("?")[0]
        wanted = request.headers.get("Range")
        self.seen[path] += 1
        self._same[path, wanted] += 1
        faults = self.faults.get(path, [])
        fault = faults[min(self._same[path, wanted], len(faults)) - 1] if faults else None
        content = (self.folder / path).read_bytes() if (self.folder / path).is_file() else None
        if content is None:
            return request.send_error(404)
        if fault == 503 or fault == 404:
            return request.send_error(fault)
        first, last = (
            (int(x) for x in wanted[6:].split("-")) if wanted and fault != "whole" else (0, len(content))
        )
        if wanted and first >= len(content):
            return request.send_error(416)
        body = content[first : last + 1]
        request.send_response(206 if wanted and fault != "whole" else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
        if fault == "drop":
            request.close_connection = True
        return None


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Server]]:
    """An address of a folder's files."""
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, *_) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", server
        http.shutdown()
