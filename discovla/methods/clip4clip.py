"""CLIP4Clip: a fully fine-tuned CLIP with one of four heads over the features of frames.

Three loose heads end in the mean of unit frame features and a cosine: meanP takes the frames as they are,
seqLSTM and seqTransf add the output of an LSTM or a transformer over all frames to each of them.  tightTransf
has no cosine and no logit scale: a transformer reads a caption and the frames of a video as one sequence and
returns their score.  The loss is the symmetric cross-entropy over the batch.

Source: CLIP4Clip: An Empirical Study of CLIP for End to End Video Clip Retrieval (arXiv 2104.08860); details
and defaults as in its code (June 2022).

Differences from the release: on several processes every head has the negatives of the whole batch, which the
released tightTransf has not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from discovla.batch import Embedding
from discovla.methods.base import Method, VideoLosses, excluded
from discovla.methods.config import MethodConfig
from discovla.methods.released import by_name
from discovla.nn.features import check_mask
from discovla.nn.temporal_heads import LSTM, PairScorer, Table, Transformer
from discovla.ops.column_shard import ColumnShard
from discovla.ops.info_nce import contrastive_loss
from discovla.ops.unit_mean import unit_mean
from discovla.towers.architecture import Architecture

log = logging.getLogger(__name__)

HIDDEN = 1 << 25  # elements of the MLP's hidden rows in one block of pairs: 128 MB in float32
RELEASED = (
    ("positions.", "frame_position_embeddings."),
    ("transformer.", "transformerClip."),
    ("lstm.", "lstm_visual."),
    ("scorer.positions.", "cross.embeddings.position_embeddings."),
    ("scorer.transformer.", "cross.transformer."),
    ("scorer.norm.", "cross.pooler.ln_pool."),
    ("scorer.dense.", "cross.pooler.dense."),
    ("scorer.score.", "similarity_dense."),
)


class CLIP4ClipConfig(MethodConfig):
    """Options of CLIP4Clip."""

    name: Literal["clip4clip"] = "clip4clip"
    """The method."""
    head: Literal["meanP", "seqLSTM", "seqTransf", "tightTransf"] = "meanP"
    """Similarity calculator of the paper: mean pooling, sequential LSTM, sequential transformer, or tight
    transformer."""
    head_layers: int = Field(default=4, ge=1)
    """Number of blocks of seqTransf and tightTransf."""
    freeze_embeddings: bool = True
    """Keep CLIP's embeddings, positions and the vision tower's first norm as they are, as released."""
    clip_lr_scale: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Learning rate of CLIP's own parameters, as a factor of the head's (`coef_lr` of the release)."""
    decay_biases: bool = False
    """Apply weight decay to biases too; the release does not."""

    @field_validator("head")
    @classmethod
    def _tight_head_scores_pairs(cls, value: str, info: ValidationInfo) -> str:
        if value == "tightTransf" and info.data.get("similarity") == "tokens":
            raise ValueError("expected method.similarity = 'pooled': this head scores pairs by itself")
        return value


