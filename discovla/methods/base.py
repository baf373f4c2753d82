"""Base class of all methods: two towers, an encoding of captions and videos, losses and a similarity."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.batch import Batch, Embedding, Losses
from discovla.methods.config import MethodConfig, TunedGroup
from discovla.nn.block import Attention, Block
from discovla.nn.features import check_mask, on, unit, widen
from discovla.nn.fusion import FusionAttention
from discovla.nn.logit_scale import LogitScale
from discovla.nn.lora import LoRA
from discovla.nn.temporal_heads import TemporalBasis
from discovla.nn.token_merging import TokenMerging
from discovla.ops.alignment_losses import AlignmentInputs, alignment_losses, frame_alignment
from discovla.ops.column_shard import ColumnShard
from discovla.ops.dispatch import Impl
from discovla.ops.info_nce import EXCLUDED, contrastive_loss, info_nce
from discovla.ops.sigmoid_loss import sigmoid_loss, sigmoid_loss_of_logits
from discovla.ops.token_similarity import TokenInputs, token_similarity
from discovla.ops.unit_mean import unit_mean
from discovla.towers.architecture import Architecture, TowerShape
from discovla.towers.pool import AttentionPool
from discovla.towers.text import TextTower
from discovla.towers.vision import FrameTokens, MakeBlock, Pixels, VisionTower
from discovla.towers.weights import clip_names, openai_weights

# CLIP's parameters before its first blocks, which `freeze_embeddings` keeps as they are
VISION_EMBEDDINGS = r"vision\.(\w+_embedding|patch_bias|stem\..*|ln_pre\..*)$"
EMBEDDINGS = VISION_EMBEDDINGS + r"|text\.(token_embedding\..*|\w+_embedding)$"

PAIRS = 8  # captions and videos whose matching scores are computed together
# options that older checkpoints do not store
ADDED_OPTIONS = (
    *("temporal", "temporal_terms", "reversed_negatives", "reversed_when", "swapped_captions"),
    *("merge", "merging"),
    *("loss", "frozen_vision_blocks"),
)


@dataclass(frozen=True, kw_only=True)
class VideoLosses:
    """Loss of matching pairs without frame-level alignment.

    total: scalar to minimise.  terms: its unweighted parts.  logits: n n (or n v), scores of all pairs with
    ignored ones masked, the student of a distillation; None if that is the pooled cosine.
    """

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor | None = None


class Method(nn.Module):
    """A video-text retrieval method on a CLIP; by itself it pools the frames of a video by their mean.

    A subclass overrides what differs: `embed_text` and `embed_video` turn tower features into embeddings,
    `similarity` scores them, `video_losses` trains them.  The towers compute in `compute_dtype`; features
    are float32 at least.
    """

    Config: ClassVar[type[MethodConfig]]

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
        self._check_towers()
        self.vision = VisionTower(architecture, vision_block or self._blocks("vision"))
        self.vision.merging = self._token_merging()
        fuses = config.fused_vision_blocks and config.fused_pool != "none"
        if fuses and isinstance(self.vision.pool, AttentionPool):
            own_query = config.fused_pool == "own_query"
            self.vision.pool.fuse(config.lora_rank, own_query=own_query, positions=config.frame_position)
        self.text = TextTower(architecture, text_block or self._blocks("text"))
        self.logit_scale = LogitScale(bias=architecture.logit_bias)
        basis = config.temporal == "basis"
        self.temporal = TemporalBasis(architecture.embed_dim, config.temporal_terms) if basis else None
        self.compute_dtype = torch.float32
        self.needs_frame_captions = config.alpha > 0 or config.beta > 0

    def _check_towers(self) -> None:
        """Refuse options that the towers do not allow."""
        frames, fused = self.architecture.frames, self.config.fused_vision_blocks
        if fused and frames.pool in ("mean", "latent"):
            raise ValueError(
                f"method.fused_vision_blocks: expected 0 for a tower with pool {frames.pool!r}, found {fused}"
            )
        if fused > 1 and not frames.class_row:
            raise ValueError(
                "method.fused_vision_blocks: expected 0, or 1 for the pool of a tower without a class row, "
                f"found {fused}"
            )
        pool = self.config.fused_pool
        if pool != "own_query" and not (fused and frames.pool == "attention"):
            raise ValueError(
                "method.fused_pool: expected 'own_query', the default, where no attention pool fuses, found "
                f"{pool!r}"
            )
        if pool == "none" and not frames.class_row:
            raise ValueError(
                "method.fused_pool: expected 'own_query' or 'shared_query' for a tower without a class row, "
                "which only its pool fuses, found 'none'"
            )
        free = self.architecture.vision.layers - (fused if frames.class_row else 0)
        if self.config.frozen_vision_blocks > max(free, 0):
            raise ValueError(
                f"method.frozen_vision_blocks: expected at most the {free} blocks before fusion, found "
                f"{self.config.frozen_vision_blocks}"
            )
        merge = self.config.merge
        if merge != "none" and frames.rotation is not None:
            raise ValueError(
                "method.merge: expected 'none' for a tower with rotary positions, which a merged token has "
                f"not, found {merge!r}"
            )
        if merge == "tempme" and frames.pool != "class":
            raise ValueError(
                "method.merge: expected 'none' or 'tome' for a tower that is read from no class row, found "
                "'tempme'"
            )
        if self.config.loss == "sigmoid" and not self.architecture.logit_bias:
            raise ValueError(
                "method.loss: expected 'softmax' for towers without a logit bias, found 'sigmoid'"
            )

    def _token_merging(self) -> TokenMerging | None:
        """Return what merges the tokens of the vision tower, if any does."""
        form, shape = self.architecture.frames, self.architecture.vision
        if self.config.merge == "none":
            return None
        return TokenMerging(
            self.config.merge,
            self.config.merging,
            tokens=form.class_row + self.architecture.patches,
            width=shape.width,
            blocks=shape.layers,
            class_rows=int(form.class_row),
            pools=form.pool != "class",
        )

    def merge_untrained(self, config: MethodConfig) -> None:
        """Merge tokens from now on, by a config that differs from the own one in how tokens merge alone.

        Raises:
            ValueError: the merging has parameters, which would be untrained, or the towers do not allow it.
        """
        if config.merge == "tempme":
            raise ValueError("method.merge: expected 'tome', which needs no training, found 'tempme'")
        self.config = config
        self._check_towers()
        self.vision.merging = self._token_merging()

    def check_loss(self) -> None:
        """Refuse the sigmoid loss for scores that are not the cosine of pooled features.

        Raises:
            ValueError: the method has other scores.
        """
        if self.config.loss == "sigmoid" and not self.scores_pooled:
            raise ValueError(
                f"method.loss: expected 'softmax' with the scores of {self.config.name}, found 'sigmoid'"
            )

    def _blocks(self, side: Literal["vision", "text"]) -> MakeBlock:
        """Return the function that makes a tower's blocks: with LoRA if configured, the last with fusion."""
        tower: TowerShape = getattr(self.architecture, side)
        fused: int = getattr(self.config, f"fused_{side}_blocks")
        if side == "vision" and not self.architecture.frames.class_row:
            fused = 0  # its pool fuses
        if fused > tower.layers:
            raise ValueError(
                f"method.fused_{side}_blocks: expected at most {tower.layers} fused blocks, found {fused}"
            )
        shape, config = tower.block(self.architecture.activation), self.config

        def make(layer: int) -> Block:
            if layer >= tower.layers - fused:
                positions = config.frame_position and side == "vision"
                attention = FusionAttention(shape, config.lora_rank, positions=positions)
            else:
                attention = Attention(shape)
            if config.tune == "lora" and not (side == "vision" and layer < config.frozen_vision_blocks):
                attention.lora = LoRA(shape.width, 3 * shape.width, config.lora_rank)
            return Block(shape, attention)

        return make

    @property
    def trained(self) -> tuple[str, ...]:
        """Regular expressions; a parameter trains if one of them matches its whole name."""
        config = self.config
        logits = r"logit_scale\.(log|bias)" if config.loss == "sigmoid" else r"logit_scale\.log"
        full = (r"(vision|text)\..*", *([logits] if self.uses_logit_scale else []))
        if config.freeze_embeddings:
            full = (f"(?!{EMBEDDINGS}).*", *full[1:])
        if config.frozen_vision_blocks:
            blocks = "|".join(map(str, range(config.frozen_vision_blocks)))
            full = (rf"(?!{VISION_EMBEDDINGS}|vision\.blocks\.({blocks})\.){full[0]}", *full[1:])
        text = f"(?!{EMBEDDINGS})text\\..*" if config.freeze_embeddings else r"text\..*"
        lora = r".*\.attention\.lora\..*"
        towers = {"full": full, "text": (text,), "lora": (lora,), "frozen": ()}[config.tune]
        fuses = config.fused_vision_blocks or config.fused_text_blocks
        fusion = (r".*\.(attention|pool)\.(query_)?adapter\..*",) if fuses else ()
        position = (r".*\.(attention|pool)\.frame_position",) if config.frame_position else ()
        joins = self.vision.merging is not None and len(self.vision.merging.positions) > 0
        merging = (r"vision\.merging\..*",) if joins else ()
        temporal = () if self.temporal is None else (r"temporal\..*",)
        return (*towers, *fusion, *position, *merging, *temporal, *self.new_parameters)

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Regular expressions on the names of parameters that a method adds to CLIP; these always train."""
        return ()

    @property
    def uses_logit_scale(self) -> bool:
        """True if the losses depend on `logit_scale`; it then trains with the towers."""
        return True

    @property
    def video_loss_weights(self) -> dict[str, float]:
        """Weights of the terms of `video_losses`."""
        return {"video": 1.0}

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights by which the terms of `losses` make up the total, those above 0."""
        config = self.config
        weights = self.video_loss_weights | {
            "frame": config.alpha,
            "distill": config.beta,
            "reversed": config.reversed_negatives,
            "swapped": config.swapped_captions,
        }
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def scores_pooled(self) -> bool:
        """True if `similarity` is the scaled cosine of the pooled features."""
        return self.config.similarity == "pooled"

    @property
    def scores_pairs(self) -> bool:
        """True if `similarity` runs a network on every pair, which is too slow for many videos."""
        return False

    @property
    def token_op(self) -> str | None:
        """The op by which the losses compare the rows of captions with those of videos; None for none."""
        return "token_similarity" if self.config.similarity == "tokens" else None

    def token_rows(self, words: int, frames: int) -> tuple[int, int]:
        """Numbers of rows of a caption and of a video that `token_op` compares."""
        return words, frames

    @property
    def impl(self) -> Impl:
        """Implementation of pooling and losses: the kernels if they compute the blocks of both towers."""
        return "triton" if self.vision.impl == self.text.impl == "triton" else "auto"

    @property
    def sees_batch(self) -> str:
        """The option that makes embeddings depend on the rest of the batch; empty for none."""
        return ""

    @property
    def needs_words(self) -> bool:
        """True if `embed_text` needs a feature of every word."""
        return self.config.similarity == "tokens"

    @property
    def needs_order_words(self) -> bool:
        """True if the losses need captions with exchanges, or to know which captions tell order."""
        words = self.config.reversed_negatives and self.config.reversed_when == "order_words"
        return bool(words or self.config.swapped_captions)

    @property
    def sees_frame_order(self) -> bool:
        """True if the features that `encode_frames` gives of a clip depend on the order of its frames."""
        return self.config.frame_position or self.config.merge == "tempme"

    @property
    def orderless_blocks(self) -> int:
        """Number of the vision tower's first blocks in which no frame sees another; not the last block."""
        if self.vision.merging is not None:
            return 0
        fused = self.config.fused_vision_blocks if self.architecture.frames.class_row else 0
        return len(self.vision.blocks) - max(1, fused)

    @property
    def frozen_frames(self) -> bool:
        """True if nothing that trains changes what `encode_frames` gives."""
        return not any(p.requires_grad for p in self.vision.parameters())

    @property
    def frozen_blocks(self) -> int:
        """Number of the vision tower's first blocks whose tokens nothing that trains changes.

        At most all blocks but the last, which computes only the rows that are read.  0 where tokens merge.
        """
        if self.vision.merging is not None:
            return 0
        trained = [name for name, p in self.vision.named_parameters() if p.requires_grad]
        if any(re.match(VISION_EMBEDDINGS, f"vision.{name}") for name in trained):
            return 0
        blocks = [int(name.split(".")[1]) for name in trained if name.startswith("blocks.")]
        return min([*blocks, len(self.vision.blocks) - 1])

    @property
    def reads_padding(self) -> bool:
        """True if losses depend on the black frames that follow those of a short clip."""
        fuses = self.config.fused_vision_blocks > 0
        return not self.config.mask_padded_frames and (fuses or self.needs_frame_captions)

    def initialise_from_clip(self) -> None:
        """Copy parameters from CLIP into new modules; called after CLIP's weights are loaded."""

    def encode(self, batch: Batch) -> tuple[Embedding, Embedding]:
        """Encode the captions and videos of a training batch."""
        return self.encode_texts(batch), self.encode_videos(batch)

    def encode_texts(self, batch: Batch) -> Embedding:
        """Encode the captions of a training batch, with frame captions and exchanges if needed."""
        text = replace(self._encode_captions(batch), tells_order=batch.tells_order)
        return self._with_exchanged(text, batch) if self.config.swapped_captions else text

    def _with_exchanged(self, text: Embedding, batch: Batch) -> Embedding:
        """Add exchanged captions; rows without an exchange are not encoded, except one if no row has any."""
        ids, mask, has_false = batch.false_text_ids, batch.false_text_mask, batch.has_false_text
        assert ids is not None and mask is not None and has_false is not None, "read with exchanges"
        rows = has_false.cpu().nonzero()[:, 0]
        if not len(rows):
            rows = torch.zeros(1, dtype=torch.long)
        on_device = rows.to(ids.device, non_blocking=True)
        exchanged = self.encode_text(ids[on_device], mask[rows.to(mask.device)])
        placed = {
            name: getattr(text, name).index_copy(0, on_device, x) for name, x in exchanged.tensors().items()
        }
        text = text.with_false(Embedding(**placed))
        return replace(text, has_false=has_false.to(ids.device, non_blocking=True))

    def _encode_captions(self, batch: Batch) -> Embedding:
        """Encode the captions of a training batch, with features of the frame captions if needed."""
        ids, mask = batch.text_ids, batch.text_mask
        if not self.needs_frame_captions:
            return self.encode_text(ids, mask)
        if self.needs_words:
            text, frames = self.encode_text(ids, mask), self.encode_frame_captions(batch)
        else:
            check_mask("caption", mask)
            pooled, frames = self.text.encode_with_groups(
                (ids, mask), batch.frame_captions(), self.compute_dtype
            )
            text = self.embed_text(pooled, None, mask)
        frame_mask = on(frames.device, batch.frame_mask) if self.config.mask_padded_frames else None
        return replace(text, frames=frames, frame_mask=frame_mask)

    def encode_videos(self, batch: Batch) -> Embedding:
        """Encode the videos of a training batch, and the reversed videos if needed.

        Reversed videos are encoded again from the first block that sees the order of frames.
        """
        check_mask("video", batch.frame_mask)
        pixels, mask = batch.frames, on(batch.frames.device, batch.frame_mask)
        cached, source = pixels.dim() == 3, pixels
        again = bool(self.config.reversed_negatives) and self.sees_frame_order and not cached
        if again and pixels.dim() == 5 and (count := self.orderless_blocks):
            source = FrameTokens(rows=self.vision.first_blocks(self.pixels(pixels), count), blocks=count)
        if self.needs_frame_captions and self.pool_fuses and not cached:
            frames, own = self._encode_unfused(source, mask)
            video = replace(self.embed_frames(frames, mask), frames=own)
        else:
            frames = pixels if cached else self.encode_frames(source, mask)
            video = self.embed_frames(frames, mask)
        if not self.config.reversed_negatives:
            return video
        if not again:
            backwards = reverse_frames(frames, mask)
        elif isinstance(source, FrameTokens):
            backwards = self.encode_frames(replace(source, rows=reverse_frames(source.rows, mask)), mask)
        else:
            backwards = self.encode_frames(reverse_frames(pixels, mask), mask)
        return video.with_false(self.embed_frames(backwards, mask))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Embedding:
        """Encode captions: ids n l, int64, and mask n l, bool; a mask on the CPU avoids a sync."""
        check_mask("caption", mask)
        if not self.needs_words:
            return self.embed_text(widen(self.text(ids, mask, dtype=self.compute_dtype)), None, mask)
        pooled, words = self.text(ids, mask, dtype=self.compute_dtype, words=True)
        return self.embed_text(widen(pooled), widen(words), on(ids.device, mask))

    def encode_video(self, frames: Tensor, mask: Tensor) -> Embedding:
        """Encode videos: frames b f y x c uint8, or b f c y x normalised, and mask b f, bool."""
        check_mask("video", mask)
        mask = on(frames.device, mask)
        return self.embed_frames(self.encode_frames(frames, mask), mask)

    def embed_frames(self, frames: Tensor, mask: Tensor) -> Embedding:
        """Embed videos from frame features, b f d, and mask b f, with `temporal` applied.

        `Embedding.frames`, which alignment compares, are the features without it.
        """
        if self.temporal is None:
            return self.embed_video(frames, mask)
        return replace(self.embed_video(self.temporal(frames, mask), mask), frames=frames)

    def encode_frames(self, frames: Tensor | FrameTokens, mask: Tensor) -> Tensor:
        """Features of frames, b f d; arguments as in `encode_video`, or tokens of `encode_tokens`."""
        visible = mask if self.config.mask_padded_frames else None
        return widen(self.vision(self._tower_input(frames), visible))

    def encode_tokens(self, frames: Tensor) -> Tensor:
        """Tokens of frames after `frozen_blocks`, b f l w; frames as in `encode_video`."""
        return self.vision.first_blocks(self.pixels(frames), self.frozen_blocks)

    def _tower_input(self, frames: Tensor | FrameTokens) -> Pixels | FrameTokens:
        """Pixels, or tokens; those of `encode_tokens`, b f l w, in the dtype of the residual stream."""
        if isinstance(frames, FrameTokens):
            return frames
        if frames.dim() != 4:
            return self.pixels(frames)
        wide = cast(Block, self.vision.blocks[-1]).ln_1.compute_dtype is not None
        rows = frames if wide else frames.to(self.compute_dtype)
        return FrameTokens(rows=rows, blocks=self.frozen_blocks)

    @property
    def pool_fuses(self) -> bool:
        """True if the pool of the vision tower reads all frames of a video."""
        return isinstance(self.vision.pool, AttentionPool) and self.vision.pool.adapter is not None

    def _encode_unfused(self, frames: Tensor | FrameTokens, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`encode_frames`, and the features of each frame by itself, which alignment compares."""
        visible = mask if self.config.mask_padded_frames else None
        fused, own = self.vision.with_unfused(self._tower_input(frames), visible)
        return widen(fused), widen(own)

    def encode_frame_captions(self, batch: Batch) -> Tensor:
        """Features of the frame captions, b f d, fused over the captions of each sample."""
        ids, mask = batch.frame_captions()
        b, f = ids.shape[:2]
        features = self.text(ids.flatten(0, 1), mask.flatten(0, 1), group=f, dtype=self.compute_dtype)
        return widen(features).unflatten(0, (b, f))

    def embed_text(self, pooled: Tensor, words: Tensor | None, mask: Tensor) -> Embedding:
        """Make embeddings of captions from their features n d, those of their words n l d, and mask n l."""
        return Embedding(pooled=pooled, tokens=words, mask=None if words is None else mask)

    def embed_video(self, frames: Tensor, mask: Tensor) -> Embedding:
        """Make embeddings of videos from the features of their frames b f d and mask b f."""
        return self.pool(frames, frames, mask)

    def pool(self, related: Tensor, frames: Tensor, mask: Tensor) -> Embedding:
        """Pool videos by the mean of unit features of their real frames.

        Args:
            related: b f d, features to pool, after frames are related to each other.
            frames: b f d, features of each frame by itself, for frame-level alignment.
            mask: b f, bool.
        """
        tokens = related if self.config.similarity == "tokens" else None
        return Embedding(
            pooled=unit_mean(related, mask, impl=self.impl),
            tokens=tokens,
            mask=None if tokens is None else mask,
            frames=frames,
            frame_mask=mask,
        )

    def similarity(self, text: Embedding, video: Embedding) -> Tensor:
        """Logits t v: s times the cosine of the pooled features, or the token similarity."""
        if self.config.similarity == "pooled":
            return self.logit_scale() * unit(text.pooled) @ unit(video.pooled).T
        assert text.tokens is not None and video.tokens is not None, "embedded with similarity = 'tokens'"
        inputs = TokenInputs(text=text.tokens, video=video.tokens, text_mask=text.mask, video_mask=video.mask)
        return self.logit_scale() * token_similarity(inputs)

    def losses(
        self,
        text: Embedding,
        video: Embedding,
        *,
        same_video: Tensor | None = None,
        columns: ColumnShard | None = None,
    ) -> Losses:
        """`video_losses` of n matching pairs, plus alpha l_frm + beta l_dis, plus `order_losses`.

        Args:
            text: n captions.
            video: n clips; row i matches row i of text.
            same_video: n n, bool, true for two samples of one clip.
            columns: this process's shard of the similarity's columns; video is then v, same_video n v.
        """
        losses = self._matching_losses(text, video, same_video, columns)
        order = self.order_losses(text, video, columns)
        weights = {"reversed": self.config.reversed_negatives, "swapped": self.config.swapped_captions}
        total = losses.total
        for name, term in order.items():
            total = total + weights[name] * term
        return Losses(total=total, terms=losses.terms | _detached(order))

    def order_losses(
        self, text: Embedding, video: Embedding, columns: ColumnShard | None = None
    ) -> dict[str, Tensor]:
        """Unweighted losses that teach order, of n matching pairs or of `columns`.

        reversed: sum over the captions that count of softplus(s(caption, reverse) - s(caption, clip)) / n.
        swapped: the same of softplus(s(exchanged caption, clip) - s(caption, clip)).
        Memory and work grow with n, not with its square.
        """
        config = self.config
        if not (config.reversed_negatives or config.swapped_captions):
            return {}
        first, count = 0 if columns is None else columns.first_text, len(text)
        own = text[first : first + len(video)]
        most = len(video)
        if columns is not None and not self.scores_pooled:
            most = int(columns.all_reduce_max(torch.tensor(most)))
        true, sums = self.pair_scores(own, video, most), {}
        if config.reversed_negatives:
            wrong = F.softplus(self.pair_scores(own, video.false, most) - true)
            if config.reversed_when == "order_words":
                assert own.tells_order is not None, "read with order words"
                wrong = wrong * own.tells_order
            sums["reversed"] = wrong.sum()
        if config.swapped_captions:
            assert own.has_false is not None, "encoded with exchanges"
            wrong = F.softplus(self.pair_scores(own.false, video, most) - true)
            sums["swapped"] = (wrong * own.has_false).sum()
        if columns is not None:
            sums = dict(zip(sums, columns.all_reduce(*sums.values()), strict=True))
        return {name: x / count for name, x in sums.items()}

    def pair_scores(self, text: Embedding, video: Embedding, most: int | None = None) -> Tensor:
        """Logits n of caption i with video i: the diagonal of `similarity`, in blocks of at most PAIRS rows.

        Args:
            most: pairs of the process that has the most, which decides the number of blocks: ZeRO's stage 3
                gathers the logit scale for each, also for empty ones.  None: these alone.
        """
        if self.scores_pooled:
            return self.logit_scale() * (unit(text.pooled) * unit(video.pooled)).sum(-1)
        blocks = [slice(i, i + PAIRS) for i in range(0, max(len(text), most or 1), PAIRS)]
        return torch.cat([self.similarity(text[rows], video[rows]).diagonal() for rows in blocks])

    def _matching_losses(
        self, text: Embedding, video: Embedding, same_video: Tensor | None, columns: ColumnShard | None
    ) -> Losses:
        """The losses of `losses` without those that teach order."""
        ignore = None
        if self.config.exclude_same_video and same_video is not None:
            ignore = same_video.clone()
            ignore.diagonal(0 if columns is None else -columns.first_text).fill_(False)
        inputs = self._alignment_inputs(text, video, columns)
        if inputs is None:
            own = self.video_losses(text, video, ignore, columns)
            return Losses(total=own.total, terms=_detached(own.terms))
        config, scale = self.config, self.logit_scale()
        options = {"kl_norm": config.kl_norm, "detach_teacher": config.detach_teacher, "ignore": ignore}
        if self.scores_pooled and config.loss == "softmax":
            options |= {"alpha": config.alpha, "beta": config.beta, "impl": self.impl}
            loss = alignment_losses(inputs, scale, **options)
            terms = {"video": loss.video, "frame": loss.frame, "distill": loss.distill}
            return Losses(total=loss.total, terms=_detached(terms))
        own = self.video_losses(text, video, ignore, columns)
        assert own.logits is not None, "a method that does not score pooled features returns logits"
        frame, distill = frame_alignment(own.logits, inputs, scale, **options)
        total = own.total + config.alpha * frame + config.beta * distill
        return Losses(total=total, terms=_detached({**own.terms, "frame": frame, "distill": distill}))

    def video_losses(
        self, text: Embedding, video: Embedding, ignore: Tensor | None, columns: ColumnShard | None = None
    ) -> VideoLosses:
        """Loss of n pairs, or of this process's `columns`, without frame-level alignment.

        Args:
            ignore: n n (or n v), bool, pairs left out of every softmax.
        """
        if self.config.loss == "sigmoid":
            bias = self.logit_scale.bias
            assert bias is not None, "checked for these towers"
            if not self.needs_frame_captions:
                scalars = self.logit_scale(), bias
                loss = sigmoid_loss(text.pooled, video.pooled, *scalars, ignore=ignore, columns=columns)
                return VideoLosses(total=loss, terms={"video": loss})
            logits = self.logit_scale() * unit(text.pooled) @ unit(video.pooled).T
            loss = sigmoid_loss_of_logits(logits, bias, ignore, columns)
            return VideoLosses(total=loss, terms={"video": loss}, logits=excluded(logits, ignore))
        if self.scores_pooled:
            pooled = (text.pooled, video.pooled, self.logit_scale())
            loss = info_nce(*pooled, ignore=ignore, columns=columns)
            return VideoLosses(total=loss, terms={"video": loss})
        logits = excluded(self.similarity(text, video), ignore)
        loss = contrastive_loss(logits, columns)
        return VideoLosses(total=loss, terms={"video": loss}, logits=logits)

    def _alignment_inputs(
        self, text: Embedding, video: Embedding, columns: ColumnShard | None
    ) -> AlignmentInputs | None:
        """Inputs of frame-level alignment; None if a side has no features of frames."""
        if text.frames is None or video.frames is None:
            return None
        mask = video.frame_mask if self.config.mask_padded_frames else None
        return AlignmentInputs(
            text=text.pooled,
            video=video.pooled,
            text_frames=text.frames,
            video_frames=video.frames,
            text_mask=mask if text.frame_mask is None else text.frame_mask,
            video_mask=mask,
            columns=columns,
            group=self.config.frame_group,
        )

    def pixels(self, frames: Tensor) -> Pixels:
        """Normalise frames for the vision tower, in the compute dtype."""
        return self.vision.pixels(frames, dtype=self.compute_dtype)

    def freeze(self) -> None:
        """Freeze all parameters but those that `trained` declares.

        Raises:
            ValueError: an expression of `trained` matches no parameter.
        """
        patterns = dict.fromkeys(self.trained, 0)
        for name, parameter in self.named_parameters():
            matches = [pattern for pattern in patterns if re.fullmatch(pattern, name)]
            parameter.requires_grad_(bool(matches))
            for pattern in matches:
                patterns[pattern] += 1
        if unmatched := [pattern for pattern, count in patterns.items() if not count]:
            raise ValueError(f"{self.config.name}: {unmatched[0]!r} matches no parameter to train")

    def undecayed(self, name: str) -> bool:
        """True if a trained parameter has no weight decay."""
        return "bias" in name and not self.config.decay_biases

    def parameter_groups(self) -> tuple[TunedGroup, ...]:
        """Trained parameters with a learning rate or weight decay of their own; call after `freeze`."""
        clip, config = set(clip_names(self.architecture)), self.config
        members: dict[tuple[bool, bool], list[str]] = {}
        for name in self.trained_state():
            key = (name in clip and config.clip_lr_scale != 1, self.undecayed(name))
            members.setdefault(key, []).append(name)
        return tuple(
            TunedGroup(
                names=tuple(names),
                lr_scale=config.clip_lr_scale if slow else 1.0,
                weight_decay=0.0 if undecayed else None,
            )
            for (slow, undecayed), names in members.items()
            if slow or undecayed
        )

    def released_parameters(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a checkpoint of the paper's own code to our parameters by our names.

        Raises:
            ValueError: the checkpoint does not fit, or the method has no released checkpoints.
        """
        raise ValueError(f"{self.config.name}: expected a method with released checkpoints")

    def trained_state(self) -> dict[str, Tensor]:
        """Trained parameters by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy parameters that `trained_state` returned, strictly.

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
        """Weights of the CLIP inside, by OpenAI's names, with LoRA merged; heads and fusion are left out."""
        updates = {
            f"{name}.qkv.weight": module.lora.delta().detach()
            for name, module in self.named_modules()
            if isinstance(module, Attention) and isinstance(module.lora, LoRA)
        }
        return openai_weights(self, self.architecture, updates)

    def fingerprint(self) -> dict[str, Any]:
        """Sizes, options and a checksum of frozen weights; a checkpoint of other values is refused."""
        frozen = 0
        stored = {n: x for n, x in self.vision.named_buffers() if ".running_" in n}  # of a stem
        for _, tensor in sorted([*self.named_parameters(), *stored.items()]):
            if not tensor.requires_grad:
                frozen = zlib.crc32(tensor.detach().cpu().contiguous().numpy().data, frozen)
        options = self.config.model_dump(mode="json", exclude={"released"})
        for name in ADDED_OPTIONS:
            if getattr(self.config, name) == MethodConfig.model_fields[name].default:
                del options[name]
        return {
            "architecture": self.architecture.to_dict(),
            "method": options,
            "frozen": frozen,
        }


def reverse_frames(frames: Tensor, mask: Tensor) -> Tensor:
    """Frames b f ... with the real ones, where mask b f is true, in reverse order; the others stay."""
    count = mask.sum(1, keepdim=True)
    real = (
        (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    )  # places of the real frames, then of the others
    rank = mask.cumsum(1) - 1
    source = real.gather(1, (count - 1 - rank).clamp(min=0))
    places = torch.where(mask, source, torch.arange(mask.shape[1], device=mask.device))
    return frames[torch.arange(len(frames), device=frames.device)[:, None], places]


def excluded(logits: Tensor, ignore: Tensor | None) -> Tensor:
    """Mask the logits of pairs to ignore, n n."""
    return logits if ignore is None else logits.masked_fill(ignore, EXCLUDED)


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}
