"""Plain CLIP: contrastive image-text training, and mean pooling over frames for video.

Source: CLIP (arXiv 2103.00020); mean pooling as in CLIP4Clip's meanP (arXiv 2104.08860).
"""

from __future__ import annotations

from typing import Literal

from discovla.methods.base import Method
from discovla.methods.config import MethodConfig


class CLIPConfig(MethodConfig):
    """Options of plain CLIP; tune = "frozen" is zero-shot evaluation."""

    name: Literal["clip"] = "clip"
    """The method."""


class CLIP(Method):
    """An image is a video of one frame; a video is the mean of its frames' unit features."""

    Config = CLIPConfig
    config: CLIPConfig
