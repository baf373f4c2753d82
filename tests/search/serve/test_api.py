"""The HTTP API on a stand-in for an index, by requests in this process."""

import io
import json
import re
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from discovla.search import serve
from discovla.search.records import IndexProgress
from discovla.search.serve import create_app
from tests.search.serve.fake import COLOURS, jpeg


def hits(response):
    assert response.status_code == 200, response.text
    return [Path(hit["video"]).stem.split()[0] for hit in response.json()["hits"]]


def test_a_text_finds_the_video_that_it_names(client):
    response = client.get("/api/search", params={"q": "a blue disc", "k": 3})
    assert hits(response) == ["blue"] * 3
    first = response.json()["hits"][0]
    assert (first["start"], first["end"], first["columns"]) == (0, 4, {"year": 2022})
    assert response.json()["probability_best"] == 0.9


def test_an_improbable_answer_has_a_note(client):
    assert "probably not" in client.get("/api/search", params={"q": "a horse"}).json()["note"]


def test_an_uploaded_image_finds_its_colour(client):
    pixels = np.full((40, 60, 3), COLOURS["green"], np.uint8)
    response = client.post("/api/search", files={"image": ("green.jpg", jpeg(pixels))}, data={"k": 1})
    assert hits(response) == ["green"]


def test_a_clip_finds_its_own_video(client):
    assert hits(client.get("/api/search", params={"clip": 4, "start": 1, "end": 3.5, "k": 1})) == ["green"]


def test_like_finds_moments_of_the_same_video_without_the_moment(client):
    response = client.get("/api/search", params={"like": 3, "k": 2})
    assert hits(response) == ["green", "green"]
    assert [hit["moment_id"] for hit in response.json()["hits"]] == [4, 5]


def test_a_condition_leaves_videos_out(client):
    assert set(hits(client.get("/api/search", params={"q": "red", "where": "year > 2021"}))) == {
        "blue",
        "amber",
    }


WRONG = {
    "no query": ({}, 422, "expected one of q, like, clip, found none"),
    "two queries": ({"q": "red", "like": 1}, 422, "found q and like"),
    "an empty text": ({"q": ""}, 422, "q: "),
    "a long text": ({"q": "x" * 501}, 422, "at most 500 characters"),
    "k of 0": ({"q": "red", "k": 0}, 422, "k: "),
    "k of 201": ({"q": "red", "k": 201}, 422, "less than or equal to 200"),
    "k no number": ({"q": "red", "k": "many"}, 422, "k: "),
    "a long condition": ({"q": "red", "where": "x" * 1001}, 422, "where: "),
    "an unknown column": ({"q": "red", "where": "secret = 1"}, 400, "where: expected year > N"),
    "SQL": ({"q": "red", "where": "1 = 1; DROP TABLE moments"}, 400, "where: "),
    "a clip without a span": ({"clip": 1}, 422, "expected a clip with"),
    "a clip backwards": ({"clip": 1, "start": 3, "end": 1}, 422, "expected a clip with"),
    "a clip of an hour": ({"clip": 1, "start": 0, "end": 3600}, 422, "<= 300 seconds"),
    "a clip that is not finite": ({"clip": 1, "start": "nan", "end": "inf"}, 422, "start: "),
    "a span without a clip": ({"q": "red", "start": 1, "end": 2}, 422, "expected start and end with clip"),
    "a moment that is none": ({"clip": 999, "start": 0, "end": 1}, 404, "moment 999: not in the index"),
    "a negative moment": ({"like": -1}, 422, "like: "),
    "a path for a moment": ({"like": "../../etc/passwd"}, 422, "like: "),
    "a huge moment": ({"like": "9" * 30}, 422, "like: "),
    "a path for a clip": ({"clip": "/etc/passwd", "start": 0, "end": 1}, 422, "clip: "),
}


