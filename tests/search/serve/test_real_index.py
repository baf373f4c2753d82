"""The server on an index of the shipped CLIP, and the command that starts it."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from discovla.cli import main
from discovla.data.sampling import Sampling
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import read_frames
from discovla.search.index import Index
from discovla.search.serve import create_app
from tests.search.serve.fake import jpeg
from tests.search.videos import write_video


@pytest.fixture(scope="module")
def client(read_only):
    with TestClient(create_app(read_only), base_url="http://localhost") as client:
        yield client


def found(response):
    """Return file, start and end of each hit."""
    assert response.status_code == 200, response.text
    return [(Path(hit["video"]).name, hit["start"], hit["end"]) for hit in response.json()["hits"]]


def moment_of(client, name, start):
    """Return the number of the moment of a file that begins at a time."""
    response = client.get("/api/search", params={"q": "anything", "k": 50, "merge": False})
    hits = response.json()["hits"]
    return next(h["moment_id"] for h in hits if Path(h["video"]).name == name and h["start"] == start)


def test_every_kind_of_query_finds_its_moment(client, folder):
    moment = moment_of(client, "three.mp4", 4)
    frames = read_frames(folder / "three.mp4", Sampling(frames=12))
    shown = next(i for i, seconds in zip(frames.indices, frames.seconds, strict=True) if 5 < seconds < 8)
    upload = {"image": ("shown.jpg", jpeg(frames.images[shown]))}
    assert found(client.post("/api/search", files=upload, data={"k": 1})) == [("three.mp4", 4, 9)]
    clip = {"clip": moment, "start": 5, "end": 8, "k": 1}
    assert found(client.get("/api/search", params=clip)) == [("three.mp4", 4, 9)]
    like = client.get("/api/search", params={"like": moment, "k": 50, "merge": False})
    assert len(found(like)) == 6 and moment not in [hit["moment_id"] for hit in like.json()["hits"]]
    times = [frame["time"] for frame in client.get(f"/api/moments/{moment}/frames?q=red").json()]
    assert times == sorted(times) and times[0] >= 4 and times[-1] <= 9


def test_files_and_thumbnails_are_those_of_the_index(client, folder):
    moment = moment_of(client, "one.mp4", 0)
    assert client.get(f"/api/media/{moment}").content == (folder / "one.mp4").read_bytes()
    assert client.get(f"/api/moments/{moment}/thumbnail").content[:2] == b"\xff\xd8"
    assert client.get("/api/media/1000000").status_code == 404
    assert client.get("/api/moments/1000000/thumbnail").status_code == 404
    assert client.get("/api/search?like=1000000").status_code == 404


def test_texts_of_one_batch_score_as_texts_alone(client, read_only):
    texts = ["a red circle", "two squares meet", "nothing", "a blue triangle moves up"] * 3
    scores = {}

    def search(i):
        hits = client.get("/api/search", params={"q": texts[i]}).json()["hits"]
        scores[i] = [hit["score"] for hit in hits]

    threads = [threading.Thread(target=search, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, text in enumerate(texts):
        alone = [hit.score for hit in read_only.search(text, k=24).hits]
        assert scores[i] == pytest.approx(alone, abs=1e-3)


def test_only_texts_have_a_probability(client, read_only, monkeypatch):
    calibration = {"location": 2.0, "scale": 0.5, "count": 100, "moments": 7, "recall": 0.5}
    monkeypatch.setitem(read_only.settings, "calibration", calibration)
    of_text, of_moment = (
        client.get("/api/search", params=query).json() for query in ({"q": "x"}, {"like": 0})
    )
    assert of_text["probability_best"] is not None
    assert of_moment["probability_best"] is None and of_moment["note"] == ""


def test_a_clip_that_is_decoded_slowly_does_not_hold_up_texts(client, read_only, monkeypatch):
    started, go_on = threading.Event(), threading.Event()

    def decode_slowly(_):
        started.set()
        assert go_on.wait(60)
        raise DecodeError("one.mp4", "slow")

    monkeypatch.setattr(read_only, "_videos", decode_slowly)
    statuses = []
    thread = threading.Thread(
        target=lambda: statuses.append(client.get("/api/search?clip=0&start=0&end=1").status_code)
    )
    thread.start()
    assert started.wait(60)
    assert client.get("/api/search?q=a+text+during+a+clip").status_code == 200
    go_on.set()
    thread.join()
    assert statuses == [400]


ATTACKS = [
    "1 = 1",
    "name = 'x'; DROP TABLE moments",
    "name = 'x' UNION SELECT * FROM moments",
    "name = 'x' --",
    "name = (SELECT 1)",
    "name = 'x' OR 1 = 1",
    "load_extension('x.so')",
    "name LIKE '%' || name",
    "__import__('os').system('true')",
    "name.__class__ = 'x'",
    "moment_id = 1",
    "name = 'unclosed",
    "name",
    "(" * 400,
    "not " * 240,
]


@pytest.mark.parametrize("where", ATTACKS, ids=range(len(ATTACKS)))
def test_a_condition_is_nothing_but_a_comparison_of_known_columns(client, where):
    response = client.get("/api/search", params={"q": "red", "where": where})
    assert response.status_code == 400
    assert response.json()["detail"].startswith("where: ")


def test_a_condition_selects_files_by_name(client):
    response = client.get("/api/search", params={"q": "red", "where": "name like 'one%'"})
    assert found(response) == [("one.mp4", 0, 3)]


def test_a_pattern_that_matches_in_many_ways_is_quick(client):
    began = time.monotonic()
    where = f"name like '{'%a' * 200}'"
    assert found(client.get("/api/search", params={"q": "red", "where": where})) == []
    assert time.monotonic() - began < 5


def test_what_is_indexed_meanwhile_is_found_without_a_restart(model, tmp_path):
    write_video(tmp_path / "videos/one.mp4", [("one", 2)])
    path = tmp_path / "my.index"
    with Index.create(path, model) as index:
        index.add([tmp_path / "videos"])
    reader = Index.open(path, model=model, read_only=True)
    with TestClient(create_app(reader)) as client:
        assert client.get("/api/status").json()["videos"] == 1
        write_video(tmp_path / "videos/two.mp4", [("two", 2)])
        with Index.open(path, model=model) as writer:
            writer.add([tmp_path / "videos"])
        deadline = time.monotonic() + 30
        while client.get("/api/status").json()["videos"] != 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(found(client.get("/api/search?q=red"))) == 2
    reader.close()


def test_serve_refuses_what_cannot_be_meant_with_one_line(read_only, tmp_path, capsys):
    path = str(read_only.path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = {
            ("serve", str(tmp_path / "none")): "none",
            ("serve", path, "--host", "0.0.0.0"): "--token: expected one with --host 0.0.0.0",
            ("serve", path, "--token", "short"): "--token: expected at least 16",
            ("serve", path, "--port", port): "cannot listen there: Address already in use",
            ("serve", path, "--port", "99999"): "cannot listen there: no such port",
        }
        for arguments, words in wrong.items():
            assert main(arguments) == 2
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_command_serves_with_a_token_until_it_is_told_to_stop(read_only):
    code = [sys.executable, "-m", "discovla", "serve", str(read_only.path), "--port", "0", "--token"]
    with subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output = [process.stdout.readline() for _ in range(3)]
        token = output[0].removeprefix("token: ").strip()
        assert re.fullmatch("[0-9a-f]{32}", token), output
        assert "7 moments of 3 videos" in output[1]
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", output[2])[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        statuses = []
        for headers in ({}, {"Authorization": f"Bearer {token}"}):
            connection.request("GET", "/api/search?q=a+red+circle", headers=headers)
            response = connection.getresponse()
            content = response.read()
            statuses.append(response.status)
        assert statuses == [401, 200] and json.loads(content)["hits"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
