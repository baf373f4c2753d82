"""A local OpenAI-compatible server with injected faults."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


@dataclass
class Fake:
    """State of the server.

    faults: of its next requests, each `drop`, `stall`, `trickle`, `cut`, `empty` or a status.
    """

    url: str = ""
    faults: list[str | int] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)  # hashes of the pictures that got an answer
    asked: int = 0
    last: dict = field(default_factory=dict)
    headers: dict = field(default_factory=dict)
    release: threading.Event = field(default_factory=threading.Event)


@contextmanager
def captions_server(*faults: str | int) -> Iterator[Fake]:
    """Run a server whose first requests have these faults."""
    fake, lock = Fake(faults=list(faults)), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                fake.asked += 1
                fault = fake.faults.pop(0) if fake.faults else None
            if fault == "drop":
                return self.connection.close()
            if fault == "stall":
                fake.release.wait(20)
                return self.connection.close()
            if fault == "trickle":
                return self._trickle()
            if isinstance(fault, int):
                return self._send(fault, b'{"error": "injected"}')
            if fault == "cut":
                return self._send(200, b'{"choices": [{"mess')
            if fault == "empty":
                return self._send(200, json.dumps(response(" ")).encode())
            with lock:
                fake.last, fake.headers = json.loads(body), dict(self.headers)
                picture, text = caption(fake.last)
                fake.seen.append(picture)
            return self._send(200, json.dumps(response(text)).encode())

        def _trickle(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            with suppress(OSError):  # the client leaves
                while not fake.release.wait(0.1):
                    self.wfile.write(b" ")

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.release.set()
        server.shutdown()
        server.server_close()


def response(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def caption(question: dict) -> tuple[str, str]:
    """Return the hash of the picture in a request, and a caption of two lines with its mean grey level."""
    picture, _ = question["messages"][0]["content"]
    content = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    grey = float(np.asarray(Image.open(io.BytesIO(content))).mean())
    return hashlib.sha256(content).hexdigest(), f" a grey\n of {grey:.0f} "
