"""DiscoVLA: parameter-efficient adaptation of an image CLIP to video-text retrieval.

The towers stay frozen.  LoRA updates every qkv projection; in the last vision blocks the class rows of a
video's frames read all frames (Image-Video Features Fusion); in training, still captions of the sampled
frames pass the text tower with the same fusion and align with the frames, and that frame-level similarity
teaches the video-level one.

Source: DiscoVLA: Discrepancy Reduction in Vision, Language, and Alignment for Parameter-Efficient Video-Text
Retrieval (CVPR 2025, arXiv 2506.08887).  Defaults are the published behaviour.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from discovla.batch import Batch, Embedding, Losses
from discovla.methods.base import Method, MethodConfig, masked_mean, unit, widen
from discovla.nn.lora import LoRA
from discovla.nn.temporal import FusionAttention
from discovla.nn.transformer import Attention, Block
from discovla.ops.alignment_losses import AlignmentInputs, KLNorm, alignment_losses
from discovla.ops.info_nce import info_nce
from discovla.towers.architecture import Architecture, TowerShape


class DiscoVLAConfig(MethodConfig):
    """Options of DiscoVLA; every repair of a published oddity is off by default.

    lora_rank: rank r of LoRA and of the fusion adapters.
    fused_vision_blocks, fused_text_blocks: how many of the last blocks fuse (H_V, H_L in the paper).
    alpha, beta: weights of the frame-level loss and of the distillation; both 0 trains without frame
        captions.
    kl_norm: "official" divides the distillation by n², so its weight per row falls with the batch; "fixed"
        weighs it as n = 128 does, at any batch.
    detach_teacher: no gradient of the distillation into the frame-level similarity.
    mask_padded_frames: padded frames are not seen in fusion and frame similarity.
    exclude_same_video: captions of one clip are no negatives of each other.
    """

    name: Literal["discovla"] = "discovla"
    lora_rank: int = Field(default=8, ge=1)
    fused_vision_blocks: int = Field(default=4, ge=0)
    fused_text_blocks: int = Field(default=2, ge=0)
    alpha: float = Field(default=0.3, ge=0)
    beta: float = Field(default=1.0, ge=0)
    kl_norm: KLNorm = "official"
    detach_teacher: bool = False
    mask_padded_frames: bool = False
    exclude_same_video: bool = False


class DiscoVLA(Method):
    """The method; see the module's docstring."""

    Config = DiscoVLAConfig
    config: DiscoVLAConfig

    def __init__(self, architecture: Architecture, config: DiscoVLAConfig) -> None:
        def blocks(tower: TowerShape, fused: int):
            if fused > tower.layers:
                raise ValueError(f"method: expected at most {tower.layers} fused blocks, found {fused}")
            return lambda layer: self._block(tower, layer >= tower.layers - fused)

        super().__init__(
            architecture,
            config,
            vision_block=blocks(architecture.vision, config.fused_vision_blocks),
            text_block=blocks(architecture.text, config.fused_text_blocks),
        )
        self.needs_frame_captions = config.alpha > 0 or config.beta > 0

    def _block(self, tower: TowerShape, fused: bool) -> Block:
        shape, rank = tower.block(self.architecture.activation), self.config.lora_rank
        attention = FusionAttention(shape, rank) if fused else Attention(shape)
        attention.lora = LoRA(shape.width, 3 * shape.width, rank)
        return Block(shape, attention)

    @property
    def trained(self) -> tuple[str, ...]:
        fused = self.config.fused_vision_blocks or self.config.fused_text_blocks
        return (r".*\.attention\.lora\..*", *([r".*\.attention\.adapter\..*"] if fused else []))

    def encode_video(self, frames: Tensor, mask: Tensor) -> Embedding:
        """pooled: mean of the real frames' unit features, b d.  frames: their features, b f d."""
        seen = mask if self.config.mask_padded_frames else None
        features = widen(self.vision(self.pixels(frames), seen))  # b f d
        return Embedding(pooled=masked_mean(unit(features), mask), frames=features, frame_mask=mask)

    def encode(self, batch: Batch) -> tuple[Embedding, Embedding]:
        text, video = super().encode(batch)
        if self.needs_frame_captions:
            text = replace(text, frames=self.encode_frame_captions(batch))
        return text, video

    def encode_frame_captions(self, batch: Batch) -> Tensor:
        """Features of the frame captions, b f d, fused over the captions of each sample."""
        ids, mask = batch.frame_text_ids, batch.frame_text_mask
        if ids is None or mask is None:
            raise ValueError(
                "batch: expected frame captions (method.alpha or method.beta is not 0), found none"
            )
        b, f = ids.shape[:2]
        features = self.text(ids.flatten(0, 1), mask.flatten(0, 1), group=f, dtype=self.compute_dtype)
        return widen(features).unflatten(0, (b, f))

    def losses(self, text: Embedding, video: Embedding, *, same_video: Tensor | None = None) -> Losses:
        """l_vid + alpha l_frm + beta l_dis."""
        scale = self.logit_scale()
        ignore = None
        if self.config.exclude_same_video and same_video is not None:
            ignore = same_video.clone().fill_diagonal_(False)
        if text.frames is None or video.frames is None:
            loss = info_nce(text.pooled, video.pooled, scale, ignore=ignore)
            return Losses(total=loss, terms={"video": loss.detach()})
        inputs = AlignmentInputs(
            text=text.pooled,
            video=video.pooled,
            text_frames=text.frames,
            video_frames=video.frames,
            text_mask=video.frame_mask if self.config.mask_padded_frames else None,
            video_mask=video.frame_mask if self.config.mask_padded_frames else None,
        )
        loss = alignment_losses(
            inputs,
            scale,
            kl_norm=self.config.kl_norm,
            detach_teacher=self.config.detach_teacher,
            ignore=ignore,
        )
        total = loss.video + self.config.alpha * loss.frame + self.config.beta * loss.distill
        terms = {"video": loss.video, "frame": loss.frame, "distill": loss.distill}
        return Losses(total=total, terms={name: term.detach() for name, term in terms.items()})
