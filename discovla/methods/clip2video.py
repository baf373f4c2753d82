"""CLIP2Video: differences of neighbouring frames, and words and frames aligned around shared centres.

Temporal Difference Block (TDB): a token made of the difference of two neighbouring frames is put between
them; a transformer reads all tokens, and its outputs at the frames are pooled to the global feature.
Temporal Alignment Block (TAB): the frames, and every second frame enhanced by the TDB at half the rate, are
aggregated around learned centres, and so are the words of a caption.  With S_glob and S_TAB the similarities

    loss = w l(S_glob) + (1 - w) l(S_TAB),    ranking by w S_glob + (1 - w) S_TAB.

Source: CLIP2Video: Mastering Video-Text Retrieval via Image CLIP (arXiv 2106.11097); details and switches as
in its released inference code.  There is no released training code: training defaults are those of CLIP4Clip,
from which it derives.

Oddities of the release: heads see the key masks of other videos of the batch, and the difference between the
last real and the first padded frame counts as real (both with `mask_mode = "official"`, the second also with
"ragged"); a difference has position i + 1 inside its own attention and i outside.  Unlike in the release,
negatives are those of the whole batch over all processes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from discovla.batch import Embedding
from discovla.methods.base import Method, VideoLosses, excluded
from discovla.methods.config import MethodConfig
from discovla.methods.released import by_name
from discovla.nn.block import BlockShape, LayerNorm
from discovla.nn.features import check_mask
from discovla.nn.temporal_heads import SoftVLAD, Table, Transformer
from discovla.ops.column_shard import ColumnShard
from discovla.ops.info_nce import contrastive_loss
from discovla.ops.unit_mean import unit_mean
from discovla.towers.architecture import Architecture

log = logging.getLogger(__name__)

TemporalProj = Literal["sigmoid_selfA", "sigmoid_mlp", "none"]
MaskMode = Literal["raggedstrict", "ragged", "official"]

RELEASED = (
    ("positions.", "frame_position_embeddings."),
    ("transformer.", "transformerClip."),
    ("difference.types.", "type_position_embeddings."),
    ("difference.attention.", "frame2t_attention."),
    ("difference.projection", "frame2t_projection"),
    ("difference.norm.", "trans_layernorm."),
    ("action.", "actionClip."),
    ("vlad.assignment", "weight_center"),
    ("vlad.centres", "emb_center"),
)


class CLIP2VideoConfig(MethodConfig):
    """Options of CLIP2Video, named as the released switches; "none" is their empty string."""

    name: Literal["clip2video"] = "clip2video"
    """The method."""
    similarity: Literal["pooled"] = "pooled"
    """Scores are cosines of pooled features; words and frames are compared by the TAB."""
    temporal_type: Literal["TDB", "none"] = "TDB"
    """Tokens between the frames: "TDB" their differences, or "none"."""
    temporal_proj: TemporalProj = "sigmoid_selfA"
    """Projection of a difference d: "sigmoid_selfA" tanh of attention among all differences,
    "sigmoid_mlp" tanh of a linear map, "none" d itself."""
    sim_type: Literal["seqTransf", "meanP"] = "seqTransf"
    """Global feature: mean of the frames after ("seqTransf") or before ("meanP") the temporal transformer."""
    center_type: Literal["TAB", "none"] = "TAB"
    """Second similarity: "TAB" around shared centres, or "none"."""
    center_proj: Literal["TAB_TDB", "TAB", "none"] = Field(default="TAB_TDB", validate_default=True)
    """Tokens that join the frames in the TAB: every second frame with differences ("TAB_TDB"), without them
    ("TAB"), or no tokens ("none")."""
    centers: int = Field(default=5, ge=1)
    """K: number of centres; released: 5 for MSR-VTT and MSVD, 7 for VATEX."""
    center_weight: float = Field(default=0.5, ge=0, le=1)
    """w: weight of the global similarity and its loss; the TAB has 1 - w."""
    mask_mode: MaskMode = "raggedstrict"
    """Padded frames: "raggedstrict" hides them everywhere; "ragged" shows the difference between the last
    real and the first padded frame; "official" besides gives heads the masks of other videos, as released."""
    head_layers: int = Field(default=4, ge=1)
    """Number of blocks of the temporal transformer."""
    freeze_embeddings: bool = True
    """Keep CLIP's embeddings, positions and the vision tower's first norm as they are, as CLIP4Clip does."""
    clip_lr_scale: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Learning rate of CLIP's own parameters, as a factor of the head's."""
    decay_biases: bool = False
    """Apply weight decay to biases too; CLIP4Clip does not."""

    @field_validator("sim_type")
    @classmethod
    def _mean_has_no_differences(cls, value: str, info: ValidationInfo) -> str:
        if value == "meanP" and info.data.get("temporal_type") == "TDB":
            raise ValueError("expected method.temporal_type = 'none' with a mean of the frames")
        return value

    @field_validator("center_proj")
    @classmethod
    def _differences_need_their_block(cls, value: str, info: ValidationInfo) -> str:
        if value == "TAB_TDB" and (info.data.get("temporal_type"), info.data.get("center_type")) == (
            "none",
            "TAB",
        ):
            raise ValueError("expected method.temporal_type = 'TDB' with differences of every second frame")
        return value


