"""Description of two towers: their sizes, and what is around their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

from torch import Tensor

from discovla.nn.block import BlockShape
from discovla.nn.layers import BlockActivation
from discovla.nn.rotation import Rotation
from discovla.ops.mlp import Activation
from discovla.ops.preprocess_frames import CLIP_MEAN, CLIP_STD

Pool = Literal["class", "mean", "attention", "latent"]
Readout = Literal["largest", "end", "last", "first", "class"]
Resize = Literal["shortest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """Sizes of one transformer: width, number of layers, heads, width of the MLP.

    activation: of its MLPs; None for the architecture's.
    eps, key_bias, inner_norm, layer_scale: as in `BlockShape`; eps holds for the norms around the blocks too.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: BlockActivation | None = None
    eps: float = 1e-5
    key_bias: bool = True
    inner_norm: bool = False
    layer_scale: bool = False

    def block(self, activation: BlockActivation) -> BlockShape:
        """Shape of its blocks; `activation` is that of the architecture."""
        return BlockShape(
            width=self.width,
            heads=self.heads,
            mlp_width=self.mlp_width,
            activation=self.activation or activation,
            eps=self.eps,
            key_bias=self.key_bias,
            inner_norm=self.inner_norm,
            layer_scale=self.layer_scale,
        )


@dataclass(frozen=True, kw_only=True)
class FrameTokens:
    """Parts of a vision tower around its blocks; the defaults are CLIP's.

    class_row: a learned row comes before the patches.
    class_position: the table of positions has a row for the class row.
    rotation: rotary embedding of the patches beside the table.
    norm_before: a layer norm before the blocks.
    patch_bias: the patch embedding has a bias.
    stem: three convolutions instead of one linear patch embedding (MobileCLIP).
    pool: what the feature of a frame is made of: the "class" row, the "mean" of the patches, "attention" of a
        learned query over all rows and an MLP (SigLIP's MAP), or "latent" (CoCa): attention of the first of
        many queries over normed rows, in the width of the features.
    pool_heads, pool_mlp_width: of the pools with attention.
    projection, projection_bias: the last linear map to the joint space, and its bias.
    names: library that names the weights.
    """

    class_row: bool = True
    class_position: bool = True
    rotation: Rotation | None = None
    norm_before: bool = True
    patch_bias: bool = False
    stem: bool = False
    pool: Pool = "class"
    pool_heads: int = 0
    pool_mlp_width: int = 0
    projection: bool = True
    projection_bias: bool = False
    names: Literal["open_clip", "timm"] = "open_clip"


