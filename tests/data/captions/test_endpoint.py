"""A captioner behind a server that may drop connections, stall and refuse."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from discovla.data.captions.captioning import NoCaption
from discovla.data.captions.endpoint import EndpointCaptioner, Server
from tests.data.captions.server import captions_server


def captioner(url: str, **options) -> EndpointCaptioner:
    server = Server(**{"url": url, "wait": 0.01, "attempts": 3, "timeout": 10, "parallel": 1} | options)
    return EndpointCaptioner("m", server, max_tokens=7)


GREYS = [np.full((8, 8, 3), level, np.uint8) for level in (40, 80, 120)]


def test_each_picture_is_one_request_and_captions_keep_the_order():
    with captions_server() as server:
        ask = captioner(server.url, parallel=3, key="secret")
        assert ask(GREYS) == ["a grey of 40", "a grey of 80", "a grey of 120"]
        assert server.headers["Authorization"] == "Bearer secret"
        assert (server.last["model"], server.last["max_tokens"], server.last["temperature"]) == ("m", 7, 0)
        picture, text = server.last["messages"][0]["content"]
        assert text == {"type": "text", "text": "Describe this picture in one short sentence."}
        assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
        content = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        assert Image.open(io.BytesIO(content)).size == (8, 8)


@pytest.mark.parametrize("fault", ["drop", "cut", 500, 503, 429], ids=str)
def test_a_transient_failure_is_retried(fault):
    with captions_server(fault, fault) as server:
        assert captioner(server.url)(GREYS[:1]) == ["a grey of 40"]
        assert server.asked == 3


@pytest.mark.parametrize("fault", ["stall", "trickle"])
def test_a_timeout_is_retried(fault):
    with captions_server(fault) as server:
        assert captioner(server.url, timeout=2)(GREYS[:1]) == ["a grey of 40"]
        assert server.asked == 2


def test_a_picture_whose_attempts_all_fail_gives_the_reason_and_others_go_on():
    with captions_server("drop", "drop", "drop") as server:
        first, second = captioner(server.url)(GREYS[:2])
        assert second == "a grey of 80"
        assert isinstance(first, NoCaption)
        assert first.reason.startswith(f"{server.url} failed 3 times, the last time: ")
    with captions_server("empty") as server:
        assert captioner(server.url)(GREYS[:1]) == [NoCaption(reason="the model's answer is empty")]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_ends_the_run(status):
    with captions_server(status) as server:
        with pytest.raises(ValueError, match=rf"/v1: m: HTTP {status} .*injected"):
            captioner(server.url)(GREYS)
        assert server.asked <= 3


def test_a_refused_connection_is_named():
    ask = captioner("http://127.0.0.1:9/v1", attempts=2)
    (failed,) = ask(GREYS[:1])
    assert isinstance(failed, NoCaption)
    assert "failed 2 times, the last time: URLError: [Errno 111] Connection refused" in failed.reason
