"""Which of a run's processes is gone: each keeps a connection to the first, which closes with its end."""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from discovla.engine.distributed import World
from discovla.engine.lifecycle.peers import Peer, Peers, until

logger = logging.getLogger(__name__)

BEAT = 5.0  # seconds between signs of life
SETTLE = 5.0  # seconds the main thread has to end by itself once a process is gone
_JOIN = 60.0  # seconds for a process that has come to connect
_KEY = "discovla/watch"  # of where the first process listens


@dataclass(kw_only=True)
class _Peer:
    """The other end of a connection, what it has sent of a line, and when it was last heard."""

    rank: int
    connection: socket.socket
    part: bytes = b""
    heard: float = field(default_factory=time.monotonic)


class Heartbeat:
    """Notices within moments that a process of the run has ended, and names it on every rank.

    A process that is killed or crashes closes its connection; one whose machine is lost sends no sign of life
    for `silence` seconds.  The first process tells all others.  A collective may wait for the lost rank for
    half an hour or, on a GPU, forever: where the main thread has not said `let_go` within `SETTLE` seconds,
    `end` is called, in another thread, with one line, and is to end the process.

    Args:
        world: of this process, of more than one.
        met: all processes, before they have waited for each other in anything else.
        silence: seconds without a sign of life, above `BEAT`.
        end: ends this process, having said the line.

    Raises:
        TimeoutError: another process has come, but does not connect; says which.
    """

    def __init__(self, world: World, met: Peers, *, silence: float, end: Callable[[str], None]) -> None:
        self.world, self.silence, self._end = world, silence, end
        self.everyone = met.everyone
        self.lost: str | None = None
        self._known, self._lock = threading.Event(), threading.Lock()
        self._let_go = self._closed = False
        self._peers: dict[int, _Peer] = {}
        self._connect(met)
        _close_in_children(self)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def line(self, wait: float) -> str | None:
        """Who is gone, once it is known; None where nobody is within `wait` seconds."""
        self._known.wait(wait)
        return self.lost

    def let_go(self) -> None:
        """The main thread ends by itself, with a message of its own."""
        with self._lock:
            self._let_go = True

    def close(self) -> None:
        """Tell the others that this process ends as it should."""
        self.let_go()
        self._closed = True
        self._send_all(b"bye\n")
        self._thread.join(2 * BEAT)
        for peer in list(self._peers.values()):
            peer.connection.close()

    def _connect(self, met: Peers) -> None:
        """The first process listens, and everyone else connects to it."""
        if self.world.first:
            with _listen(len({one.host for one in met.everyone}) > 1) as listener:
                word = secrets.token_hex(16)
                met.store.set(_KEY, f"{listener.getsockname()[1]} {word}")
                self._accept(listener, word)
            return
        if not until(lambda: met.store.check([_KEY]), _JOIN):
            raise TimeoutError(_silent(met.everyone[:1]))
        port, word = met.store.get(_KEY).decode().split()
        self._join(int(port), word)

    def _join(self, port: int, word: str) -> None:
        """Connect to the first process."""
        host = _first_host()
        try:
            connection = socket.create_connection((host, port), timeout=_JOIN)
        except OSError as error:
            raise OSError(f"cannot reach rank 0 at {host}:{port}: {error.strerror or error}") from error
        connection.sendall(f"{word} {self.world.rank}\n".encode())
        connection.setblocking(False)
        self._peers[0] = _Peer(rank=0, connection=connection)

    def _accept(self, listener: socket.socket, word: str) -> None:
        """Take the connections of all others; a stranger's is closed."""
        deadline = time.monotonic() + _JOIN
        while len(self._peers) < self.world.size - 1:
            try:
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                connection, _ = listener.accept()
            except TimeoutError:
                others = [one for one in self.everyone[1:] if one.rank not in self._peers]
                raise TimeoutError(_silent(others)) from None
            said = _first_line(connection)
            if len(said) != 2 or said[0] != word.encode():
                connection.close()
                continue
            connection.setblocking(False)
            self._peers[int(said[1])] = _Peer(rank=int(said[1]), connection=connection)

    def _run(self) -> None:
        """The thread: listen, give signs of life, and act where somebody is gone."""
        last = 0.0
        while not self._closed and self.lost is None and self._peers:
            if time.monotonic() - last >= BEAT:
                self._send_all(b".\n")
                last = time.monotonic()
            self._listen_once()
        if self.lost is None:
            return
        self._known.set()
        deadline = time.monotonic() + SETTLE
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if self._let_go:
                return
        with self._lock:
            if not self._let_go:
                self._end(self.lost)

    def _listen_once(self) -> None:
        """Whatever comes within a moment, and who has not been heard for too long."""
        with selectors.PollSelector() as selector:  # one without an object in the system that a fork shares
            for peer in self._peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            ready = [key.data for key, _ in selector.select(0.2)]
        for peer in ready:
            if self.lost is None:
                self._hear(peer)
        silent = time.monotonic() - self.silence
        for peer in list(self._peers.values()):
            if self.lost is None and peer.heard < silent:
                self._gone(peer.rank, f"gave no sign of life for {self.silence:g} seconds")

    def _hear(self, peer: _Peer) -> None:
        """Read what a peer sent; nothing at all means that its process has ended."""
        try:
            received = peer.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._gone(peer.rank, "has ended")
            return
        peer.heard = time.monotonic()
        *lines, peer.part = (peer.part + received).split(b"\n")
        for line in lines:
            if line == b"bye":
                self._peers.pop(peer.rank).connection.close()
                return
            if line != b"." and self.lost is None:
                rank, _, how = line.decode().partition(" ")
                self._gone(int(rank), how)

    def _gone(self, rank: int, how: str) -> None:
        """A process is gone: the first one tells everybody."""
        if self.world.first:
            self._send_all(f"{rank} {how}\n".encode())
        self.lost = f"{self.everyone[rank]} {how} before the run was over"

    def _send_all(self, words: bytes) -> None:
        """To all who are connected; who is gone is noticed in reading."""
        for peer in list(self._peers.values()):
            with suppress(OSError):
                peer.connection.sendall(words)


def _silent(processes: Sequence[Peer]) -> str:
    """That these have come and then do no more."""
    return f"expected a connection within {_JOIN:g} s, found none of {', '.join(map(str, processes))}"


def _first_line(connection: socket.socket) -> list[bytes]:
    """The words of the first line that comes; none where none comes within seconds."""
    connection.settimeout(BEAT)
    with suppress(OSError), connection.makefile("rb") as file:
        return file.readline(100).split()
    return []


def _first_host() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _listen(far: bool) -> socket.socket:
    """A free port, at all addresses of this machine where others connect to it.

    The name by which they know it may mean 127.0.1.1 here.
    """
    return socket.create_server(("" if far else _first_host(), 0), backlog=1024)


def _close_in_children(watch: Heartbeat) -> None:
    """Processes forked to read data would keep the connection open when this one is gone."""
    known = weakref.ref(watch)

    def forget() -> None:
        parent = known()
        if parent is not None:
            for peer in parent._peers.values():
                peer.connection.close()

    os.register_at_fork(after_in_child=forget)
