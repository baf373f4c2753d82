"""The options every method has, whose combinations need no code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from discovla.ops.alignment_losses import KLNorm


@dataclass(frozen=True, kw_only=True)
class TunedGroup:
    """Trained parameters that differ from the rest.

    names: of parameters, whole.  lr_scale: their learning rate over the schedule's.  weight_decay: theirs;
    None for the run's.
    """

    names: tuple[str, ...]
    lr_scale: float = 1.0
    weight_decay: float | None = None


class MethodConfig(BaseModel):
    """Options every method has; each method adds its own under its name, and its published defaults.

    released: checkpoint of the paper's own code to start from; none starts from CLIP alone.
    tune: what trains in the towers: "full" everything, "lora" a low-rank update of every qkv projection,
        "frozen" nothing.  What a method adds to the towers trains always.
    lora_rank: rank of LoRA and of the fusion adapters.
    freeze_embeddings: with tune = "full", leave embeddings, positions and the vision tower's first norm.
    clip_lr_scale: learning rate of CLIP's own parameters over that of new ones.
    decay_biases: weight decay also on parameters named a bias.
    fused_vision_blocks, fused_text_blocks: how many of the last blocks fuse the frames of a video, and the
        captions of its frames.
    frame_position: positions, zero at the start, on the keys that fusion reads: it then knows frame order.
    similarity: cosine of the "pooled" features, or T2VParser's of "tokens", where words and frames find
        their matches.
    alpha, beta: weights of the frame-level loss and of the distillation from it; where one is not 0, still
        captions of the frames are needed.
    kl_norm: "official" divides the distillation by n², so its weight per row falls with the batch; "fixed"
        weighs it as n = 128 does, at any batch.
    frame_group: frames are compared, and teach, among so many neighbouring samples of a batch alone, which
        bounds the work on large ones.  None compares all.
    detach_teacher: no gradient of the distillation into the frame-level similarity.
    mask_padded_frames: padded frames are not seen in fusion and frame similarity.
    exclude_same_video: captions of one clip are no negatives of each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    released: Path | None = None
    tune: Literal["full", "lora", "frozen"] = "full"
    lora_rank: int = Field(default=8, ge=1)
    freeze_embeddings: bool = False
    clip_lr_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    decay_biases: bool = True
    fused_vision_blocks: int = Field(default=0, ge=0)
    fused_text_blocks: int = Field(default=0, ge=0)
    frame_position: bool = False
    similarity: Literal["pooled", "tokens"] = "pooled"
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    beta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    kl_norm: KLNorm = "official"
    frame_group: int | None = Field(default=None, ge=2)
    detach_teacher: bool = False
    mask_padded_frames: bool = True
    exclude_same_video: bool = False

    @field_validator("frame_position")
    @classmethod
    def _position_needs_fusion(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("fused_vision_blocks", 1):
            raise ValueError("expected method.fused_vision_blocks >= 1 for positions on its keys, found 0")
        return value
