"""T2VParser: captions and videos are parsed into views, which are matched row by row.

STAN lets the frames meet beside the last vision blocks.  A set of learned tokens, shared by both sides, is
decoded by a stack of each side into views of a caption's words and of a video's frames.  Words and views of
one side are compared with frames and views of the other; the views of one input are pushed apart.

Source: T2VParser: Adaptive Decomposition Tokens for Partial Alignment in Text to Video Retrieval; details and
defaults as in its only released configuration (MSR-VTT, CLIP ViT-B/16).  Three of its oddities are off by
default and on with `padding = "official"`, `pixel_statistics = "imagenet"` and `diversity_ratio`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, cat

from discovla.batch import Embedding
from discovla.methods.base import Method, VideoLosses, excluded
from discovla.methods.config import MethodConfig
from discovla.nn.decomposition import Decomposition, FeedForward
from discovla.nn.features import check_mask, masked_mean, on, unit, widen
from discovla.nn.stan import STAN, StanState
from discovla.ops.column_shard import ColumnShard
from discovla.ops.info_nce import contrastive_loss
from discovla.ops.token_similarity import Padding, TokenInputs, token_similarity, token_training_similarity
from discovla.towers.architecture import Architecture
from discovla.towers.hugging_face import from_hugging_face, without_prefixes
from discovla.towers.vision import Pixels

# ImageNet's, as the released configuration has them (its last deviation has one digit more than usual)
IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.3751 / 255)
# our names -> the release's, of what is not plain CLIP
STAN_RULES = (
    (r"^stan\.time_embedding$", "STAN_time_embed.weight"),
    (r"^stan\.layers\.(\d+)\.spatial\.", r"STAN_S_layers.\1."),
    (r"^stan\.layers\.(\d+)\.temporal\.qkv\.", r"STAN_T_layers.\1.self_attn.qkv_proj."),
    (r"^stan\.layers\.(\d+)\.temporal\.out\.", r"STAN_T_layers.\1.self_attn.out_proj."),
    (r"^stan\.layers\.(\d+)\.temporal_norm\.", r"STAN_T_layers.\1.layer_norm1."),
    (r"^stan\.layers\.(\d+)\.temporal_fc\.", r"STAN_T_layers.\1.temporal_fc."),
)
HEAD_RULES = (
    (r"^video_mlp\.up\.", "video_mlp.net.0."),
    (r"^video_mlp\.down\.", "video_mlp.net.3."),
    (r"^decomposition\.tokens$", "multiview_dis.query_tokens"),
    (r"^decomposition\.text\.", "multiview_dis.textBlock."),
    (r"^decomposition\.video\.", "multiview_dis.visionBlock."),
    (r"Block\.layers\.(\d+)\.itself\.", r"Block.self_attn_layers.\1."),
    (r"Block\.layers\.(\d+)\.memory\.", r"Block.cross_attn_layers.\1."),
    (r"Block\.layers\.(\d+)\.ffn\.up\.", r"Block.ffn_layers.\1.net.0."),
    (r"Block\.layers\.(\d+)\.ffn\.down\.", r"Block.ffn_layers.\1.net.3."),
    (r"attn_layers\.(\d+)\.qkv\.", r"attn_layers.\1.in_proj_"),
    (r"attn_layers\.(\d+)\.out\.", r"attn_layers.\1.out_proj."),
)


class T2VParserConfig(MethodConfig):
    """Options of T2VParser.

    stan_layers: depth of STAN; 0 leaves it out.
    views: how many tokens are decoded.  decomposition_layers, decomposition_heads: of each stack.
    plus: add the unit global feature to each unit view.
    concat, concat_local: rows that are compared beside the views: the global feature; words and frames.
    padding: "masked" keeps padded words and frames out of everything; "official" lets padded words be seen
        by the text stack and take part in the training similarity, and knows no padded frames.
    kappa: sharpness of the similarity's softmaxes.
    communication: of the training similarity.
    tau: temperature of the contrastive loss.
    diversity: weight of the diversity loss.
    diversity_ratio: how many times more it weighs in what is optimised.  The released code with W processes
        applies grad NCE / W + grad (diversity Div): exactly that are `diversity_ratio = W` and
        `engine.grad_scale = "official"` on W processes; on fewer, a gradient W times as large.
    pixel_statistics: CLIP's, or ImageNet's as released.
    """

    name: Literal["t2vparser"] = "t2vparser"
    similarity: Literal["pooled", "tokens"] = "tokens"
    clip_lr_scale: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    decay_biases: bool = False
    stan_layers: int = Field(default=4, ge=0)
    views: int = Field(default=8, ge=2)
    decomposition_layers: int = Field(default=8, ge=1)
    decomposition_heads: int = Field(default=4, ge=1)
    plus: bool = True
    concat: bool = False
    concat_local: bool = True
    padding: Padding = "masked"
    kappa: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    communication: bool = False
    tau: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    diversity: float = Field(default=0.08, ge=0, allow_inf_nan=False)
    diversity_ratio: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    pixel_statistics: Literal["clip", "imagenet"] = "clip"

    @field_validator("similarity")
    @classmethod
    def _views_are_tokens(cls, value: str, info: ValidationInfo) -> str:
        if value != "tokens":
            raise ValueError("expected 'tokens': views are compared row by row")
        return value


class T2VParser(Method):
    """The method; see the module's docstring."""

    Config = T2VParserConfig
    config: T2VParserConfig

    def __init__(self, architecture: Architecture, config: T2VParserConfig) -> None:
        super().__init__(architecture, config)
        tower, width = architecture.vision, architecture.embed_dim
        if config.stan_layers > tower.layers:
            raise ValueError(
                f"method.stan_layers: expected at most {tower.layers} layers, found {config.stan_layers}"
            )
        self.video_mlp = FeedForward(width)
        self.decomposition = Decomposition(
            width, config.views, config.decomposition_layers, config.decomposition_heads
        )
        self.stan = (
            STAN(tower.block(architecture.activation), config.stan_layers) if config.stan_layers else None
        )

    @property
    def new_parameters(self) -> tuple[str, ...]:
        stan = () if self.stan is None else (r"stan\..*",)
        return (*stan, r"decomposition\..*", r"video_mlp\..*")

    @property
    def uses_logit_scale(self) -> bool:
        return self.needs_frame_captions

    def undecayed(self, name: str) -> bool:
        """Norms and biases of the towers; in what is new everything decays, as released."""
        new = any(re.fullmatch(pattern, name) for pattern in self.new_parameters)
        return not new and not self.config.decay_biases and ("bias" in name or ".ln_" in name)

    def initialise_from_clip(self) -> None:
        """STAN's spatial halves from the last blocks of the trunk."""
        if self.stan is not None:
            self.stan.copy_trunk(list(self.vision.blocks))

    def seen(self, mask: Tensor) -> Tensor | None:
        """A mask of what is real, n k, or None where padding counts as real."""
        return mask if self.config.padding == "masked" else None

    def pixels(self, frames: Tensor) -> Pixels:
        if self.config.pixel_statistics == "clip":
            return super().pixels(frames)
        return self.vision.pixels(frames, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=self.compute_dtype)

    def encode_frames(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Features of frames, b f d, with what STAN read of the whole video added before projection."""
        if self.stan is None:
            return super().encode_frames(frames, mask)
        tower, stan, group = self.vision, self.stan, frames.shape[:2]
        x = tower.embed(self.pixels(frames).flatten(0, 1))  # (b f) 1+p w
        layout = tower.layout(x, group[1], mask if self.config.mask_padded_frames else None)
        first = len(tower.blocks) - len(stan.layers)
        state: StanState | None = None
        for index, block in enumerate(tower.blocks):
            x = block(x, layout)
            if index < first:
                continue
            trunk = x.unflatten(0, group)
            if state is None:
                tables = tower.class_embedding, tower.position_embedding
                state = stan.start(trunk, *tables, self.seen(mask))
            else:
                state = stan.go_on(state, trunk, self.seen(mask))
            state = stan.layers[index - first](state, self.seen(mask))
        assert state is not None, "STAN has a layer, and the trunk as many"
        return widen(tower.project(x[:, 0].unflatten(0, group) + state.cls[:, None]))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Embedding:
        check_mask("caption", mask)
        pooled, words = self.text(ids, self.seen(mask), dtype=self.compute_dtype, words=True)
        return self.embed_text(widen(pooled), widen(words), on(ids.device, mask))

    def embed_text(self, pooled: Tensor, words: Tensor | None, mask: Tensor) -> Embedding:
        """tokens: words and views of captions, n k d; mask: n k."""
        assert words is not None, "similarity = 'tokens' gives every word"
        views = self.plus(self.decomposition.views_of_text(words, self.seen(mask)), pooled)
        return Embedding(
            pooled=pooled, tokens=self.rows(pooled, words, views), mask=self.row_mask(mask, views)
        )

    def embed_video(self, frames: Tensor, mask: Tensor) -> Embedding:
        """tokens: frames and views of videos, n k d; pooled: mean of the frames."""
        seen = self.seen(mask)
        pooled = frames.mean(1) if seen is None else masked_mean(frames, seen)
        views = self.plus(self.decomposition.views_of_video(self.video_mlp(frames), seen), pooled)
        return Embedding(
            pooled=pooled,
            tokens=self.rows(pooled, frames, views),
            mask=None if seen is None else self.row_mask(seen, views),
            frames=frames,
            frame_mask=mask,
        )

    def plus(self, views: Tensor, pooled: Tensor) -> Tensor:
        """Unit views plus the unit global feature."""
        return unit(views) + unit(pooled)[:, None] if self.config.plus else views

    def rows(self, pooled: Tensor, local: Tensor, views: Tensor) -> Tensor:
        """The rows that are compared, n k d: global, local, views."""
        parts = [(self.config.concat, pooled[:, None]), (self.config.concat_local, local), (True, views)]
        return cat([part for used, part in parts if used], dim=1)

    def row_mask(self, mask: Tensor, views: Tensor) -> Tensor:
        """Which of `rows` are real, n k."""
        ones = mask.new_ones(views.shape[:2])
        parts = [(self.config.concat, ones[:, :1]), (self.config.concat_local, mask), (True, ones)]
        return cat([part for used, part in parts if used], dim=1)

    def similarity(self, text: Embedding, video: Embedding) -> Tensor:
        """Logits t v for ranking: matches from both sides, over tau."""
        return token_similarity(_inputs(text, video), kappa=self.config.kappa) / self.config.tau

    def training_logits(self, text: Embedding, video: Embedding) -> Tensor:
        """Logits t v of the contrastive loss: combinations of rows, over tau."""
        config = self.config
        scores = token_training_similarity(
            _inputs(text, video),
            kappa=config.kappa,
            padding=config.padding,
            communication=config.communication,
        )
        return scores / config.tau

    def video_losses(
        self, text: Embedding, video: Embedding, ignore: Tensor | None, columns: ColumnShard | None = None
    ) -> VideoLosses:
        """NCE + diversity Div; NCE is the sum of both directions, Div the mean of both sides."""
        config = self.config
        logits = excluded(self.training_logits(text, video), ignore)
        nce = 2 * contrastive_loss(logits, columns)
        own = text if columns is None else text[columns.first_text :][: len(video)]
        views = [_tokens(side)[:, -config.views :] for side in (own, video)]
        div = (diversity(views[0], len(text)) + diversity(views[1], len(text))) / 2
        if columns is not None:
            (div,) = columns.all_reduce(div)
        total = nce + config.diversity_ratio * config.diversity * div
        return VideoLosses(total=total, terms={"nce": nce, "diversity": div}, logits=logits)

    def released_parameters(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From a checkpoint of T2VParser, or of Mug-STAN, whose towers alone are then taken."""
        if self.stan is None:
            raise ValueError("method.stan_layers: expected the STAN of a released checkpoint, found 0 layers")
        anchors = ["STAN_time_embed.weight", "text_model.embeddings.token_embedding.weight"]
        parts = r"(vision|text|stan)\..*"
        if any("multiview_dis." in name or "video_mlp." in name for name in state):
            anchors += ["multiview_dis.query_tokens", "video_mlp.net.0.weight"]
            parts = r"(vision|text|stan|decomposition|video_mlp)\..*"
        own = {
            name: p
            for name, p in self.named_parameters()
            if re.fullmatch(parts, name) and not re.search(r"\.(lora|adapter|frame_position)\b", name)
        }
        found = from_hugging_face(own, (*STAN_RULES, *HEAD_RULES), without_prefixes(state, anchors))
        tokens = found.get("decomposition.tokens")
        return found if tokens is None else {**found, "decomposition.tokens": tokens.flatten(0, 1)}


def diversity(views: Tensor, n: int) -> Tensor:
    """Share in the mean cosine of two views of one of n inputs: sum_(i != j) v̂_i · v̂_j / (n q (q - 1)).

    views: of some or all of the inputs, m q d.
    """
    q, views = views.shape[1], unit(views)
    return (views.sum(1).square().sum() - views.square().sum()) / (n * q * (q - 1))


def _inputs(text: Embedding, video: Embedding) -> TokenInputs:
    return TokenInputs(text=_tokens(text), video=_tokens(video), text_mask=text.mask, video_mask=video.mask)


def _tokens(embedding: Embedding) -> Tensor:
    assert embedding.tokens is not None, "embedded by this method"
    return embedding.tokens
