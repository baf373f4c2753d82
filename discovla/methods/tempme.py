"""TempMe: a CLIP with LoRA whose vision tower merges similar tokens within and across frames.

In the first blocks every frame merges a few of its most similar tokens.  Later blocks join neighbouring
frames to one sequence, merge a share of its tokens and attend to what is left, until the last blocks see the
whole clip (nn/token_merging.py).  Class rows are never merged; the mean of those of all frames is the feature
of the video.  The loss is the symmetric cross-entropy over the batch.

Source: TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval (arXiv 2409.01156); details
and defaults as in its code.

Oddities of the release, which are the defaults: padded frames are joined and merged like real ones
(`mask_padded_frames`); shares count class rows, which cannot merge (`merging.count`); positions are added
only where a join merges tokens (`merging.join_position`); a block that joins nothing merges fewer tokens
(`merging.single_join`); too many merges are an error (`merging.clamp`).

Differences from the release: numbers of tokens are those of the backbone and the frames, not of a table by
its name; of equal similarities the lower place merges, on every device; a row of zeros is similar to none;
on several processes gradients are those of the whole batch (`engine.grad_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from discovla.methods.base import Method
from discovla.methods.config import MethodConfig
from discovla.methods.released import renamed
from discovla.nn.token_merging import Merge
from discovla.towers.names import openai_name


class TempMeConfig(MethodConfig):
    """Published values of options that every method has."""

    name: Literal["tempme"] = "tempme"
    """The method."""
    tune: Literal["full", "text", "lora", "frozen"] = "lora"
    """Trained parameters of the towers; published: "lora", the logit scale stays frozen."""
    merge: Merge = "tempme"
    """Merging of similar tokens in the vision tower; "tome" and "none" leave out what the paper adds."""
    mask_padded_frames: bool = False
    """Hide padded frames in attention, and merge them with each other; the release does not."""


class TempMe(Method):
    """Mean of frames whose tokens were merged; see the module's docstring."""

    Config = TempMeConfig
    config: TempMeConfig

    def released_parameters(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theirs = {name: f"clip.{released_name(name)}" for name, _ in self.named_parameters()}
        single = [
            x for x, n in zip(self.config.merging.layers, self.config.merging.factors, strict=True) if n == 1
        ]
        unused = rf"clip\.visual.*\.({'|'.join(map(str, single))})\.TVPt_Video_Positional_embedding"
        released = renamed(self, state, theirs, unused if single else "(?!)")
        return {n: x.flatten(0, 2) if ".merging." in n and x.dim() == 4 else x for n, x in released.items()}


def released_name(name: str) -> str:
    """The released name of a parameter of ours, without "clip."; positions there have the shape 1 P 1 w."""
    if ".merging.positions." in name:
        layer = name.rpartition(".")[2]
        return f"visual.transformer.resblocks.{layer}.TVPt_Video_Positional_embedding"
    return openai_name(name).replace("attention.lora.", "attn.TVPt_LoRA_")
