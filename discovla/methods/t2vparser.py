"""T2VParser: captions and videos are parsed into views, which are matched row by row.

STAN, a branch beside the last vision blocks, relates the frames of a video.  Learned tokens, shared by both
sides, are decoded by a stack of each side into views of the words of a caption and of the frames of a video
(Adaptive Decomposition Tokens).  Words and views of a caption are compared with frames and views of a video;
a diversity loss separates the views of one input:

    loss = NCE + diversity Div

Source: T2VParser: Adaptive Decomposition Tokens for Partial Alignment in Text to Video Retrieval; details and
defaults as in its only released configuration (MSR-VTT, CLIP ViT-B/16).

Oddities of the release, off by default: padded words are visible and take part in the training similarity
(`padding = "official"`), pixels have ImageNet's statistics (`pixel_statistics = "imagenet"`), and the
gradient of the diversity loss grows with the number of processes (`diversity_ratio`).  Training and ranking
have different similarities, as released.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
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
from discovla.towers.vision import FrameTokens, Pixels

# as in the released configuration, whose last deviation has one digit more than usual
IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.3751 / 255)
# our names -> released names, for modules beside plain CLIP
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
    """Options of T2VParser."""

    name: Literal["t2vparser"] = "t2vparser"
    """The method."""
    similarity: Literal["pooled", "tokens"] = "tokens"
    """Always "tokens": views are compared row by row."""
    clip_lr_scale: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Learning rate of CLIP's own parameters, as a factor of that of new ones."""
    decay_biases: bool = False
    """Apply weight decay to biases and norms of the towers too; in new modules everything decays."""
    stan_layers: int = Field(default=4, ge=0)
    """Depth of STAN, the branch beside the last vision blocks; 0 for none."""
    views: int = Field(default=8, ge=2)
    """Q: number of decomposition tokens, and of views of each input."""
    decomposition_layers: int = Field(default=8, ge=1)
    """Depth of each decomposition stack."""
    decomposition_heads: int = Field(default=4, ge=1)
    """Attention heads of the decomposition stacks."""
    plus: bool = True
    """Add the unit global feature to each unit view."""
    concat: bool = False
    """Compare the global feature as a row beside the views."""
    concat_local: bool = True
    """Compare words and frames as rows beside the views."""
    padding: Padding = "masked"
    """Padding: "masked" words and frames take part in nothing; with "official" the text stack and the
    training similarity see padded words, and no frame counts as padding."""
    kappa: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    """kappa: sharpness of the softmaxes over rows in both similarities."""
    communication: bool = False
    """Let the matched rows of a pair attend to each other in the training similarity."""
    tau: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    """tau: temperature of the contrastive loss."""
    diversity: float = Field(default=0.08, ge=0, allow_inf_nan=False)
    """Weight of the diversity loss Div."""
    diversity_ratio: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor of the diversity loss in the optimised loss only.  The released code on W processes applies
    grad NCE / W + grad (diversity Div): that is `diversity_ratio = W` with `engine.grad_scale = "official"`
    on W processes; on fewer processes the gradient is W times as large."""
    pixel_statistics: Literal["clip", "imagenet"] = "clip"
    """Mean and deviation that pixels are normalised with; the release uses ImageNet's."""

    @field_validator("similarity")
    @classmethod
    def _views_are_tokens(cls, value: str, info: ValidationInfo) -> str:
        if value != "tokens":
            raise ValueError("expected 'tokens': views are compared row by row")
        return value

    @model_validator(mode="after")
    def _stan_reads_every_patch(self) -> T2VParserConfig:
        if self.stan_layers and self.merge != "none":
            raise ValueError(
                f"merge: expected method.stan_layers = 0 with {self.merge!r}, since STAN reads every patch, "
                f"found {self.stan_layers}"
            )
        return self


