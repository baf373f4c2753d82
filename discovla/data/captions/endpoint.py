"""A model behind an OpenAI-compatible server (vLLM, Ollama, llama.cpp or a service) as a captioner."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from discovla.data.captions.captioning import INSTRUCTION, NoCaption, as_caption

_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP status codes that are retried
_LONGEST_WAIT = 60.0  # seconds between two attempts


class _TransientError(Exception):
    """A failure that another attempt may not have."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Address and limits of a server."""

    url: str
    """Up to and including `/v1`."""
    key: str | None = None
    """Sent as a bearer token."""
    attempts: int = 5
    """Per picture."""
    wait: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""
    timeout: float = 120.0
    """Seconds an answer may take."""
    parallel: int = 8
    """Requests at once."""


class EndpointCaptioner:
    """A model behind `/chat/completions`, one request a picture.

    Dropped connections, timeouts, truncated answers and the status codes of a busy or failing server are
    retried; a picture whose attempts all fail gets `NoCaption`.  Any other refusal (wrong key, model or
    address) raises.

    Args:
        name: of the model on the server.
        server: address and limits.
        prompt: text sent with the picture.
        max_tokens: of a caption.

    Raises:
        ValueError: the URL is not http or https, or a limit is below 1.
    """

    def __init__(self, name: str, server: Server, prompt: str | None = None, max_tokens: int = 30) -> None:
        if not server.url.startswith(("http://", "https://")):
            raise ValueError(f"--url: expected http://... or https://..., found {server.url!r}")
        if server.attempts < 1 or server.parallel < 1:
            raise ValueError(
                f"attempts, parallel: expected at least 1, got {server.attempts}, {server.parallel}"
            )
        self.name, self.server, self.max_tokens = name, server, max_tokens
        self.prompt = INSTRUCTION if prompt is None else prompt
        self.identity = f"openai {name} {self.prompt!r} {max_tokens}"

    def __call__(self, images: Sequence[np.ndarray]) -> list[str | NoCaption]:
        """Return a caption for each picture, or the failure of its last attempt.

        Raises:
            ValueError: the server refuses the request.
        """
        with ThreadPoolExecutor(self.server.parallel) as threads:
            return list(threads.map(self._caption, images))

    def _caption(self, image: np.ndarray) -> str | NoCaption:
        """Caption one picture, with retries."""
        request = self._request(image)
        reason = ""
        for attempt in range(self.server.attempts):
            if attempt:
                time.sleep(min(self.server.wait * 2 ** (attempt - 1), _LONGEST_WAIT))
            try:
                return as_caption(self._answer(request))
            except _TransientError as error:
                reason = str(error)
        return NoCaption(
            reason=f"{self.server.url} failed {self.server.attempts} times, the last time: {reason}"
        )

    def _request(self, image: np.ndarray) -> urllib.request.Request:
        """Build the request for one picture."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        picture = {"type": "image_url", "image_url": {"url": url}}
        question = {
            "model": self.name,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": self.prompt}]}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if self.server.key:
            headers["Authorization"] = f"Bearer {self.server.key}"
        address = self.server.url.rstrip("/") + "/chat/completions"
        return urllib.request.Request(address, json.dumps(question).encode(), headers)

    def _answer(self, request: urllib.request.Request) -> str:
        """Send a request once and return the text of the answer.

        Raises:
            _TransientError: no complete answer.
            ValueError: the server refuses the request.
        """
        try:
            deadline = time.monotonic() + self.server.timeout
            with urllib.request.urlopen(request, timeout=self.server.timeout) as response:
                content = _read_until(deadline, response)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {_first_words(error)}".strip()
            if error.code in _TRANSIENT:
                raise _TransientError(reason) from error
            raise ValueError(f"{self.server.url}: {self.name}: {reason}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _TransientError(f"{type(error).__name__}: {reason}") from error
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            text = error
        if not isinstance(text, str):
            raise _TransientError(
                f"expected a text at choices[0].message.content, found {content[:80]!r} ({text!r:.80})"
            )
        return text


def _read_until(deadline: float, response: http.client.HTTPResponse) -> bytes:
    """Read an answer; one that trickles in must be complete at the deadline."""
    content = bytearray()
    while part := response.read1():
        content += part
        if time.monotonic() > deadline:
            raise TimeoutError("timed out in the middle of the answer")
    return bytes(content)


def _first_words(error: urllib.error.HTTPError) -> str:
    """Return the start of an error's body on one line."""
    try:
        return " ".join(error.read(300).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        return str(error.reason)