class TemporalDifferenceBlock(nn.Module):
    """Interleave frames with their differences: x_0, delta_0, x_1, ..., x_n-1, d_i = x_i+1 - x_i.

    sigmoid_selfA: delta = tanh(N(A(d_i + E_i+1)) / 2), A one block of attention, N a layer norm;
    sigmoid_mlp: delta = tanh(N(d_i M) / 2);  none: delta = d_i.
    """

    def __init__(self, shape: BlockShape, projection: TemporalProj, masks: MaskMode) -> None:
        super().__init__()
        self.masks: MaskMode = masks
        self.types = Table(2, shape.width)
        self.attention = Transformer(shape, 1) if projection == "sigmoid_selfA" else None
        self.projection = nn.Parameter(torch.eye(shape.width)) if projection == "sigmoid_mlp" else None
        self.norm = None if projection == "none" else LayerNorm(shape.width)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens b 2n-1 d, the sum of their position and type 2n-1 d, and their mask b 2n-1.

        Args:
            x: b n d, n >= 2.  mask: b n, bool.  positions: n d; a difference has row i + 1 inside its
                attention and row i outside, as released.
        """
        n = x.shape[1]
        delta = self.transform(x[:, 1:] - x[:, :-1], mask[:, 1:], positions[1:])  # b n-1 d
        types = self.types(2)
        places = torch.stack([positions + types[1], positions + types[0]], dim=1).flatten(0, 1)  # 2n d
        seen = mask[:, :-1] & mask[:, 1:] if self.masks == "raggedstrict" else mask[:, :-1]
        return interleave(x, delta), places[: 2 * n - 1], interleave(mask[..., None], seen[..., None])[..., 0]

    def transform(self, difference: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Project differences d to delta, b n-1 d."""
        if self.attention is not None:
            keys = key_mask(mask, self.attention.heads, self.masks)
            difference = self.attention(difference + positions, keys)
        elif self.projection is not None:
            difference = difference @ self.projection
        return difference if self.norm is None else torch.tanh(self.norm(difference) / 2)


