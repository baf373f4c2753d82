"""A server as a process of its own: how it stops, and thousands of requests, half of them hostile."""

import http.client
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from tests.search.serve.fake import jpeg, picture

ROOT = Path(__file__).parents[3]
REQUESTS = 10_000
CLIENTS = 8
GROWTH = 8 << 20  # bytes of memory that a server may gain over them: allocators keep some


@pytest.fixture
def server(tmp_path):
    """A process that serves; its port."""
    code = [sys.executable, "-m", "tests.search.serve.server", str(tmp_path)]
    with subprocess.Popen(
        code, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert match, line + process.stderr.read()
        yield process, int(match[1])
        process.kill()


def multipart(content):
    """Return headers and body of an upload."""
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    body = head + content + b"\r\n--b--\r\n"
    return {"Content-Type": "multipart/form-data; boundary=b"}, body


def mixture():
    """Return requests (method, path, headers, body) and the statuses that are right for each."""
    upload, broken = multipart(jpeg(picture("blue", 0.5))), multipart(b"\xff\xd8\xff" + bytes(999))
    where = quote("1=1; DROP TABLE moments; --")
    return [
        ("GET", "/api/search?q=a+red+disc", {}, None, {200}),
        ("GET", "/api/search?like=3&k=5", {}, None, {200}),
        ("GET", "/api/moments/2/thumbnail", {}, None, {200}),
        ("GET", "/api/moments/2/frames?q=red", {}, None, {200}),
        ("GET", "/api/media/4", {"Range": "bytes=0-999"}, None, {206}),
        ("HEAD", "/api/media/4", {}, None, {200}),
        ("GET", "/api/videos", {}, None, {200}),
        ("GET", "/api/status", {}, None, {200}),
        ("POST", "/api/search", *upload, {200}),
        ("POST", "/api/search", *broken, {400}),
        ("GET", f"/api/search?q=red&where={where}", {}, None, {400}),
        ("GET", "/api/media/..%2f..%2f..%2fetc%2fpasswd", {}, None, {404, 422}),
        ("GET", "/api/media/99999", {}, None, {404}),
        ("GET", "/api/media/4", {"Range": "bytes=99999999-"}, None, {416}),
        ("GET", f"/api/search?q={'x' * 600}", {}, None, {422}),
        ("GET", "/api/search?q=red&k=1000000", {}, None, {422}),
        ("GET", "/api/status", {"Host": "evil.example"}, None, {421}),
        ("POST", "/api/search", {"Origin": "http://evil.example"}, b"", {403}),
        ("GET", f"/{'a' * 3000}", {}, None, {404}),
        ("DELETE", "/api/videos", {}, None, {405}),
    ]


def send(port, requests, faults):
    """Send requests on one connection, which is opened again when the server closes it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for method, path, headers, body, expected in requests:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        if response.status not in expected or b"root:" in content:
            faults.append((method, path[:80], response.status))
    connection.close()


def send_from_all_clients(port, count):
    faults, kinds = [], mixture()
    shares = [[kinds[i % len(kinds)] for i in range(c, count, CLIENTS)] for c in range(CLIENTS)]
    threads = [threading.Thread(target=send, args=(port, share, faults)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_flat_and_leak_nothing(server):
    process, port = server
    memory = psutil.Process(process.pid)
    faults = send_from_all_clients(port, REQUESTS // 5)
    before, files, threads = memory.memory_info().rss, memory.num_fds(), memory.num_threads()
    faults += send_from_all_clients(port, REQUESTS - REQUESTS // 5)
    assert not faults, faults[:10]
    assert memory.memory_info().rss - before < GROWTH
    assert memory.num_fds() <= files + CLIENTS
    assert memory.num_threads() <= threads + 2
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_though_a_page_listens(server, number):
    process, port = server
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/api/status", headers={"Accept": "text/event-stream"})
    assert connection.getresponse().readline().startswith(b"data: ")
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.stderr.read() == ""
