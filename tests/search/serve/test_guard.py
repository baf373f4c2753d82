"""Token, hosts, other sites, limits and headers of the server."""

import threading

import pytest
from fastapi.testclient import TestClient

from discovla.search import guard
from discovla.search.guard import Limits, check_token, is_loopback
from discovla.search.serve import create_app

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def guarded(index):
    """A client of a server with a token, which keeps no cookies between tests."""
    with TestClient(create_app(index, token=TOKEN), base_url="http://example.org") as client:
        yield client


def test_every_response_has_the_security_headers(client):
    for path in ("/", "/page/app.js", "/docs", "/api/status", "/api/media/0", "/api/media/999", "/none"):
        headers = client.get(path).headers
        for name, value in guard.SECURITY_HEADERS.items():
            assert headers[name] == value, path
        assert "access-control-allow-origin" not in headers
        assert "unsafe" not in headers["content-security-policy"]


def test_a_bug_keeps_the_security_headers_and_its_text(index, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("secret words")

    monkeypatch.setattr(index, "search", fail)
    with TestClient(create_app(index), raise_server_exceptions=False) as client:
        response = client.get("/api/search", params={"q": "red"})
    assert response.status_code == 500 and response.headers["x-frame-options"] == "DENY"
    assert "secret" not in response.text


def test_other_names_for_the_server_are_refused(client):
    response = client.get("/api/status", headers={"Host": "evil.example:8000"})
    assert response.status_code == 421 and "localhost" in response.json()["detail"]
    assert client.get("/api/status", headers={"Host": "127.0.0.1:8000"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}],
    ids=["origin", "no origin", "fetch metadata"],
)
def test_pages_of_other_sites_are_refused(client, headers):
    assert client.post("/api/search", data={"q": "red"}, headers=headers).status_code == 403
    assert client.get("/api/media/0", headers=headers).status_code == 403
    assert (
        client.options(
            "/api/search", headers={**headers, "Access-Control-Request-Method": "POST"}
        ).status_code
        == 403
    )


def test_the_page_itself_may_post(client):
    headers = {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/search", data={"q": "red"}, headers=headers).status_code == 200


CLOSED = (
    "/api/status",
    "/api/search?q=red",
    "/api/media/0",
    "/api/moments/0/thumbnail",
    "/docs",
    "/openapi.json",
)


@pytest.mark.parametrize("path", CLOSED)
def test_without_the_token_nothing_of_the_index_is_served(guarded, path):
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": TOKEN},
        {"Cookie": f"discovla={TOKEN}"},
    ):
        response = guarded.get(path, headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert guarded.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_the_empty_page_is_served_without_the_token(guarded):
    assert guarded.get("/").status_code == guarded.get("/page/app.js").status_code == 200
    assert guarded.get("/page/../api/status").status_code == 401
    assert guarded.get("//api/status").status_code == 401


def test_the_token_is_traded_for_a_cookie(index):
    with TestClient(create_app(index, token=TOKEN), base_url="http://example.org") as client:
        assert client.post("/api/session", json={"token": "wrong"}).status_code == 401
        assert (
            client.post("/api/session", json={"token": "wr\ud800ng"}.__class__(token="é")).status_code == 401
        )
        response = client.post("/api/session", json={"token": TOKEN})
        assert response.status_code == 204
        cookie = response.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
        assert client.get("/api/status").status_code == 200


def test_a_request_without_the_token_is_refused_before_its_body_is_read(guarded):
    def body():
        yield b"x"
        raise AssertionError("the body was read")

    response = guarded.post("/api/search", content=body(), headers={"Content-Length": "1000000"})
    assert response.status_code == 401


def test_searches_above_the_limit_are_answered_with_503(index, monkeypatch):
    monkeypatch.setattr(index, "delay", 1.0)
    index.searching.clear()
    with TestClient(create_app(index, limits=Limits(search=1))) as client:
        thread = threading.Thread(target=client.get, args=("/api/search?q=red",))
        thread.start()
        assert index.searching.wait(10)
        response = client.get("/api/search", params={"q": "red"})
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        assert client.get("/api/status").status_code == 200
        thread.join()
        monkeypatch.setattr(index, "delay", 0.0)
        assert client.get("/api/search", params={"q": "red"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "local"),
    {
        "127.0.0.1": True,
        "127.8.8.8": True,
        "::1": True,
        "localhost": True,
        "0.0.0.0": False,
        "::": False,
    }.items(),
)
def test_loopback_addresses_are_known(host, local):
    assert is_loopback(host) is local


def test_an_open_address_needs_a_long_token():
    check_token(None, "127.0.0.1")
    check_token(TOKEN, "0.0.0.0")
    for token, host in ((None, "0.0.0.0"), (None, "example.org"), ("short", "0.0.0.0"), ("é" * 20, "::1")):
        with pytest.raises(ValueError, match="--token: expected"):
            check_token(token, host)