class CLIP2Video(Method):
    """CLIP2Video; see the module's docstring."""

    Config = CLIP2VideoConfig
    config: CLIP2VideoConfig

    def __init__(self, architecture: Architecture, config: CLIP2VideoConfig) -> None:
        super().__init__(architecture, config)
        shape = architecture.joint_block()
        difference, aligned = config.temporal_type == "TDB", config.center_type == "TAB"
        enhanced = aligned and config.center_proj != "none"
        temporal = config.sim_type == "seqTransf"
        self.positions = Table(architecture.context_length, shape.width) if temporal or enhanced else None
        self.transformer = Transformer(shape, config.head_layers) if temporal else None
        self.difference = (
            TemporalDifferenceBlock(shape, config.temporal_proj, config.mask_mode) if difference else None
        )
        self.action = Transformer(shape, 1) if enhanced else None
        self.vlad = SoftVLAD(config.centers, shape.width) if aligned else None

    @property
    def new_parameters(self) -> tuple[str, ...]:
        names = ("positions", "transformer", "difference", "action", "vlad")
        parts = (getattr(self, name) for name in names)
        return tuple(rf"{name}\..*" for name, part in zip(names, parts, strict=True) if part is not None)

    @property
    def scores_pooled(self) -> bool:
        return self.vlad is None

    @property
    def sees_batch(self) -> str:
        return "method.mask_mode = 'official'" if self.config.mask_mode == "official" else ""

    @property
    def needs_words(self) -> bool:
        return self.vlad is not None

    def initialise_from_clip(self) -> None:
        """Copy blocks, positions and types of the heads from the text tower, M from the vision projection."""
        rows, blocks = self.text.position_embedding, list(self.text.blocks)
        copied = []
        if self.positions is not None:
            copied.append(self.positions.copy(rows))
        for transformer in (self.transformer, self.action, self.difference and self.difference.attention):
            if transformer is not None:
                copied.append(transformer.copy(blocks))
        if self.difference is not None:
            copied.append(self.difference.types.copy(rows))
            if self.difference.projection is not None:
                rows = self.vision.projection
                copied.append(rows is not None and _copy_rows(self.difference.projection, rows))
        if not all(copied):
            log.warning("clip2video: the text tower does not fit all heads; those start at random")

    def embed_text(self, pooled: Tensor, words: Tensor | None, mask: Tensor) -> Embedding:
        """Captions with their words aggregated around the centres as one unit token, n 1 d."""
        if self.vlad is None or words is None:
            return super().embed_text(pooled, None, mask)
        mask = mask.bool().clone()
        if self.architecture.captions.start_token:
            mask[:, 0] = False
        check_mask("words of caption", mask)
        return Embedding(pooled=pooled, tokens=self.vlad(words, mask)[:, None])

    def embed_video(self, frames: Tensor, mask: Tensor) -> Embedding:
        """Videos: the global feature, and frames aggregated around the centres as one unit token, b 1 d."""
        check_mask("video", mask, prefix=True)
        self._check_count(frames.shape[1])
        seen = frames if self.transformer is None else self.relate(frames, mask, self.transformer)
        return Embedding(
            pooled=unit_mean(seen, mask, impl=self.impl),
            tokens=None if self.vlad is None else self.vlad(*self.video_tokens(frames, mask))[:, None],
            frames=frames,
            frame_mask=mask,
        )

    def relate(self, frames: Tensor, mask: Tensor, transformer: Transformer) -> Tensor:
        """Frames plus the transformer's output at them; with a TDB it reads their differences too."""
        assert self.positions is not None
        positions, mode = self.positions(frames.shape[1]), self.config.mask_mode
        if self.difference is None or (transformer is self.action and self.config.center_proj == "TAB"):
            return frames + transformer(frames + positions, key_mask(mask, transformer.heads, mode))
        tokens, places, seen = self.difference(frames, mask, positions)
        return frames + transformer(tokens + places, key_mask(seen, transformer.heads, mode))[:, ::2]

    def video_tokens(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Frames, then every second frame enhanced by `relate`: b f+ceil(f/2) d, and their mask."""
        if self.action is None:
            return frames, mask
        even, even_mask = frames[:, ::2], mask[:, ::2]
        enhanced = self.relate(even, even_mask, self.action)
        return torch.cat([frames, enhanced], dim=1), torch.cat([mask, even_mask], dim=1)

    def similarity(self, text: Embedding, video: Embedding) -> Tensor:
        """Logits w S_glob + (1 - w) S_TAB, t v."""
        glob, aligned = self.similarities(text, video)
        if aligned is None:
            return glob
        return self.config.center_weight * glob + (1 - self.config.center_weight) * aligned

    def similarities(self, text: Embedding, video: Embedding) -> tuple[Tensor, Tensor | None]:
        """Logits S_glob and S_TAB, t v; both with the logit scale."""
        glob = super().similarity(text, video)
        if text.tokens is None or video.tokens is None:
            return glob, None
        return glob, self.logit_scale() * text.tokens[:, 0] @ video.tokens[:, 0].T

    @property
    def video_loss_weights(self) -> dict[str, float]:
        if self.vlad is None:
            return super().video_loss_weights
        return {"global": self.config.center_weight, "aligned": 1 - self.config.center_weight}

    def video_losses(
        self, text: Embedding, video: Embedding, ignore: Tensor | None, columns: ColumnShard | None = None
    ) -> VideoLosses:
        """w l(S_glob) + (1 - w) l(S_TAB)."""
        glob, aligned = self.similarities(text, video)
        if aligned is None:
            return super().video_losses(text, video, ignore, columns)
        w = self.config.center_weight
        logits = [excluded(part, ignore) for part in (glob, aligned)]
        terms = {
            name: contrastive_loss(part, columns)
            for name, part in zip(("global", "aligned"), logits, strict=True)
        }
        total = w * terms["global"] + (1 - w) * terms["aligned"]
        return VideoLosses(total=total, terms=terms, logits=excluded(w * glob + (1 - w) * aligned, ignore))

    def released_parameters(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return by_name(self, state, RELEASED, unused=r"frame2t_projection|frame2t_attention\..*")

    def _check_count(self, count: int) -> None:
        """Refuse fewer than two frames with a TDB, or fewer than three with one at half the rate."""
        if self.difference is None:
            return
        half_rate = self.action is not None and self.config.center_proj == "TAB_TDB"
        least, option = (3, "center_proj = 'TAB_TDB'") if half_rate else (2, "temporal_type = 'TDB'")
        if count < least:
            raise ValueError(f"frames: expected at least {least} with method.{option}, got {count}")


def interleave(frames: Tensor, between: Tensor) -> Tensor:
    """Alternate frames b n d with tokens b n-1 d between them: b 2n-1 d."""
    pairs = torch.stack([frames[:, :-1], between], dim=2).flatten(1, 2)  # b 2n-2 d
    return torch.cat([pairs, frames[:, -1:]], dim=1)


def key_mask(mask: Tensor, heads: int, mode: MaskMode) -> Tensor:
    """Visible keys: b n, or b h n with "official", in which heads have masks of other videos.

    Of B videos and H heads, the released code gives head h of video b the mask of video (b H + h) mod B.
    """
    if mode != "official":
        return mask
    rows = torch.arange(len(mask) * heads, device=mask.device) % len(mask)
    return mask[rows].unflatten(0, (len(mask), heads))


@torch.no_grad()
def _copy_rows(own: nn.Parameter, rows: Tensor) -> bool:
    """Copy the first of `rows` if they fit, else start at random; return True if they were copied."""
    fits = rows.shape[1] == own.shape[1] and len(rows) >= len(own)
    if fits:
        own.copy_(rows[: len(own)])
    else:
        nn.init.normal_(own, std=0.02)
    return fits
