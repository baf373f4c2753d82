"""A local stand-in for Hugging Face's hub: repositories in memory, created, written and read over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 39 + "1"
Repositories = dict[str, dict[str, bytes]]  # USER/NAME -> file -> content


class Handler(BaseHTTPRequestHandler):
    repositories: Repositories

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        url = f"http://{self.headers['host']}"
        if self.path == "/api/repos/create":
            values = json.loads(body)
            name = (
                f"{values['organization']}/{values['name']}" if "organization" in values else values["name"]
            )
            self.repositories.setdefault(name, {})
            self.answer(200, json.dumps({"url": f"{url}/{name}"}).encode())
            return
        if self.path == "/api/validate-yaml":
            self.answer(200, b'{"errors": [], "warnings": []}')
            return
        _, _, _, user, name, action, *_ = self.path.split("/")
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, json.dumps({"files": files}).encode())
        elif action == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.repositories[f"{user}/{name}"][entry["value"]["path"]] = content
            commit = {"commitUrl": f"{url}/{user}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            self.answer(200, json.dumps(commit).encode())
        else:
            self.answer(200)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            self.answer(200, json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []}).encode())
            return
        content = self.repositories.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if content is None:
            self.answer(404, x_error_code="EntryNotFound")
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(200, content, etag=etag, x_repo_commit=COMMIT)

    do_HEAD = do_GET


@contextmanager
def serve_hub() -> Iterator[tuple[str, Repositories]]:
    """Serve an empty hub; yield its address and its repositories."""
    handler = type("Hub", (Handler,), {"repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.repositories
    finally:
        server.shutdown()
        server.server_close()
