"""Heartbeat: each rank keeps a connection to rank 0, by which all ranks notice and name a lost process."""

from __future__ import annotations

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
from discovla.engine.lifecycle.peers import Peer, Peers, wait_until

INTERVAL = 5.0  # seconds between heartbeats
GRACE = 5.0  # seconds the main thread has to end by itself once a process is lost
_CONNECT_SECONDS = 60.0  # for a process that has joined to connect
_ADDRESS_KEY = "discovla/heartbeat"  # port of rank 0 and the secret that connections open with
_BEAT, _LEAVE = b".", b"bye"  # lines besides "RANK REASON", by which rank 0 reports a lost rank


@dataclass(kw_only=True)
class _Connection:
    """Connection to another rank, an unfinished line from it, and when it last sent something."""

    rank: int
    socket: socket.socket
    buffer: bytes = b""
    last_heard: float = field(default_factory=time.monotonic)


class Heartbeat:
    """Notices a lost process of the run within moments and names it on every rank.

    A process that exits or is killed closes its connection; one that hangs or whose machine is gone sends no
    heartbeat for `timeout` seconds.  Rank 0 reports a lost rank to all others.  A collective may wait for the
    lost rank for half an hour, or forever on a GPU: unless the main thread calls `disarm` within `GRACE`
    seconds, a thread calls `on_lost` with one line, which has to end this process.

    Args:
        world: of this process, more than one process.
        peers: all processes, before their first collective.
        timeout: seconds without a heartbeat after which a process is lost, above `INTERVAL`.
        on_lost: prints the line and ends this process.

    Raises:
        TimeoutError: a process has joined but does not connect; names it.
    """

    def __init__(self, world: World, peers: Peers, *, timeout: float, on_lost: Callable[[str], None]) -> None:
        self.world, self.timeout, self._on_lost = world, timeout, on_lost
        self.members = peers.members
        self.lost: str | None = None
        self._lost_event, self._lock = threading.Event(), threading.Lock()
        self._disarmed = self._closed = False
        self._connections: dict[int, _Connection] = {}
        if world.first:
            self._accept_all(peers)
        else:
            self._connect(peers)
        _close_in_forked_children(self)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def wait_for_loss(self, seconds: float) -> str | None:
        """Wait until a process is lost and return the line that names it, or None after `seconds`."""
        self._lost_event.wait(seconds)
        return self.lost

    def disarm(self) -> None:
        """Keep the thread from ending this process: the main thread ends it with its own message."""
        with self._lock:
            self._disarmed = True

    def close(self) -> None:
        """Tell the others that this process ends as intended."""
        self.disarm()
        self._closed = True
        self._send_all(_LEAVE)
        self._thread.join(2 * INTERVAL)
        for connection in list(self._connections.values()):
            connection.socket.close()

    def _accept_all(self, peers: Peers) -> None:
        """Rank 0: publish a port and a secret, and accept the connections of all others."""
        several_hosts = len({peer.host for peer in peers.members}) > 1
        # on several hosts listen on every address: MASTER_ADDR may resolve to 127.0.1.1 on this one
        host = "" if several_hosts else _master_host()
        secret = secrets.token_hex(16)
        deadline = time.monotonic() + _CONNECT_SECONDS
        with socket.create_server((host, 0), backlog=1024) as listener:
            peers.store.set(_ADDRESS_KEY, f"{listener.getsockname()[1]} {secret}")
            while len(self._connections) < self.world.size - 1:
                try:
                    listener.settimeout(max(0.1, deadline - time.monotonic()))
                    accepted, _ = listener.accept()
                except TimeoutError:
                    absent = [peer for peer in self.members[1:] if peer.rank not in self._connections]
                    raise TimeoutError(_no_connection(absent)) from None
                greeting = _read_greeting(accepted)
                if len(greeting) != 2 or greeting[0] != secret.encode():
                    accepted.close()
                    continue
                accepted.setblocking(False)
                rank = int(greeting[1])
                self._connections[rank] = _Connection(rank=rank, socket=accepted)

    def _connect(self, peers: Peers) -> None:
        """Other ranks: connect to rank 0."""
        if not wait_until(lambda: peers.store.check([_ADDRESS_KEY]), _CONNECT_SECONDS):
            raise TimeoutError(_no_connection(peers.members[:1]))
        port, secret = peers.store.get(_ADDRESS_KEY).decode().split()
        host = _master_host()
        try:
            connection = socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS)
        except OSError as error:
            raise OSError(f"cannot reach rank 0 at {host}:{port}: {error.strerror or error}") from error
        connection.sendall(f"{secret} {self.world.rank}\n".encode())
        connection.setblocking(False)
        self._connections[0] = _Connection(rank=0, socket=connection)

    def _run(self) -> None:
        """Body of the thread: send and receive heartbeats; end this process once another is lost."""
        last_sent = 0.0
        while not self._closed and self.lost is None and self._connections:
            if time.monotonic() - last_sent >= INTERVAL:
                self._send_all(_BEAT)
                last_sent = time.monotonic()
            self._receive()
        if self.lost is None:
            return
        self._lost_event.set()
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if self._disarmed:
                return
        with self._lock:
            if not self._disarmed:
                self._on_lost(self.lost)

    def _receive(self) -> None:
        """Read what arrives within 0.2 seconds and check for overdue heartbeats."""
        with selectors.PollSelector() as selector:  # has no kernel object that forked children would share
            for connection in self._connections.values():
                selector.register(connection.socket, selectors.EVENT_READ, connection)
            ready = [key.data for key, _ in selector.select(0.2)]
        for connection in ready:
            if self.lost is None:
                self._read(connection)
        overdue = time.monotonic() - self.timeout
        for connection in list(self._connections.values()):
            if self.lost is None and connection.last_heard < overdue:
                self._report_lost(connection.rank, f"sent no heartbeat for {self.timeout:g} seconds")

    def _read(self, connection: _Connection) -> None:
        """Handle the lines of a connection; end of file means that its process has ended."""
        try:
            received = connection.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._report_lost(connection.rank, "has ended")
            return
        connection.last_heard = time.monotonic()
        *lines, connection.buffer = (connection.buffer + received).split(b"\n")
        for line in lines:
            if line == _LEAVE:
                self._connections.pop(connection.rank).socket.close()
                return
            if line != _BEAT and self.lost is None:
                rank, _, reason = line.decode().partition(" ")
                self._report_lost(int(rank), reason)

    def _report_lost(self, rank: int, reason: str) -> None:
        """Note a lost process; rank 0 also reports it to all others."""
        if self.world.first:
            self._send_all(f"{rank} {reason}".encode())
        self.lost = f"{self.members[rank]} {reason} before the run was over"

    def _send_all(self, line: bytes) -> None:
        """Send a line to all connected ranks; a broken connection is noticed when it is read."""
        for connection in list(self._connections.values()):
            with suppress(OSError):
                connection.socket.sendall(line + b"\n")


def _no_connection(absent: Sequence[Peer]) -> str:
    names = ", ".join(map(str, absent))
    return f"expected a heartbeat connection within {_CONNECT_SECONDS:g} s, found none of {names}"


def _read_greeting(connection: socket.socket) -> list[bytes]:
    """Return the words of the first line; none if it does not arrive within seconds."""
    connection.settimeout(INTERVAL)
    with suppress(OSError), connection.makefile("rb") as file:
        return file.readline(100).split()
    return []


def _master_host() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _close_in_forked_children(heartbeat: Heartbeat) -> None:
    """Close the connections in forked children, which would keep them open after this process has ended."""
    reference = weakref.ref(heartbeat)

    def close() -> None:
        parent = reference()
        if parent is not None:
            for connection in parent._connections.values():
                connection.socket.close()

    os.register_at_fork(after_in_child=close)
