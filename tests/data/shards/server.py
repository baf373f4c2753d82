"""An HTTP server of a shard folder that can be made to fail; it answers requests of s3fs and gcsfs too."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server:
    """Files of a folder, by the last part of a request's path.

    faults: for a file, what happens to the n-th request for the same bytes; the last fault repeats. An HTTP
    status; `drop` half of the body; `hang` without an answer; `whole`: the file instead of a range; `short`:
    a range without its last byte; None: nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.requests, self._repeats = folder, {}, Counter(), Counter()
        self.closed = threading.Event()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        file = unquote(urlsplit(request.path).path).rsplit("/", 1)[1]
        requested = request.headers.get("Range")
        self.requests[file] += 1
        self._repeats[file, requested] += 1
        faults = self.faults.get(file, [None])
        fault = faults[min(self._repeats[file, requested], len(faults)) - 1]
        if fault == "hang":
            self.closed.wait()
        if isinstance(fault, int):
            return request.send_error(fault)
        if not (self.folder / file).is_file():
            return request.send_error(404)
        body = (self.folder / file).read_bytes()
        partial = requested is not None and fault != "whole"
        if partial:
            first, last = (int(number) for number in requested.removeprefix("bytes=").split("-"))
            if first >= len(body):
                return request.send_error(416)
            body = body[first : last + 1]
        if fault == "short":
            body = body[:-1]
        request.send_response(206 if partial else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
        if fault == "drop":
            request.close_connection = True
        return None


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Server]]:
    """Serve a folder and yield its address."""
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", server
        finally:
            server.closed.set()
            http.shutdown()
