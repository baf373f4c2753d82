"""Sizes of a CLIP, from open_clip's name, its config or a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from discovla.nn.block import BlockShape
from discovla.ops.mlp import Activation


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """Sizes of one transformer: width, number of layers, heads, width of the MLP."""

    width: int
    layers: int
    heads: int
    mlp_width: int

    def block(self, activation: Activation) -> BlockShape:
        """Shape of its blocks."""
        return BlockShape(width=self.width, heads=self.heads, mlp_width=self.mlp_width, activation=activation)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A dual-tower CLIP with a plain vision transformer.

    embed_dim: joint width d.  image_size, patch_size: pixels.  context_length: text positions.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    context_length: int
    vocab_size: int
    activation: Activation
    vision: TowerShape
    text: TowerShape

    @property
    def patches(self) -> int:
        """Number of patches of an image, without the class token."""
        return (self.image_size // self.patch_size) ** 2

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
        """Convert to plain values, for a checkpoint or a file."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Architecture:
        """The inverse of `to_dict`."""
        towers = {side: TowerShape(**values[side]) for side in ("vision", "text")}
        return Architecture(**{**values, **towers})


# keys of a plain CLIP ViT in open_clip's model configs; any other key means another architecture
VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
PLAIN_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}


def architecture_from_config(name: str, config: Mapping[str, Any]) -> Architecture:
    """Read sizes from an open_clip model config.

    Args:
        name: of the model, for messages.
        config: as in open_clip's model_configs/*.json.

    Raises:
        ValueError: the config describes something other than a plain CLIP ViT; the offending key is named.
    """
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ValueError(
            f"{name}: expected vision_cfg and text_cfg, found {', '.join(map(str, config)) or 'nothing'}"
        )
    other = {
        *(set(config) - PLAIN_KEYS),
        *(f"vision_cfg.{k}" for k in set(vision) - VISION_KEYS),
        *(f"text_cfg.{k}" for k in set(text) - TEXT_KEYS),
    }
    if other or not isinstance(vision.get("layers"), int):
        keys = ", ".join(sorted(other)) or f"vision_cfg.layers={vision.get('layers')}"
        raise ValueError(f"{name}: expected a plain CLIP ViT, found {keys}")
    required = ("embed_dim", "vision_cfg.image_size", "vision_cfg.width", "vision_cfg.patch_size")
    required += ("text_cfg.width", "text_cfg.layers", "text_cfg.heads")
    given = {**config, **{f"vision_cfg.{k}": v for k, v in vision.items()}}
    given |= {f"text_cfg.{k}": v for k, v in text.items()}
    for key in required:
        if type(given.get(key)) is not int or given[key] < 1:
            raise ValueError(f"{name}: {key}: expected a whole number above 0, found {given.get(key)!r}")
    width = vision["width"]
    return Architecture(
        embed_dim=config["embed_dim"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        context_length=text.get("context_length", 77),
        vocab_size=text.get("vocab_size", 49408),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        vision=TowerShape(
            width=width,
            layers=vision["layers"],
            heads=width // vision.get("head_width", 64),
            mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
        ),
        text=TowerShape(
            width=text["width"],
            layers=text["layers"],
            heads=text["heads"],
            mlp_width=int(text["width"] * text.get("mlp_ratio", 4.0)),
        ),
    )


def config_from_architecture(architecture: Architecture) -> dict[str, Any]:
    """The inverse of `architecture_from_config`."""
    vision, text = architecture.vision, architecture.text
    return {
        "embed_dim": architecture.embed_dim,
        "quick_gelu": architecture.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": architecture.image_size,
            "patch_size": architecture.patch_size,
            "width": vision.width,
            "layers": vision.layers,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": vision.mlp_width / vision.width,
        },
        "text_cfg": {
            "context_length": architecture.context_length,
            "vocab_size": architecture.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_width / text.width,
        },
    }


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
