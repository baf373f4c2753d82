"""Video files over HTTP: ranges, and no file that is not in the index."""

import pytest


@pytest.fixture(scope="module")
def content(index):
    return index.files[1].read_bytes()


RANGES = {  # header -> status, first byte, byte after the last
    "bytes=0-99": (206, 0, 100),
    "bytes=100-": (206, 100, None),
    "bytes=-64": (206, -64, None),
    "bytes=7-7": (206, 7, 8),
    "bytes=10-99999999": (206, 10, None),
    "bytes=-99999999": (206, 0, None),
    "": (200, 0, None),
}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("asked", RANGES, ids=lambda asked: asked or "whole")
def test_media_answers_ranges(client, content, asked, method):
    status, first, after = RANGES[asked]
    response = client.request(method, "/api/media/3", headers={"Range": asked} if asked else {})
    expected = content[first:after]
    assert response.status_code == status
    assert response.headers["content-length"] == str(len(expected))
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-type"] == "video/mp4"
    assert response.content == (expected if method == "GET" else b"")
    if status == 206:
        begin = first % len(content) if first > -len(content) else 0
        assert response.headers["content-range"].startswith(f"bytes {begin}-")


def test_media_answers_several_ranges(client, content):
    response = client.get("/api/media/3", headers={"Range": "bytes=0-9,20-29"})
    assert response.status_code == 206
    assert content[:10] in response.content and content[20:30] in response.content


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=99999999-999999999"])
def test_a_range_behind_the_end_is_416(client, content, asked):
    response = client.get("/api/media/3", headers={"Range": asked})
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{len(content)}"


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=x-y", "lines=1-2", "bytes", "bytes=" + "0-1," * 500])
def test_a_malformed_range_sends_no_part(client, asked):
    assert client.get("/api/media/3", headers={"Range": asked}).status_code in (200, 400)


def test_a_media_file_that_is_gone_is_not_found(index, client, monkeypatch, tmp_path):
    monkeypatch.setattr(index, "files", [tmp_path / "gone.mp4", tmp_path, *index.files[2:]])
    assert client.get("/api/media/0").status_code == 404
    assert client.get("/api/media/3").status_code == 404  # a folder


def test_a_file_of_an_unknown_kind_is_sent_as_bytes(index, client, monkeypatch, tmp_path):
    page = tmp_path / "clip.html"
    page.write_text("<script>alert(1)</script>")
    monkeypatch.setattr(index, "files", [page, *index.files[1:]])
    response = client.get("/api/media/0")
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["x-content-type-options"] == "nosniff"


TRAVERSALS = [
    "/api/media/../../etc/passwd",
    "/api/media/..%2f..%2fetc%2fpasswd",
    "/api/media/%2e%2e/%2e%2e/etc/passwd",
    "/api/media//etc/passwd",
    "/api/media/1/../../../etc/passwd",
    "/api/media/1%00.mp4",
    "/api/media/-1",
    "/api/media/1e3",
    "/api/media/0x1",
    "/api/media/99999999999999999999999",
    "/api/media/\N{ARABIC-INDIC DIGIT ONE}x",
    "/api/moments/../thumbnail",
    "/api/moments/%2e%2e%2f1/thumbnail",
    "/page/../serve.py",
    "/page/..%2fserve.py",
    "/page/%2fetc%2fpasswd",
    "/page/docs.html",
    "/page/",
    "//etc/passwd",
    "/etc/passwd",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_leads_out_of_the_index(client, path):
    response = client.get(path)
    assert response.status_code in (404, 405, 422), response.status_code
    assert "root:" not in response.text and "import" not in response.text
