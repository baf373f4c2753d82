"""Plain CLIP: contrastive image-text training, and mean pooling over frames for video.

Source: CLIP (arXiv 2103.00020); mean pooling as in CLIP4Clip's meanP (arXiv 2104.08860).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from discovla.batch import Embedding, Losses
from discovla.methods.base import Method, MethodConfig, masked_mean, unit, widen
from discovla.ops.info_nce import info_nce


class CLIPConfig(MethodConfig):
    """tune: "full" trains every parameter, "frozen" none (zero-shot evaluation)."""

    name: Literal["clip"] = "clip"
    tune: Literal["full", "frozen"] = "full"


class CLIP(Method):
    """An image is a video of one frame; a video is the mean of its frames' unit features."""

    Config = CLIPConfig
    config: CLIPConfig

    @property
    def trained(self) -> tuple[str, ...]:
        return (".*",) if self.config.tune == "full" else ()

    def encode_video(self, frames: Tensor, mask: Tensor) -> Embedding:
        """pooled: mean of the real frames' unit features, b d.  frames: their features, b f d."""
        features = widen(self.vision(self.pixels(frames)))  # b f d
        return Embedding(pooled=masked_mean(unit(features), mask), frames=features, frame_mask=mask)

    def losses(self, text: Embedding, video: Embedding, *, same_video: Tensor | None = None) -> Losses:
        loss = info_nce(text.pooled, video.pooled, self.logit_scale())
        return Losses(total=loss, terms={"video": loss.detach()})
