"""What every method is: towers, an encoding of both sides, losses and a similarity."""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from discovla.batch import Batch, Embedding, Losses
from discovla.nn.logit_scale import LogitScale
from discovla.nn.lora import LoRA
from discovla.nn.transformer import Attention
from discovla.ops.preprocess_frames import preprocess_frames
from discovla.towers.architecture import Architecture
from discovla.towers.text import TextTower
from discovla.towers.vision import MakeBlock, VisionTower
from discovla.towers.weights import openai_name, openai_weights


class MethodConfig(BaseModel):
    """Options every method has; each method adds its own under its name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str


class Method(nn.Module, ABC):
    """A video-text retrieval method on a CLIP.

    `trained` declares which parameters train, as regular expressions on their full names.  `compute_dtype` is
    what the towers compute in; features leave them in float32 at least.
    """

    Config: ClassVar[type[MethodConfig]]
    needs_frame_captions: bool = False

    def __init__(
        self,
        architecture: Architecture,
        config: MethodConfig,
        *,
        vision_block: MakeBlock | None = None,
        text_block: MakeBlock | None = None,
    ) -> None:
        super().__init__()
        self.architecture, self.config = architecture, config
        self.vision = VisionTower(architecture, vision_block)
        self.text = TextTower(architecture, text_block)
        self.logit_scale = LogitScale()
        self.compute_dtype = torch.float32

    @property
    @abstractmethod
    def trained(self) -> tuple[str, ...]:
        """Regular expressions; a parameter trains where one matches its whole name."""

    @abstractmethod
    def encode_video(self, frames: Tensor, mask: Tensor) -> Embedding:
        """Videos from frames (b f y x c uint8, or b f c y x normalised) and mask (b f, bool)."""

    @abstractmethod
    def losses(self, text: Embedding, video: Embedding, *, same_video: Tensor | None = None) -> Losses:
        """Losses of n matching pairs; same_video: n n, bool, true where two samples show one clip."""

    def encode_text(self, ids: Tensor, mask: Tensor) -> Embedding:
        """Captions from ids (n l) and mask (n l, bool)."""
        return Embedding(pooled=widen(self.text(ids, mask, dtype=self.compute_dtype)))

    def encode(self, batch: Batch) -> tuple[Embedding, Embedding]:
        """Both sides of a training batch; the text side may carry frame captions as tokens."""
        text = self.encode_text(batch.text_ids, batch.text_mask)
        return text, self.encode_video(batch.frames, batch.frame_mask)

    def similarity(self, text: Embedding, video: Embedding) -> Tensor:
        """s t̂ v̂ᵀ of the pooled features, t v."""
        return self.logit_scale() * unit(text.pooled) @ unit(video.pooled).T

    def pixels(self, frames: Tensor) -> Tensor:
        """Normalised pixels in the compute dtype, b f c y x."""
        return preprocess_frames(frames, dtype=self.compute_dtype)

    def freeze(self) -> None:
        """Let gradients flow into the declared parameters only.

        Raises:
            ValueError: a declared expression matches no parameter.
        """
        patterns = dict.fromkeys(self.trained, 0)
        for name, parameter in self.named_parameters():
            matches = [pattern for pattern in patterns if re.fullmatch(pattern, name)]
            parameter.requires_grad_(bool(matches))
            for pattern in matches:
                patterns[pattern] += 1
        if unmatched := [pattern for pattern, count in patterns.items() if not count]:
            raise ValueError(f"{self.config.name}: {unmatched[0]!r} matches no parameter to train")

    def trained_state(self) -> dict[str, Tensor]:
        """The parameters that train, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `trained_state` gave, strictly.

        Raises:
            ValueError: names or shapes differ; the first is named.
        """
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        for name in [*own, *state]:
            if name not in state:
                raise ValueError(f"checkpoint: expected parameter {name}, found none")
            if name not in own or own[name].shape != state[name].shape:
                expected = tuple(own[name].shape) if name in own else "no such parameter"
                raise ValueError(f"checkpoint: {name}: expected {expected}, found {tuple(state[name].shape)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def plain_weights(self) -> dict[str, Tensor]:
        """The CLIP inside, under OpenAI's names, with LoRA merged into its projections.

        What a method computes beyond plain CLIP blocks (heads, fusion) is not in it.
        """
        weights = openai_weights(self, self.architecture)
        for name, module in self.named_modules():
            if isinstance(module, Attention) and isinstance(module.lora, LoRA):
                weights[openai_name(f"{name}.qkv.weight")] += module.lora.delta().detach()
        return weights

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be loaded: sizes, options and the weights that are not in it."""
        frozen = 0
        for _, parameter in sorted(self.named_parameters()):
            if not parameter.requires_grad:
                frozen = zlib.crc32(parameter.detach().cpu().contiguous().numpy().data, frozen)
        return {
            "architecture": self.architecture.to_dict(),
            "method": self.config.model_dump(mode="json"),
            "frozen": frozen,
        }


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last axis, without an epsilon: a zero vector is a fault that must show."""
    return x / x.norm(dim=-1, keepdim=True)


def widen(x: Tensor) -> Tensor:
    """x in float32 at least: what similarities and losses work in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of n k d over the k where mask (n k) is true; 0 where none is."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
