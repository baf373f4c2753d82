"""DiscoVLA: parameter-efficient adaptation of an image CLIP to video-text retrieval.

The towers stay frozen.  LoRA updates every qkv projection; in the last vision blocks the class rows of a
video's frames read all frames (Image-Video Features Fusion); in training, still captions of the sampled
frames pass the text tower with the same fusion and align with the frames, and that frame-level similarity
teaches the video-level one.

Source: DiscoVLA: Discrepancy Reduction in Vision, Language, and Alignment for Parameter-Efficient Video-Text
Retrieval (CVPR 2025, arXiv 2506.08887).  Defaults are the published behaviour.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from discovla.methods.base import Method
from discovla.methods.config import MethodConfig


class DiscoVLAConfig(MethodConfig):
    """The published choice of what every method can do; every repair of a published oddity is off by default.

    fused_vision_blocks, fused_text_blocks: H_V and H_L in the paper.  With alpha and beta both 0 it trains
    without frame captions.
    """

    name: Literal["discovla"] = "discovla"
    tune: Literal["full", "lora", "frozen"] = "lora"
    fused_vision_blocks: int = Field(default=4, ge=0)
    fused_text_blocks: int = Field(default=2, ge=0)
    alpha: float = Field(default=0.3, ge=0, allow_inf_nan=False)
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    mask_padded_frames: bool = False


class DiscoVLA(Method):
    """l_vid + alpha l_frm + beta l_dis on the mean of fused frames.

    Its parts are everybody's: LoRA in nn/lora.py, the fusion in nn/fusion.py, the three losses in
    ops/alignment_losses.py; `Method` puts them together.
    """

    Config = DiscoVLAConfig
    config: DiscoVLAConfig
