"""The interface of captioners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

INSTRUCTION = "Describe this picture in one short sentence."


@dataclass(frozen=True, kw_only=True)
class NoCaption:
    """Reason why a picture has no caption."""

    reason: str


class Captioner(Protocol):
    """Caption pictures."""

    identity: str
    """Model, weights, prompt and all else, besides the picture, that determines a caption."""

    def __call__(self, images: Sequence[np.ndarray]) -> list[str | NoCaption]:
        """Return a caption for each picture (uint8 RGB, y x 3), or the reason why it has none."""
        ...


def as_caption(text: str) -> str | NoCaption:
    """Return a model's answer on one line."""
    return " ".join(text.split()) or NoCaption(reason="the model's answer is empty")