@dataclass(frozen=True, kw_only=True)
class CaptionTokens:
    """Parts of a text tower around its blocks; the defaults are CLIP's.

    causal: a token sees itself and earlier ones only.
    readout: the token whose row is the caption's feature: the "largest" id, the first token with `end_id`
        ("end"), the "last" or "first" of the context, or a "class" token after it (CoCa).
    padding_id: id of padding, which "class" hides.
    projection, projection_bias: the last linear map to the joint space, and its bias.
    tokenizer: as in `data.tokens`.
    start_token: captions begin with a token that is no word.
    """

    causal: bool = True
    readout: Readout = "largest"
    end_id: int = 2
    padding_id: int = 0
    projection: bool = True
    projection_bias: bool = False
    tokenizer: str = "clip"
    start_token: bool = True

    @property
    def reads_padding(self) -> bool:
        """True if the feature depends on padding, so that it has to be computed in the whole context."""
        return not self.causal or self.readout not in ("largest", "end")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Frames as the tower was trained with them.

    mean, std: of each channel of pixels in [0, 1].
    resize: "shortest" resizes the short side and cuts out the middle square, "squash" changes the aspect.
    interpolation: of the resize.
    """

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Two transformers that map frames and captions to one space.

    embed_dim: joint width d.  image_size, patch_size: pixels.  context_length: text positions.
    activation: of the MLPs of both towers, unless a tower names its own.
    frames, captions: what is around the blocks.  preprocessing: of frames.
    logit_bias: True if the model was trained with the sigmoid loss, whose logits have a bias.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    context_length: int
    vocab_size: int
    activation: Activation
    vision: TowerShape
    text: TowerShape
    frames: FrameTokens = FrameTokens()
    captions: CaptionTokens = CaptionTokens()
    preprocessing: Preprocessing = Preprocessing()
    logit_bias: bool = False

    @property
    def side(self) -> int:
        """Number of patches of a side of an image; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Number of patches of an image, without the class token."""
        return self.side**2

    @property
    def plain(self) -> bool:
        """True for OpenAI's CLIP: no field but the sizes and the activation differs from its default."""
        tower = {"width", "layers", "heads", "mlp_width"}
        own = self.to_dict()
        extra = {"frames", "captions", "logit_bias"} & set(own)
        return not extra and set(own["vision"]) <= tower and set(own["text"]) <= tower

    def joint_block(self) -> BlockShape:
        """Shape of blocks of heads on joint features: the text tower's, at the joint width.

        Raises:
            ValueError: the joint width does not divide into the text tower's number of heads.
        """
        return BlockShape(
            width=self.embed_dim,
            heads=self.text.heads,
            mlp_width=self.text.mlp_width * self.embed_dim // self.text.width,
            activation="quick_gelu",
            eps=1e-12,
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, for a checkpoint or a file; fields at their defaults are left out."""
        return _plain_values(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Architecture:
        """The inverse of `to_dict`."""
        parts = {
            "vision": TowerShape,
            "text": TowerShape,
            "frames": FrameTokens,
            "captions": CaptionTokens,
            "preprocessing": Preprocessing,
        }
        read: dict[str, Any] = dict(values)
        for name, part in parts.items():
            if name in read:
                read[name] = part(**{key: _tuple(value) for key, value in read[name].items()})
        rotation = read["frames"].rotation if "frames" in read else None
        if isinstance(rotation, Mapping):
            read["frames"] = replace(read["frames"], rotation=Rotation(**rotation))
        return Architecture(**read)


def _plain_values(value: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults, as JSON has them."""
    plain = {}
    for field in fields(value):
        own = getattr(value, field.name)
        if own == field.default:
            continue
        plain[field.name] = _plain_values(own) if is_dataclass(own) else own
        if isinstance(own, tuple):
            plain[field.name] = list(own)
    return plain


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def architecture_from_state_dict(state: Mapping[str, Tensor], activation: Activation) -> Architecture:
    """Read sizes from OpenAI-named weights, with heads of width 64, which no shape shows.

    Raises:
        ValueError: a weight that fixes a size is missing, or a width is not a multiple of 64.
    """
    needed = (
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.proj",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "positional_embedding",
        "token_embedding.weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    )
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"expected the weights of a CLIP ViT, found no {missing[0]!r}")
    patch = state["visual.conv1.weight"].shape[-1]
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    return Architecture(
        embed_dim=state["visual.proj"].shape[1],
        image_size=grid * patch,
        patch_size=patch,
        context_length=len(state["positional_embedding"]),
        vocab_size=len(state["token_embedding.weight"]),
        activation=activation,
        vision=_tower_from_state_dict(state, "visual.transformer.resblocks."),
        text=_tower_from_state_dict(state, "transformer.resblocks."),
    )


def _tower_from_state_dict(state: Mapping[str, Tensor], prefix: str) -> TowerShape:
    mlp_width, width = state[f"{prefix}0.mlp.c_fc.weight"].shape
    if width % 64:
        raise ValueError(
            f"{prefix}: width {width} is no multiple of 64, so the heads cannot be guessed; name the model"
        )
    layers = len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
    return TowerShape(width=width, layers=layers, heads=width // 64, mlp_width=mlp_width)