@pytest.mark.parametrize(("fields", "status", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_search_is_answered_with_one_line(client, fields, status, words):
    response = client.get("/api/search", params=fields)
    assert response.status_code == status
    detail = response.json()["detail"]
    assert words in detail and "\n" not in detail and len(detail) < 320


def test_a_moment_that_is_none_is_not_found_by_like(client):
    assert client.get("/api/search", params={"like": 999}).status_code == 404


def test_frames_are_compared_with_the_query(client):
    scores = client.get("/api/moments/4/frames", params={"q": "green"}).json()
    assert len(scores) == 12 and max(scores, key=lambda frame: frame["score"])["time"] == 6
    files = {"image": ("green.jpg", jpeg(np.full((9, 9, 3), COLOURS["green"], np.uint8)))}
    assert len(client.post("/api/moments/4/frames", files=files).json()) == 12
    assert client.get("/api/moments/99/frames", params={"q": "green"}).status_code == 404


def test_a_thumbnail_is_a_jpeg(client):
    response = client.get("/api/moments/0/thumbnail")
    assert response.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(response.content)).size == (320, 180)


def test_videos_are_listed_in_pages(client):
    page = client.get("/api/videos", params={"offset": 1, "limit": 2}).json()
    assert page["total"] == 4 and [Path(v["video"]).stem for v in page["videos"]] == [
        "green disc",
        "blue disc",
    ]


def test_refused_videos_have_reasons(client):
    page = client.get("/api/videos", params={"state": "refused"}).json()
    assert [video["reason"] for video in page["videos"]] == ["expected a video, found a file of 0 bytes"]


def test_status_is_json(client):
    status = client.get("/api/status").json()
    assert (status["videos"], status["moments"], status["columns"]["year"]) == (4, 12, "int")


def search_together(client, texts):
    """Search for texts at the same time; return the first hit of each by its place."""
    found = {}

    def search(i):
        found[i] = hits(client.get("/api/search", params={"q": texts[i], "k": 1}))

    threads = [threading.Thread(target=search, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_texts_that_wait_are_encoded_together(index, client, monkeypatch):
    monkeypatch.setattr(index, "delay", 0.05)
    index.batches.clear()
    colours = list(COLOURS) * 4
    found = search_together(client, colours)
    assert found == {i: [colour] for i, colour in enumerate(colours)}
    assert sum(index.batches) >= len(colours) - 2 and len(index.batches) <= 3


def test_a_clip_that_is_decoded_slowly_does_not_hold_up_texts(index, client, monkeypatch):
    monkeypatch.setattr(index, "clip_delay", 2.0)
    index.searching.clear()
    thread = threading.Thread(target=client.get, args=("/api/search?clip=1&start=0&end=1",))
    thread.start()
    assert index.searching.wait(10)
    began = time.monotonic()
    assert hits(client.get("/api/search", params={"q": "red", "k": 1})) == ["red"]
    assert time.monotonic() - began < 1.5
    thread.join()


def test_a_text_that_cannot_be_encoded_fails_alone(index, client, monkeypatch):
    def refuse(texts):
        raise ValueError("texts: too long")

    monkeypatch.setattr(index, "embed_texts", refuse)
    monkeypatch.setattr(index, "delay", 0.05)
    found = search_together(client, ["red", "blue"] * 2)
    assert found == {0: ["red"], 1: ["blue"], 2: ["red"], 3: ["blue"]}


class _Links(HTMLParser):
    """Collect what a page loads, and inline code, which its policy would block."""

    def __init__(self):
        super().__init__()
        self.loaded, self.inline = [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.loaded += [v for k, v in attrs if k in ("src", "href") and tag != "a"]
        self.inline += [k for k, _ in attrs if k == "style" or k.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in attributes):
            self.inline.append(tag)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_loads_only_files_of_this_server_and_has_no_inline_code(client, path):
    links = _Links()
    links.feed(client.get(path).text)
    assert links.loaded and not links.inline
    for link in links.loaded:
        assert link.startswith("/page/") and client.get(link).status_code == 200


def test_the_files_of_the_page_name_no_other_site():
    for file in (Path(serve.__file__).parent / "page").iterdir():
        addresses = set(re.findall(r"https?://[^\"'` )]+", file.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file


def test_page_files_are_revalidated_by_their_tag(client):
    first = client.get("/page/app.js")
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content


def test_docs_describe_every_route_of_the_schema(client):
    schema = client.get("/openapi.json").json()
    page = client.get("/docs").text
    paths = [
        "/api/search",
        "/api/videos",
        "/api/moments/{moment_id}/thumbnail",
        "/api/media/{moment_id}",
        "/api/status",
    ]
    assert set(paths) <= set(schema["paths"])
    for path in schema["paths"]:
        assert f"<code>{path}</code>" in page
    assert "multipart/form-data" in json.dumps(schema["paths"]["/api/search"]["post"])


def test_progress_and_changes_are_events(index, monkeypatch):
    progress = IndexProgress(done=1, total=4, moments=3, seconds=2.0, remaining=6.0)
    app = create_app(index)
    with TestClient(app) as client:

        def change():
            time.sleep(0.3)
            monkeypatch.setattr(index, "progress", progress)
            time.sleep(1.5)
            client.portal.call(app.app.state.feed.close)

        thread = threading.Thread(target=change)
        thread.start()
        response = client.get("/api/status", headers={"Accept": "text/event-stream"})
        thread.join()
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    assert [event["progress"] and event["progress"]["done"] for event in events] == [None, 1]
