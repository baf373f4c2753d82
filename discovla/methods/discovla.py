"""DiscoVLA: parameter-efficient adaptation of an image CLIP to video-text retrieval.

The towers stay frozen; LoRA updates every qkv projection.  In the last H_V vision blocks the class row of
each frame attends to all frames of the video (Image-Video Features Fusion).  In training, captions of the
sampled frames pass the text tower, with the same fusion in its last H_L blocks; they are aligned with the
frames (l_frm), and that frame-level similarity teaches the video-level one (l_dis):

    loss = l_vid + alpha l_frm + beta l_dis

Source: DiscoVLA: Discrepancy Reduction in Vision, Language, and Alignment for Parameter-Efficient Video-Text
Retrieval (CVPR 2025, arXiv 2506.08887); details as in its code.

Oddities of the release, which are the defaults: padded frames take part in fusion and frame similarity
(`mask_padded_frames`), the distillation is divided by n squared (`kl_norm`) and sends gradients into its
teacher (`detach_teacher`), captions of one clip are negatives of each other (`exclude_same_video`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from discovla.methods.base import Method
from discovla.methods.config import MethodConfig


class DiscoVLAConfig(MethodConfig):
    """Published values of options that every method has; repairs of the release's oddities are off.

    With alpha = beta = 0 it trains without frame captions.
    """

    name: Literal["discovla"] = "discovla"
    """The method."""
    tune: Literal["full", "text", "lora", "frozen"] = "lora"
    """Trained parameters of the towers; published: "lora", the logit scale stays frozen."""
    fused_vision_blocks: int = Field(default=4, ge=0)
    """H_V: number of last vision blocks with Image-Video Features Fusion."""
    fused_text_blocks: int = Field(default=2, ge=0)
    """H_L: number of last text blocks with the same fusion over the captions of a video's frames."""
    alpha: float = Field(default=0.3, ge=0, allow_inf_nan=False)
    """alpha: weight of the frame-level loss l_frm."""
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """beta: weight of the distillation l_dis from frame level to video level."""
    mask_padded_frames: bool = False
    """Hide padded frames in fusion blocks and in the frame-level similarity; the release does not."""


class DiscoVLA(Method):
    """l_vid + alpha l_frm + beta l_dis on the mean of fused frames.

    Every part is an option of `Method`: LoRA (nn/lora.py), fusion (nn/fusion.py) and the three losses
    (ops/alignment_losses.py).
    """

    Config = DiscoVLAConfig
    config: DiscoVLAConfig