class T2VParser(Method):
    """T2VParser; see the module's docstring."""

    Config = T2VParserConfig
    config: T2VParserConfig

    def __init__(self, architecture: Architecture, config: T2VParserConfig) -> None:
        super().__init__(architecture, config)
        tower, width = architecture.vision, architecture.embed_dim
        if config.stan_layers > tower.layers:
            raise ValueError(
                f"method.stan_layers: expected at most {tower.layers} layers, found {config.stan_layers}"
            )
        frames = architecture.frames
        if config.stan_layers and not (
            frames.pool == "class" and frames.class_position and not frames.rotation
        ):
            raise ValueError(
                "method.stan_layers: expected 0 for a tower that is not read from a class row with a learned "
                f"position, or whose patches are rotated, found {config.stan_layers}"
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

    @property
    def sees_frame_order(self) -> bool:
        return self.stan is not None or super().sees_frame_order

    @property
    def frozen_frames(self) -> bool:
        """False with STAN, which trains."""
        return self.stan is None and super().frozen_frames

    @property
    def orderless_blocks(self) -> int:
        """0 with STAN, which reads the tokens of several blocks."""
        return 0 if self.stan is not None else super().orderless_blocks

    @property
    def frozen_blocks(self) -> int:
        """0 with STAN."""
        return 0 if self.stan is not None else super().frozen_blocks

    @property
    def reads_padding(self) -> bool:
        """True unless padding is masked."""
        return self.config.padding != "masked" or super().reads_padding

    def undecayed(self, name: str) -> bool:
        """True for norms and biases of the towers; everything in new modules decays, as released."""
        new = any(re.fullmatch(pattern, name) for pattern in self.new_parameters)
        return not new and not self.config.decay_biases and ("bias" in name or ".ln_" in name)

    def initialise_from_clip(self) -> None:
        """Copy the last blocks of the vision tower into STAN's spatial halves."""
        if self.stan is not None:
            self.stan.copy_trunk(list(self.vision.blocks))

    def seen(self, mask: Tensor) -> Tensor | None:
        """The mask n k, or None if padding counts as real."""
        return mask if self.config.padding == "masked" else None

    def pixels(self, frames: Tensor) -> Pixels:
        if self.config.pixel_statistics == "clip":
            return super().pixels(frames)
        return self.vision.pixels(frames, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=self.compute_dtype)

    def encode_frames(self, frames: Tensor | FrameTokens, mask: Tensor) -> Tensor:
        """Frame features b f d; the output of STAN is added to the class rows before projection."""
        if self.stan is None or isinstance(frames, FrameTokens):
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
                assert tower.class_embedding is not None, "checked for these towers"
                tables = tower.class_embedding, tower.position_embedding
                state = stan.start(trunk, *tables, self.seen(mask))
            else:
                state = stan.next_state(state, trunk, self.seen(mask))
            state = stan.layers[index - first](state, self.seen(mask))
        assert state is not None, "STAN has at least one layer"
        return widen(tower.project(x[:, 0].unflatten(0, group) + state.cls[:, None]))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Embedding:
        check_mask("caption", mask)
        pooled, words = self.text(ids, self.seen(mask), dtype=self.compute_dtype, words=True)
        return self.embed_text(widen(pooled), widen(words), on(ids.device, mask))

    def embed_text(self, pooled: Tensor, words: Tensor | None, mask: Tensor) -> Embedding:
        """Captions with words and views as tokens, n k d, and their mask, n k."""
        assert words is not None, "similarity = 'tokens' provides words"
        views = self.plus(self.decomposition.views_of_text(words, self.seen(mask)), pooled)
        return Embedding(
            pooled=pooled, tokens=self.rows(pooled, words, views), mask=self.row_mask(mask, views)
        )

    def embed_video(self, frames: Tensor, mask: Tensor) -> Embedding:
        """Videos with frames and views as tokens, n k d; pooled is the mean of the frames."""
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
        """Add the unit global feature to unit views, if `plus` is set."""
        return unit(views) + unit(pooled)[:, None] if self.config.plus else views

    def rows(self, pooled: Tensor, local: Tensor, views: Tensor) -> Tensor:
        """Rows to compare, n k d: global feature, words or frames, views."""
        parts = [(self.config.concat, pooled[:, None]), (self.config.concat_local, local), (True, views)]
        return cat([part for used, part in parts if used], dim=1)

    def row_mask(self, mask: Tensor, views: Tensor) -> Tensor:
        """Mask of `rows`, n k."""
        ones = mask.new_ones(views.shape[:2])
        parts = [(self.config.concat, ones[:, :1]), (self.config.concat_local, mask), (True, ones)]
        return cat([part for used, part in parts if used], dim=1)

    @property
    def token_op(self) -> str:
        return "token_communication" if self.config.communication else "token_training_similarity"

    def token_rows(self, words: int, frames: int) -> tuple[int, int]:
        config = self.config
        views = config.views + config.concat
        return views + words * config.concat_local, views + frames * config.concat_local

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

    @property
    def video_loss_weights(self) -> dict[str, float]:
        return {"nce": 1.0, "diversity": self.config.diversity_ratio * self.config.diversity}

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
        """Read a checkpoint of T2VParser, or the towers of one of Mug-STAN."""
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
        parameters = from_hugging_face(own, (*STAN_RULES, *HEAD_RULES), without_prefixes(state, anchors))
        if "decomposition.tokens" in parameters:  # released as 1 q d
            parameters["decomposition.tokens"] = parameters["decomposition.tokens"].flatten(0, 1)
        return parameters


def diversity(views: Tensor, n: int) -> Tensor:
    """Mean cosine of two different views of an input: sum_(i != j) v̂_i · v̂_j / (n q (q - 1)).

    Args:
        views: m q d, of some or all of the n inputs; the results of all parts sum to the mean.
    """
    q, views = views.shape[1], unit(views)
    return (views.sum(1).square().sum() - views.square().sum()) / (n * q * (q - 1))


def _inputs(text: Embedding, video: Embedding) -> TokenInputs:
    return TokenInputs(text=_tokens(text), video=_tokens(video), text_mask=text.mask, video_mask=video.mask)


def _tokens(embedding: Embedding) -> Tensor:
    assert embedding.tokens is not None, "embedded by this method"
    return embedding.tokens