class CLIP4Clip(Method):
    """CLIP4Clip; see the module's docstring."""

    Config = CLIP4ClipConfig
    config: CLIP4ClipConfig

    def __init__(self, architecture: Architecture, config: CLIP4ClipConfig) -> None:
        super().__init__(architecture, config)
        rows, layers = architecture.context_length, config.head_layers
        match config.head:
            case "seqLSTM":
                self.lstm = LSTM(architecture.embed_dim)
            case "seqTransf":
                self.positions = Table(rows, architecture.embed_dim)
                self.transformer = Transformer(architecture.joint_block(), layers)
            case "tightTransf":
                self.scorer = PairScorer(architecture.joint_block(), layers, rows)

    @property
    def new_parameters(self) -> tuple[str, ...]:
        return {
            "meanP": (),
            "seqLSTM": (r"lstm\..*",),
            "seqTransf": (r"positions\..*", r"transformer\..*"),
            "tightTransf": (r"scorer\..*",),
        }[self.config.head]

    @property
    def uses_logit_scale(self) -> bool:
        return not self.scores_pairs or self.needs_frame_captions

    @property
    def scores_pairs(self) -> bool:
        """True for the head tightTransf."""
        return self.config.head == "tightTransf"

    @property
    def scores_pooled(self) -> bool:
        return super().scores_pooled and not self.scores_pairs

    def initialise_from_clip(self) -> None:
        """Copy blocks and positions of the head from the text tower's first ones."""
        match self.config.head:
            case "seqTransf":
                positions, transformer = self.positions, self.transformer
            case "tightTransf":
                positions, transformer = self.scorer.positions, self.scorer.transformer
            case _:
                return
        copied = positions.copy(self.text.position_embedding), transformer.copy(list(self.text.blocks))
        if not all(copied):
            log.warning("clip4clip: the text tower does not fit the whole head; the rest starts at random")

    def embed_video(self, frames: Tensor, mask: Tensor) -> Embedding:
        """Apply the head to frame features, b f d; for tightTransf the tokens are the frames themselves."""
        match self.config.head:
            case "seqLSTM":  # the state of a real frame does not depend on later padding
                check_mask("video", mask, prefix=True)
                return self.pool(frames + self.lstm(frames), frames, mask)
            case "seqTransf":
                placed = frames + self.positions(frames.shape[1])
                return self.pool(frames + self.transformer(placed, mask), frames, mask)
            case "tightTransf":
                pooled = unit_mean(frames, mask, impl=self.impl)
                return Embedding(pooled=pooled, tokens=frames, mask=mask, frames=frames, frame_mask=mask)
        return super().embed_video(frames, mask)

    def similarity(self, text: Embedding, video: Embedding) -> Tensor:
        """Logits t v; tightTransf computes them in blocks of pairs, which backward recomputes."""
        return self._scores(text, video, len(video)) if self.scores_pairs else super().similarity(text, video)

    def pair_scores(self, text: Embedding, video: Embedding, most: int | None = None) -> Tensor:
        """See `Method`; tightTransf reads just the matching pairs."""
        if not self.scores_pairs:
            return super().pair_scores(text, video, most)
        assert video.tokens is not None and video.mask is not None, "embedded by this head"
        return self.scorer(text.pooled, video.tokens, video.mask)

    def video_losses(
        self, text: Embedding, video: Embedding, ignore: Tensor | None, columns: ColumnShard | None = None
    ) -> VideoLosses:
        if not self.scores_pairs or columns is None:
            return super().video_losses(text, video, ignore, columns)
        most = int(columns.all_reduce_max(torch.tensor(len(video))))
        logits = excluded(self._scores(text, video, most), ignore)
        loss = contrastive_loss(logits, columns)
        return VideoLosses(total=loss, terms={"video": loss}, logits=logits)

    def _scores(self, text: Embedding, video: Embedding, most: int) -> Tensor:
        """Logits t v of tightTransf, in as many blocks as the process with the `most` videos needs.

        All processes need the same number: ZeRO's stage 3 gathers the scorer's parameters for each block.
        """
        frames, mask = video.tokens, video.mask
        assert frames is not None and mask is not None, "embedded by this head"
        t, v = len(text), len(video)
        size = max(1, HIDDEN // ((frames.shape[1] + 1) * self.architecture.joint_block().mlp_width))

        def score(pairs: Tensor) -> Tensor:
            return self.scorer(text.pooled[pairs // v], frames[pairs % v], mask[pairs % v])

        blocks = torch.arange(t * v, device=frames.device).tensor_split(max(1, -(-t * most // size)))
        if len(blocks) > 1 and torch.is_grad_enabled():
            scores = [checkpoint(score, pairs, use_reentrant=False) for pairs in blocks]
        else:
            scores = [score(pairs) for pairs in blocks]
        return torch.cat(scores).view(t, v)

    def released_parameters(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # the released seqLSTM has a table of positions that it does not use
        unused = r"frame_position_embeddings\.weight" if self.config.head == "seqLSTM" else "(?!)"
        return by_name(self, state, RELEASED, unused)
