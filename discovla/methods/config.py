"""Options that every method has; any combination of them works."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from discovla.nn.token_merging import Merge, MergeConfig
from discovla.ops.alignment_losses import KLNorm


@dataclass(frozen=True, kw_only=True)
class TunedGroup:
    """Trained parameters with a learning rate or weight decay of their own.

    names: whole parameter names.  lr_scale: factor of the learning rate.  weight_decay: None for the run's.
    """

    names: tuple[str, ...]
    lr_scale: float = 1.0
    weight_decay: float | None = None


class MethodConfig(BaseModel):
    """Options of every method; a method adds its own fields, its name and its published defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """The method: "clip", "discovla", "clip4clip", "clip2video", "t2vparser", "tempme" or "basis"."""
    released: Path | None = None
    """Checkpoint of the paper's own code to load (.bin, .pt or .safetensors).  None: start from CLIP."""
    tune: Literal["full", "text", "lora", "frozen"] = "full"
    """Trained parameters of the towers: "full" all, "text" those of the text tower, "lora" a low-rank update
    of every qkv projection (LoRA, arXiv 2106.09685), "frozen" none.  Modules that a method adds to the towers
    always train."""
    lora_rank: int = Field(default=8, ge=1)
    """Rank r of LoRA and of the adapters of fusion blocks."""
    freeze_embeddings: bool = False
    """With tune = "full": keep token, patch, class and position embeddings and the vision tower's first norm
    as they are."""
    frozen_vision_blocks: int = Field(default=0, ge=0)
    """Number N of the vision tower's first blocks that neither train nor get LoRA, nor does what precedes
    them.  Training may then read tokens that these blocks have computed once (engine.frozen_features)."""
    clip_lr_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Learning rate of CLIP's own parameters, as a factor of the learning rate of new parameters."""
    decay_biases: bool = True
    """Apply weight decay to biases too."""
    fused_vision_blocks: int = Field(default=0, ge=0)
    """H_V: number of last vision blocks in which the frames of a video see each other (DiscoVLA, Image-Video
    Features Fusion)."""
    fused_text_blocks: int = Field(default=0, ge=0)
    """H_L: number of last text blocks in which the captions of a video's frames see each other (DiscoVLA)."""
    frame_position: bool = False
    """Add a learned position of the frame, zero at the start, to the keys of vision fusion, which without it
    does not depend on the order of the frames."""
    fused_pool: Literal["own_query", "shared_query", "none"] = "own_query"
    """Fusion in the attention pool of a tower that has one, with fused_vision_blocks > 0.  "own_query": the
    query of each frame also depends on what the pool reads in that frame; "shared_query": all frames of all
    videos have the learned query; "none": the pool reads each frame by itself, and class rows alone fuse."""
    temporal: Literal["none", "basis"] = "none"
    """"basis": add to every frame's feature linear maps of it, weighted by cosines of the frame's place in
    the clip, before frames are pooled or a head reads them.  The maps start at zero.  Without them, or a head
    that reads places, a clip and its reverse have the same feature."""
    temporal_terms: int = Field(default=4, ge=1)
    """Number K of cosines of temporal = "basis", with K d^2 parameters for features of width d."""
    reversed_negatives: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of a loss by which a caption fits its clip better than the clip played backwards:
    mean softplus(s(caption, reverse) - s(caption, clip))."""
    reversed_when: Literal["order_words", "always"] = "order_words"
    """Captions that count in reversed_negatives: those with a phrase that tells order (data.order_words), or
    all."""
    swapped_captions: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of a loss by which a clip fits its caption better than the caption with an exchange that makes
    it false (data.order_words): mean softplus(s(exchanged, clip) - s(caption, clip)).  Captions without an
    exchange count as 0."""
    merge: Merge = "none"
    """Merging of similar tokens in the vision tower: "tome" within every frame (ToMe, arXiv 2210.09461), or
    "tempme" also across the frames of a clip, which are joined step by step (TempMe, arXiv 2409.01156)."""
    merging: MergeConfig = MergeConfig()
    """Options of `merge`."""
    similarity: Literal["pooled", "tokens"] = "pooled"
    """Score of a caption and a video: "pooled" cosine of their pooled features, or "tokens", in which words
    and frames find their matches (T2VParser)."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Loss of matching pairs: "softmax", the symmetric cross-entropy over the batch, or "sigmoid", SigLIP's
    (arXiv 2303.15343), for towers that were trained with it and whose logits have a bias."""
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the frame-level loss (alpha in DiscoVLA).  Above 0 it needs captions of the frames."""
    beta: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the distillation from frame level to video level (beta in DiscoVLA).  Above 0 it needs
    captions of the frames."""
    kl_norm: KLNorm = "official"
    """Divisor of the distillation over n pairs: "official" n squared, so that its weight per row falls with
    the batch; "fixed" the weight that "official" has at n = 128, for any batch."""
    frame_group: int | None = Field(default=None, ge=2)
    """Compute frame-level loss and distillation within groups of this many neighbouring samples, which bounds
    their cost in large batches.  None: over the whole batch."""
    detach_teacher: bool = False
    """Send no gradient of the distillation into the frame-level similarity."""
    mask_padded_frames: bool = True
    """Hide padded frames in fusion blocks and in the frame-level similarity."""
    exclude_same_video: bool = False
    """Do not count other captions of the same clip as negatives."""

    @field_validator("frame_position")
    @classmethod
    def _frame_position_needs_fusion(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("fused_vision_blocks", 1):
            raise ValueError("expected method.fused_vision_blocks >= 1 for positions on its keys, found 0")
        return value

    @model_validator(mode="after")
    def _joined_frames_cannot_fuse(self) -> MethodConfig:
        if self.merge == "tempme" and self.fused_vision_blocks:
            raise ValueError(
                "merge: expected method.fused_vision_blocks = 0 with 'tempme', which joins frames to one "
                f"sequence, found {self.fused_vision_blocks}"
            )
        return self
