"""Protection of the server: token, hosts, limits, deadlines and security headers, before any route runs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

COOKIE = "discovla"
MIN_TOKEN = 16  # characters: 16 random hexadecimal digits are 64 bits
HEADER_SECONDS = 10.0  # for the request line and the headers
BODY_SECONDS = 30.0  # for the whole body of a request
SEND_SECONDS = 60.0  # without reading; a player that is paused longer asks for the rest again
OPEN_PATHS = ("/", "/api/session")  # served without the token: they hold nothing of the index
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Requests that are served at the same time; a request above its limit gets status 503.

    search: searches and frame scores, running or waiting.
    media: videos that are sent. A paused player may hold one.
    events: streams of the progress of indexing.
    other: everything else.
    """

    search: int = 64
    media: int = 64
    events: int = 32
    other: int = 256


class Guard:
    """ASGI middleware that refuses a request before its body is read, and bounds how long it may take.

    Args:
        token: secret that a request names in `Authorization: Bearer` or in the cookie; None for none.
        hosts: names that `Host` may have; empty for any. Without a token it keeps pages of other sites, whose
            names resolve to this machine (DNS rebinding), from reading the index.
        limits: of requests at the same time.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Sequence[str], limits: Limits) -> None:
        self.app, self.token, self.hosts, self.limits = app, token, frozenset(hosts), limits
        self.running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, exchange.send)
            return
        kind = _kind(scope["path"], Headers(scope=scope))
        if self.running[kind] >= getattr(self.limits, kind):
            full = f"{kind}: expected at most {getattr(self.limits, kind)} requests at the same time"
            headers = {"Retry-After": "1", "Connection": "close"}
            await JSONResponse({"detail": full}, 503, headers)(scope, receive, exchange.send)
            return
        self.running[kind] += 1
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self.running[kind] -= 1

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        """Return the response to a request that may not pass."""
        close = {"Connection": "close"}  # the body is not read
        host = headers.get("host", "")
        if self.hosts and _hostname(host) not in self.hosts:
            expected = ", ".join(sorted(self.hosts))
            return JSONResponse({"detail": f"Host: expected one of {expected}, found {host!r}"}, 421, close)
        if path.startswith("/api/") and _is_cross_site(headers, host):
            detail = "expected a request of this page or program, found one of another site's page"
            return JSONResponse({"detail": detail}, 403, close)
        if path in OPEN_PATHS or path.startswith("/page/") or self._knows_token(headers):
            return None
        bearer = {"WWW-Authenticate": "Bearer", **close}
        return JSONResponse({"detail": "expected the token that `discovla serve` was given"}, 401, bearer)

    def _knows_token(self, headers: Headers) -> bool:
        if self.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return same_secret(given.strip(), self.token)
        return same_secret(_cookie(headers), session_cookie(self.token))


class _Exchange:
    """Request and response of one exchange: the deadline of the body, and the security headers.

    A body that takes longer than `BODY_SECONDS` ends as if the client had left, and the status is 408.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._deadline = time.monotonic() + BODY_SECONDS
        self._body = True  # some of it is still to come
        self._late = False

    async def receive(self) -> Message:
        if not self._body:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            self._late, self._body = True, False
            return {"type": "http.disconnect"}
        self._body = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Cache-Control", "no-store")
            if self._late:
                message["status"] = 408
                headers["Connection"] = "close"
        await self._send(message)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 of uvicorn that cuts off slow clients.

    A connection ends if the headers of a request take longer than `HEADER_SECONDS`, or if nothing of a
    response is read for `SEND_SECONDS`.
    """

    _waiting: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting = self._abort_after(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._waiting = _cancel(self._waiting)
        elif self._waiting is None:
            self._waiting = self._abort_after(HEADER_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._sending = _cancel(self._sending) or self._abort_after(SEND_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sending = _cancel(self._sending)

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting, self._sending = _cancel(self._waiting), _cancel(self._sending)
        super().connection_lost(exc)

    def _abort_after(self, seconds: float) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def session_cookie(token: str) -> str:
    """Return the value of the cookie: derived from the token, which other servers of this host never see."""
    return hmac.new(token.encode(), b"discovla session", hashlib.sha256).hexdigest()


def same_secret(given: str, secret: str) -> bool:
    """Compare in a time that does not depend on where the two differ."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), secret.encode())


def check_token(token: str | None, host: str) -> None:
    """Refuse an address that others reach without a token, and a token that can be guessed.

    Raises:
        ValueError: either.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"serve: --token: expected one with --host {host}, which others can reach")
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable()):
        raise ValueError(f"serve: --token: expected at least {MIN_TOKEN} ASCII characters")


def is_loopback(host: str) -> bool:
    """Return True if only programs of this machine reach the address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _kind(path: str, headers: Headers) -> str:
    """Return the limit that a request counts against."""
    if path == "/api/search" or path.endswith("/frames"):
        return "search"
    if path.startswith("/api/media/"):
        return "media"
    return "events" if "text/event-stream" in headers.get("accept", "") else "other"


def _is_cross_site(headers: Headers, host: str) -> bool:
    """Return True if a browser sends the request for a page of another site."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return True
    return headers.get("sec-fetch-site") == "cross-site"


def _hostname(host: str) -> str:
    """Return the name of "name:port", "1.2.3.4:port" or "[::1]:port"."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(headers: Headers) -> str:
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""
