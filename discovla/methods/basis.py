"""Temporal basis: a CLIP whose text tower learns to read time in features of a frozen vision tower.

Every frame gets linear maps of its feature, weighted by cosines of its place in the clip (`TemporalBasis` in
nn/temporal_heads.py); the mean of the frames is the video.  The loss is the symmetric cross-entropy over the
batch, plus two that teach order: a caption fits its clip better than the clip played backwards, and a clip
fits its caption better than the caption with an exchange that makes it false.

Source: this project; no paper.  The untrained method is CLIP with mean pooling.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from discovla.methods.base import Method
from discovla.methods.config import MethodConfig


class BasisConfig(MethodConfig):
    """The options that differ from those of plain CLIP."""

    name: Literal["basis"] = "basis"
    """The method."""
    tune: Literal["full", "text", "lora", "frozen"] = "text"
    """Trained parameters of the towers; with "text" each clip needs to be encoded only once
    (engine.frozen_features)."""
    freeze_embeddings: bool = True
    """Keep the embeddings of tokens as they are.  Those of positions in the text train: by them "from P to Q"
    differs from "from Q to P"."""
    clip_lr_scale: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Learning rate of CLIP's own parameters, as a factor of that of the basis."""
    temporal: Literal["none", "basis"] = "basis"
    """The basis; "none" leaves mean pooling, which tells no clip from its reverse."""
    reversed_negatives: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the loss by which a caption fits its clip better than the clip played backwards."""
    swapped_captions: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the loss by which a clip fits its caption better than the caption with an exchange."""
    exclude_same_video: bool = True
    """Do not count other captions of the same clip, which are true of it, as negatives."""


class Basis(Method):
    """Mean pooling of frames that carry their place; every part is an option of `Method`."""

    Config = BasisConfig
    config: BasisConfig

    @property
    def trained(self) -> tuple[str, ...]:
        """Also the text tower's embeddings of positions, if the tower trains."""
        trains = self.config.tune in ("full", "text")
        return (*super().trained, *((r"text\.position_embedding",) if trains else ()))
