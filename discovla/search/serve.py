"""The server of an index: the HTTP API, and a page that uses nothing else."""

from __future__ import annotations

import hashlib
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, PackageLoader

from discovla import __version__
from discovla.foreign import printable
from discovla.search.guard import Guard, Limits, TimedProtocol, check_token
from discovla.search.index import Index
from discovla.search.routes import Api, Problem
from discovla.search.uploads import MAX_BYTES

MAX_BODY = MAX_BYTES + (64 << 10)  # bytes of a request: a picture and the other fields of its form
MAX_CONNECTIONS = 512
STOP_SECONDS = 3  # for responses that are being sent when the server stops
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
DOCS = "docs.html"  # a template
PAGE_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}


def create_app(
    index: Index, *, token: str | None = None, hosts: Sequence[str] = (), limits: Limits | None = None
) -> Guard:
    """Return the ASGI application that serves an index.

    Args:
        index: opened; it stays open when the application ends.
        token: secret without which only the empty page is served; None for none.
        hosts: names that requests may use for this server; empty for any.
        limits: of requests at the same time.
    """
    api = Api(index, token)
    app = FastAPI(
        title="discovla",
        version=__version__,
        description="Search in videos. Moments are named by numbers; no request names a path.",
        docs_url=None,
        redoc_url=None,
        lifespan=api.lifespan,
        max_body_size=MAX_BODY,
        responses={422: {"model": Problem}, "4XX": {"model": Problem}},
    )
    app.exception_handler(RequestValidationError)(_invalid_request)
    app.state.feed = api.feed
    api.add_routes(app)
    _add_page(app)
    _add_docs(app)
    return Guard(app, token=token, hosts=hosts, limits=limits or Limits())


def serve(index: Index, *, host: str = "127.0.0.1", port: int = 8000, token: str | None = None) -> None:
    """Serve an index until SIGINT or SIGTERM.

    Args:
        index: opened.
        host: address to listen on; others than loopback ones need a token.
        port: 0 for a free one; the address that is printed names it.
        token: secret that requests must name, at least 16 characters.

    Raises:
        ValueError: an address that others reach without a token, a token that is too short, or an address
            that cannot be listened on.
    """
    check_token(token, host)
    server = Server(index, host, token=token)
    with listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        print(f"serving at http://{shown}:{listener.getsockname()[1]} (Ctrl-C stops)", flush=True)
        with _graceful_stop(), suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn with the application of an index.

    Without a token it answers to the names of this machine only, and to `host`.
    """

    def __init__(
        self, index: Index, host: str, *, token: str | None = None, limits: Limits | None = None
    ) -> None:
        hosts = () if token is not None else (*LOCAL_NAMES, host.strip("[]"))
        self.app = create_app(index, token=token, hosts=hosts, limits=limits)
        config = uvicorn.Config(
            self.app,
            http=TimedProtocol,
            ws="none",
            lifespan="on",
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the event streams, which would else be waited for, then the server."""
        assert isinstance(self.app.app, FastAPI)
        self.app.app.state.feed.close()
        await super().shutdown(sockets)


@contextmanager
def _graceful_stop() -> Iterator[None]:
    """Leave it to the server to stop at SIGTERM: it raises the signal again once it has stopped."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise ValueError(f"serve: {host}:{port}: cannot listen there: {reason}") from None


def _add_page(app: FastAPI) -> None:
    """Serve the page's own files, which are read once: no request reaches the file system."""
    folder = files("discovla.search") / "page"
    contents = {
        file.name: (file.read_bytes(), PAGE_TYPES[suffix])
        for file in folder.iterdir()
        if file.name != DOCS and (suffix := file.name[file.name.rfind(".") :]) in PAGE_TYPES
    }
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:16]}"' for name, (content, _) in contents.items()}

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str, request: Request) -> Response:
        if name not in contents:
            raise HTTPException(404, "no such file of the page")
        headers = {"Cache-Control": "no-cache", "ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        content, kind = contents[name]
        return Response(content, media_type=kind, headers=headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await page_file("index.html", request)


def _add_docs(app: FastAPI) -> None:
    """Serve a readable form of the OpenAPI schema that needs no files from elsewhere."""
    environment = Environment(loader=PackageLoader("discovla.search", "page"), autoescape=True)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(environment.get_template(DOCS).render(schema=app.openapi()))


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    """Say on one line what is wrong with the first wrong field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or "request"
    reason = str(first["msg"]).removeprefix("Value error, ")
    value = "" if isinstance(first.get("input"), dict) else f", found {first.get('input')!r}"
    return JSONResponse({"detail": printable(f"{place}: {reason}{value}"[:300])}, 422)
