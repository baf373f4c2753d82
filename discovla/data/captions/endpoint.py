"""Captions from a server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama or a service."""

from __future__ import annotations

import base64
import http.client
import io
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from discovla.data.captions.captioners import PROMPT, Asking, Failed, said
from discovla.data.retry import PASSING, Passing, Tries


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server and how much is asked of it.

    url: up to and with `/v1`.  key: sent as a bearer token, None for none.  tries: of each picture.
    wait: seconds before the second try, doubled before each further one.  seconds: that an answer may take.
    parallel: requests at once.
    """

    url: str
    key: str | None = None
    tries: int = 5
    wait: float = 1.0
    seconds: float = 120.0
    parallel: int = 8


class EndpointCaptioner:
    """A model behind `/chat/completions`, asked for one picture a request.

    A dropped connection, a timeout, a server that is busy or fails, and an answer that is cut off are tried
    again; what still fails is named.  Another refusal (a wrong key, model or address) ends the run.

    Args:
        name: of the model, as the server knows it.
        asking, server: how.

    Raises:
        ValueError: the address is none.
    """

    def __init__(self, name: str, asking: Asking, server: Server) -> None:
        if not server.url.startswith(("http://", "https://")):
            raise ValueError(f"--url: expected http://... or https://..., found {server.url!r}")
        if server.tries < 1 or server.parallel < 1:
            raise ValueError(f"tries, parallel: expected at least 1, got {server.tries}, {server.parallel}")
        self.name, self.asking, self.server = name, asking, server
        self.prompt = PROMPT if asking.prompt is None else asking.prompt
        self.identity = f"openai {name} {self.prompt!r} {asking.max_tokens}"

    def __call__(self, images: Sequence[np.ndarray]) -> list[str | Failed]:
        """A caption of each picture, or what the last of its tries met.

        Raises:
            ValueError: the server refuses what is asked of it.
        """
        with ThreadPoolExecutor(self.server.parallel) as threads:
            return list(threads.map(self._caption, images))

    def _caption(self, image: np.ndarray) -> str | Failed:
        """The caption of one picture."""
        server = self.server
        body = json.dumps(self._question(image)).encode()
        try:
            return Tries(count=server.tries, wait=server.wait).of(lambda: said(self._asked(body)))
        except Passing as error:
            return Failed(reason=f"{server.url} failed {server.tries} times, the last time: {error}")

    def _asked(self, body: bytes) -> str:
        """The text of one answer.

        Raises:
            Passing: it did not come, or cut off.
            ValueError: the server refuses what is asked of it.
        """
        try:
            content = self._post(body)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {_told(error)}".strip()
            if error.code not in PASSING:
                raise ValueError(f"{self.server.url}: {self.name}: {reason}") from error
            raise Passing(reason) from error
        except (OSError, http.client.HTTPException) as error:
            raise Passing(f"{type(error).__name__}: {getattr(error, 'reason', None) or error}") from error
        return _answer(content)

    def _question(self, image: np.ndarray) -> dict[str, Any]:
        """The picture and the prompt in OpenAI's form."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        picture = {"type": "image_url", "image_url": {"url": url}}
        return {
            "model": self.name,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": self.prompt}]}],
            "max_tokens": self.asking.max_tokens,
            "temperature": 0,
        }

    def _post(self, body: bytes) -> bytes:
        """The server's answer."""
        headers = {"Content-Type": "application/json"}
        if self.server.key:
            headers["Authorization"] = f"Bearer {self.server.key}"
        address = self.server.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, body, headers)
        with urllib.request.urlopen(request, timeout=self.server.seconds) as response:
            return response.read()


def _answer(content: bytes) -> str:
    """The text of an answer.

    Raises:
        Passing: it is none, being cut off most often.
    """
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        found = f"found {content[:80]!r} ({type(error).__name__}: {error})"
        raise Passing(f"expected choices[0].message.content, {found}") from error
    if not isinstance(text, str):
        raise Passing(f"expected a text in the answer, found {content[:80]!r}")
    return text


def _told(error: urllib.error.HTTPError) -> str:
    """What a refusal says of itself, on one line."""
    try:
        return " ".join(error.read(300).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        return str(error.reason)
