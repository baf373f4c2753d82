"""Architectures from open_clip's model configs, and the reason why a config is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from discovla.nn.rotation import Rotation
from discovla.towers.architecture import Architecture, CaptionTokens, FrameTokens, Readout, TowerShape

# keys of open_clip's model configs that are read; any other key means another architecture
CONFIG_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_bias"}
VISION_KEYS = {
    *("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"),
    *("ls_init_value", "no_ln_pre", "pool_type", "final_ln_after_pool", "output_tokens"),
    *("attentional_pool", "attn_pooler_heads"),
}
TRUNK_KEYS = {
    *("image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj"),
    *("timm_drop", "timm_drop_path"),  # of training, and zero here
}
TEXT_KEYS = {
    *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
    *("hf_tokenizer_name", "tokenizer_kwargs", "pool_type", "eos_id", "no_causal_mask", "embed_cls"),
    *("proj_bias", "proj_type", "norm_kwargs", "act_kwargs", "output_tokens"),
}
# open_clip's names of tokenizers -> ours
TOKENIZERS = {
    r"timm/ViT-B-16-SigLIP": "siglip",
    r"timm/ViT-B-16-SigLIP-i18n-256": "siglip-i18n",
    r"timm/ViT-.*-SigLIP2(-\d+)?": "gemma",
    r"facebook/xlm-v-base": "xlm-v",
    r"google/mt5-base": "mt5",
    r"bert-base-uncased": "bert",
}
NO_START = {"siglip", "siglip-i18n", "gemma", "mt5"}  # their captions begin with a word
SIGLIP = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
SIGLIP_SIZES = {  # width, layers, heads, mlp_ratio
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "giantopt": (1536, 40, 16, 4.0),
}
# SigLIP towers whose GELU is the approximation by tanh
SIGLIP_TANH = re.compile(
    r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_.*|vit_large_patch16_siglip_512"
)
PE = re.compile(r"vit_pe_core_(tiny|small|base|large|gigantic)_patch(\d+)_(\d+)")
PE_SIZES = {  # width, layers, heads, width of the MLP, side of the grid
    "tiny": (192, 12, 3, 768, 24),
    "small": (384, 12, 6, 1536, 24),
    "base": (768, 12, 12, 3072, 14),
    "large": (1024, 24, 16, 4096, 24),
    "gigantic": (1536, 50, 16, 8960, 32),
}
EVA02 = re.compile(r"eva02_(base|large)_patch(\d+)_clip_(\d+)")
EVA02_SIZES = {"base": (768, 12, 12), "large": (1024, 24, 16)}  # width, layers, heads
CONVOLUTIONAL = {  # beginning of a timm name -> kind of tower
    "fastvit_": "FastViT, a convolutional tower",
    "convnext_": "ConvNeXt, a convolutional tower",
    "vitamin_": "ViTamin, whose first stages are convolutions",
    "swin_": "Swin, whose attention is within windows",
    "eva02_enormous": "EVA02-E, which norms after attention and MLP",
    "vit_relpos": "a ViT with relative positions",
    "vit_medium_patch16_gap": "a ViT that was only trained on ImageNet",
}
Values = Mapping[str, Any]
Trunk = tuple[TowerShape, FrameTokens, int]  # blocks, what is around them, size of a patch


def architecture_from_config(name: str, config: Values) -> Architecture:
    """Read an architecture from an open_clip model config.

    Args:
        name: of the model, for messages.
        config: as in open_clip's model_configs/*.json.

    Raises:
        ValueError: the config describes towers that are not taken; the offending key is named.
    """
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ValueError(
            f"{name}: expected vision_cfg and text_cfg, found {', '.join(map(str, config)) or 'nothing'}"
        )
    if "hf_model_name" in text:
        raise ValueError(
            f"{name}: expected a text tower of open_clip, found Hugging Face's {text['hf_model_name']}"
        )
    _check_keys(name, config, vision, text)
    _check_sizes(name, config, vision, text)
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    read = _timm_trunk if "timm_model_name" in vision else _open_clip_trunk
    shape, frames, patch_size = read(name, vision)
    return Architecture(
        embed_dim=config["embed_dim"],
        image_size=vision["image_size"],
        patch_size=patch_size,
        context_length=text.get("context_length", 77),
        vocab_size=text.get("vocab_size", 49408),
        activation=activation,
        vision=shape,
        text=TowerShape(
            width=text["width"],
            layers=text["layers"],
            heads=text["heads"],
            mlp_width=int(text["width"] * text.get("mlp_ratio", 4.0)),
            activation="gelu_tanh" if (text.get("act_kwargs") or {}).get("approximate") == "tanh" else None,
            eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
        ),
        frames=frames,
        captions=_captions(name, text),
        logit_bias=config.get("init_logit_bias") is not None,
    )


def _check_keys(name: str, config: Values, vision: Values, text: Values) -> None:
    """Refuse keys that are not read, and the layers of a ResNet."""
    timm = "timm_model_name" in vision
    top = CONFIG_KEYS | ({"multimodal_cfg"} if text.get("embed_cls") else set())  # CoCa's captioner
    other = {
        *(set(config) - top),
        *(f"vision_cfg.{k}" for k in set(vision) - (TRUNK_KEYS if timm else VISION_KEYS)),
        *(f"text_cfg.{k}" for k in set(text) - TEXT_KEYS),
    }
    if other or not (timm or isinstance(vision.get("layers"), int)):
        keys = ", ".join(sorted(other)) or f"vision_cfg.layers={vision.get('layers')}, a ResNet"
        raise ValueError(f"{name}: expected a vision transformer, found {keys}")


def _check_sizes(name: str, config: Values, vision: Values, text: Values) -> None:
    """Refuse sizes that are missing or are no whole numbers."""
    required = ["embed_dim", "vision_cfg.image_size", "text_cfg.width", "text_cfg.layers", "text_cfg.heads"]
    if "timm_model_name" not in vision:
        required[2:2] = ["vision_cfg.width", "vision_cfg.patch_size"]
    given = {**config, **{f"vision_cfg.{k}": v for k, v in vision.items()}}
    given |= {f"text_cfg.{k}": v for k, v in text.items()}
    for key in required:
        if type(given.get(key)) is not int or given[key] < 1:
            raise ValueError(f"{name}: {key}: expected a whole number above 0, found {given.get(key)!r}")


def _open_clip_trunk(name: str, vision: Values) -> Trunk:
    """Read the vision tower that open_clip itself defines."""
    width = vision["width"]
    shape = TowerShape(
        width=width,
        layers=vision["layers"],
        heads=width // vision.get("head_width", 64),
        mlp_width=int(width * vision.get("mlp_ratio", 4.0)),
        layer_scale=vision.get("ls_init_value") is not None,
    )
    mean = vision.get("pool_type", "tok") == "avg"
    if mean != bool(vision.get("final_ln_after_pool")) or vision.get("pool_type") not in (None, "tok", "avg"):
        raise ValueError(
            f"{name}: expected pool_type avg with final_ln_after_pool, or neither, "
            f"found {vision.get('pool_type')!r} and {vision.get('final_ln_after_pool')!r}"
        )
    latent = vision.get("attentional_pool", False)
    if isinstance(latent, str):
        raise ValueError(f"{name}: vision_cfg.attentional_pool: expected true or false, found {latent!r}")
    frames = FrameTokens(
        norm_before=not vision.get("no_ln_pre", False),
        pool="latent" if latent else "mean" if mean else "class",
        pool_heads=vision.get("attn_pooler_heads", 8) if latent else 0,
    )
    return shape, frames, vision["patch_size"]


def _timm_trunk(name: str, vision: Values) -> Trunk:
    """Read a vision tower that open_clip takes from timm; sizes as in timm 1.0.31."""
    model, pool, projection = str(vision["timm_model_name"]), vision.get("timm_pool"), vision.get("timm_proj")
    if match := SIGLIP.fullmatch(model):
        trunk, expected = (
            _siglip(*match.groups()[:2], tanh=bool(SIGLIP_TANH.fullmatch(model))),
            ("map", "none"),
        )
    elif match := PE.fullmatch(model):
        trunk, expected = _pe_core(*match.groups()[:2]), ("map", None)
    elif match := EVA02.fullmatch(model):
        trunk, expected = _eva02(*match.groups()[:2]), ("token", None)
    elif model == "eva_giant_patch14_224":
        shape = TowerShape(width=1408, layers=40, heads=16, mlp_width=6144, eps=1e-6, key_bias=False)
        frames = FrameTokens(norm_before=False, patch_bias=True, projection_bias=True, names="timm")
        trunk, expected = (shape, frames, 14), ("token", None)
    elif model == "vit_base_mci_224":
        shape = TowerShape(width=768, layers=12, heads=12, mlp_width=3072, eps=1e-6)
        frames = FrameTokens(
            norm_before=False, class_position=False, stem=True, projection_bias=True, names="timm"
        )
        trunk, expected = (shape, frames, 16), ("token", None)
    elif model == "vit_large_patch14_clip_224":
        shape = TowerShape(width=1024, layers=24, heads=16, mlp_width=4096)
        trunk, expected = (shape, FrameTokens(projection_bias=True, names="timm"), 14), ("token", None)
    else:
        kinds = (kind for start, kind in CONVOLUTIONAL.items() if model.startswith(start))
        raise ValueError(f"{name}: expected a vision transformer, found {next(kinds, f'timm model {model}')}")
    if (pool, projection) != expected:
        raise ValueError(f"{name}: expected timm_pool, timm_proj of {expected}, found {(pool, projection)}")
    return trunk


def _siglip(size: str, patch: str, *, tanh: bool) -> Trunk:
    width, layers, heads, ratio = SIGLIP_SIZES[size]
    shape = TowerShape(
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=int(width * ratio),
        activation="gelu_tanh" if tanh else None,
        eps=1e-6,
    )
    frames = FrameTokens(
        class_row=False,
        class_position=False,
        norm_before=False,
        patch_bias=True,
        pool="attention",
        pool_heads=heads,
        pool_mlp_width=shape.mlp_width,
        projection=False,
        names="timm",
    )
    return shape, frames, int(patch)


def _pe_core(size: str, patch: str) -> Trunk:
    width, layers, heads, mlp_width, grid = PE_SIZES[size]
    class_row = size != "gigantic"
    frames = FrameTokens(
        class_row=class_row,
        class_position=class_row,
        rotation=Rotation(grid=grid, offset=1.0 if class_row else 0.0, order="xy"),
        pool="attention",
        pool_heads=8,
        pool_mlp_width=4 * width,
        projection_bias=True,
        names="timm",
    )
    return TowerShape(width=width, layers=layers, heads=heads, mlp_width=mlp_width), frames, int(patch)


def _eva02(size: str, patch: str) -> Trunk:
    width, layers, heads = EVA02_SIZES[size]
    shape = TowerShape(
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=int(width * 4 * 2 / 3),
        activation="swiglu",
        eps=1e-6,
        key_bias=False,
        inner_norm=True,
    )
    frames = FrameTokens(
        rotation=Rotation(grid=16), norm_before=False, patch_bias=True, projection_bias=True, names="timm"
    )
    return shape, frames, int(patch)


def _captions(name: str, text: Values) -> CaptionTokens:
    readouts: dict[str, Readout] = {"argmax": "largest", "eos": "end", "last": "last", "first": "first"}
    pool = text.get("pool_type", "argmax")
    if pool not in readouts:
        raise ValueError(f"{name}: text_cfg.pool_type: expected one of {', '.join(readouts)}, found {pool!r}")
    named = text.get("hf_tokenizer_name")
    kinds = (kind for pattern, kind in TOKENIZERS.items() if named and re.fullmatch(pattern, named))
    tokenizer = next(kinds, None) if named else "clip"
    if tokenizer is None:
        raise ValueError(f"{name}: text_cfg.hf_tokenizer_name: expected a known tokenizer, found {named!r}")
    return CaptionTokens(
        causal=not text.get("no_causal_mask", False),
        readout="class" if text.get("embed_cls") else readouts[pool],
        end_id=text.get("eos_id", 2),
        projection=text.get("proj_type", "linear") != "none",
        projection_bias=bool(text.get("proj_bias", False)) and text.get("proj_type", "linear") != "none",
        tokenizer=tokenizer,
        start_token=tokenizer not in NO_START,
    )


def config_from_architecture(architecture: Architecture) -> dict[str, Any]:
    """The inverse of `architecture_from_config` for OpenAI's CLIP.

    Raises:
        ValueError: towers that differ from OpenAI's in more than sizes.
    """
    if not architecture.plain:
        raise ValueError("expected the towers of a plain CLIP, which open_clip's config describes by sizes")
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
