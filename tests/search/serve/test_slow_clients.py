"""Clients that send or read slowly, on a real socket."""

import socket
import threading
import time
from contextlib import suppress

import pytest

from discovla.search import guard
from discovla.search.guard import Limits
from discovla.search.serve import Server, listen

LIMIT = 0.4  # seconds for headers, body and reading, in these tests


@pytest.fixture(scope="module")
def address(index):
    """Serve in a thread, with short limits."""
    patch = pytest.MonkeyPatch()
    for name in ("HEADER_SECONDS", "BODY_SECONDS", "SEND_SECONDS"):
        patch.setattr(guard, name, LIMIT)
    server = Server(index, "127.0.0.1", limits=Limits(media=2))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join()
    patch.undo()


def closed_after(connection, drip=b"", every=0.1):
    """Return the seconds until the server closes, while bytes are sent one by one, and what it sent."""
    began, received = time.monotonic(), b""
    connection.settimeout(every)
    while time.monotonic() - began < 20 * LIMIT:
        with suppress(TimeoutError, BrokenPipeError):
            if drip:
                connection.sendall(drip)
            part = connection.recv(65536)
            if not part:
                break
            received += part
            continue
        time.sleep(0.01)
    return time.monotonic() - began, received


def finish(connection, drip=b""):
    try:
        return closed_after(connection, drip)
    except ConnectionResetError:
        return 0.0, b""


@pytest.mark.parametrize(
    "first", [b"", b"GET /api/status HTTP/1.1\r\nHost: localhost\r\n"], ids=["none", "some"]
)
@pytest.mark.parametrize("drip", [b"", b"X"], ids=["silent", "drip"])
def test_headers_that_do_not_end_close_the_connection(address, first, drip):
    with socket.create_connection(address) as connection:
        connection.sendall(first)
        seconds, _ = finish(connection, drip)
    assert seconds < 5 * LIMIT


def test_a_second_request_on_a_connection_has_the_limit_too(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /page/icon.svg HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        connection.sendall(b"GET /")
        seconds, _ = finish(connection, b"x")
    assert seconds < 5 * LIMIT


def test_a_body_that_does_not_end_is_answered_with_408(address):
    head = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(head)
        seconds, received = finish(connection, b"x")
    assert seconds < 5 * LIMIT
    assert b" 408 " in received.split(b"\r\n")[0]


def test_clients_that_read_nothing_are_cut_off_and_leave_room(address, index, monkeypatch, tmp_path):
    big = tmp_path / "big.mp4"
    with big.open("wb") as file:
        file.truncate(64 << 20)
    monkeypatch.setattr(index, "files", [big, *index.files[1:]])
    request = b"GET /api/media/0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    stuck = [socket.create_connection(address) for _ in range(2)]
    for connection in stuck:
        connection.sendall(request)
    time.sleep(LIMIT / 4)
    statuses = []
    for _ in range(50):
        with socket.create_connection(address) as connection:
            connection.sendall(request)
            statuses.append(connection.recv(100).split(b"\r\n")[0])
        if b"200" in statuses[-1]:
            break
        time.sleep(0.1)
    for connection in stuck:
        connection.close()
    assert b"503" in statuses[0] and b"200" in statuses[-1]
