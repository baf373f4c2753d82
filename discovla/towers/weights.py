"""CLIP weights: loaded from a tag, a file, the drawn world's asset or a seed, and written back."""

from __future__ import annotations

import json
import logging
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from discovla import torchvision_cpu
from discovla.foreign import (
    Kind,
    describe,
    nested,
    read_arrays,
    read_jit,
    read_json,
    read_plain_pickle,
    read_safetensors,
    read_torch,
    recognise,
)
from discovla.nn.logit_scale import BIAS_START, START
from discovla.tensor_files import write_tensors
from discovla.towers.architecture import Architecture, Preprocessing, architecture_from_state_dict
from discovla.towers.configs import architecture_from_config
from discovla.towers.licences import licence
from discovla.towers.names import stored_names, unused_names
from discovla.towers.text import TextTower
from discovla.towers.vision import VisionTower

log = logging.getLogger(__name__)

DRAWN_CLIP = Path(__file__).parent.parent / "assets" / "drawn_clip.safetensors"
# values of `ModelConfig.pretrained` -> files that ship with discovla
DRAWN = {"drawn": DRAWN_CLIP} | {
    name: DRAWN_CLIP.with_name(f"{name}.safetensors") for name in ("drawn_siglip", "drawn_pe")
}
VISION_POSITIONS = ("vision.class_embedding", "vision.position_embedding")
LAYER_SCALE_START = 1e-4  # as open_clip's only config with layer scales
CONNECT_SECONDS = 5.0  # for a server to answer
READ_SECONDS = 60.0  # without a byte after which a download is given up
EXPECTED = "a file of CLIP weights (a state dict)"
FILE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
# parts of names that torch.compile, FSDP and activation checkpointing add
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# states in a training checkpoint that hold tensors but no model
NOT_MODELS = ("optim", "scaler", "sched", "lr_sched")
# weights that tell where the names of a tower begin; the text tower's in open_clip's CustomTextCLIP
VISION_ANCHOR, TEXT_ANCHOR = "visual.conv1.weight", "text.positional_embedding"
# entries of OpenAI's archives that are not weights
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}


class ModelConfig(BaseModel):
    """The CLIP to start from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("pretrained", mode="before")
    @classmethod
    def _seed_has_a_key(cls, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise ValueError(
                "expected a tag, a file, 'drawn' or 'random'; a random start from a seed is "
                f"model.pretrained=random model.seed={value}"
            )
        return value

    architecture: str | None = None
    """Name of an open_clip model ("ViT-B-32-quickgelu", `discovla models` lists them) or a JSON file in
    open_clip's form.  Optional for the
    drawn CLIP and for a file of weights with heads of width 64."""
    pretrained: str = "openai"
    """Weights: an open_clip tag ("openai"), a file with OpenAI's or open_clip's names (.pt, .safetensors),
    "drawn", "drawn_siglip" or "drawn_pe" for the small towers that ship with discovla, like CLIP's, SigLIP's
    and PE-Core's, or "random"."""
    activation: Literal["auto", "quick_gelu", "gelu"] = "auto"
    """Activation of the MLPs; "auto" takes it from the tag, the archive or the architecture.  Naming another
    one than that of the weights is an error."""
    seed: int = 0
    """Seed of random weights."""
    image_size: int | None = Field(default=None, ge=1)
    """Pixels of a side of the frames; None: those of the architecture.  The positions of patches are
    interpolated to it, bicubic, as open_clip does."""
    position_std: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Standard deviation of random position and class embeddings of the vision tower.  None: OpenAI's
    width^-0.5, with which a small tower learns positions more slowly."""


@dataclass(frozen=True, kw_only=True)
class WeightsOrigin:
    """Name, source and licence of the weights that a config names, as a run records them.

    name: "ARCHITECTURE TAG", or the name of a file, without folders.
    source: repository on Hugging Face's hub, URL or path; "" if nothing is read.
    licence: as far as `towers.licences` knows it.
    """

    name: str
    source: str
    licence: str


def weights_origin(config: ModelConfig) -> WeightsOrigin:
    """Return the origin of the weights of a config; they are not read.

    Raises:
        ValueError: a tag that open_clip does not know.
    """
    architecture, pretrained = config.architecture or "", config.pretrained
    name = f"{Path(architecture).name} {Path(pretrained).name}".strip()
    if pretrained == "random":
        return WeightsOrigin(name=name, source="", licence="none: they start at random")
    if pretrained in DRAWN:
        return WeightsOrigin(name=name, source="the package discovla", licence="Apache-2.0")
    if _is_file(pretrained):
        return WeightsOrigin(name=name, source=pretrained, licence="not known of a file")
    known = _tag_config(config.architecture, pretrained)
    hub = known.get("hf_hub")
    source = f"hf:{hub.rstrip('/')}" if hub else str(known.get("url"))
    return WeightsOrigin(name=name, source=source, licence=licence(architecture, pretrained))


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """An architecture and its weights by OpenAI's names, or None for a random start."""

    architecture: Architecture
    weights: dict[str, Tensor] | None


def load_pretrained(config: ModelConfig) -> Pretrained:
    """Load the weights that a config names, and the architecture they fit, at the size of its frames.

    Raises:
        ValueError: unknown name, tag or activation, or a file without the weights of a CLIP.
        FileNotFoundError: a path that does not exist.
    """
    pretrained = _load(config)
    size = config.image_size
    return pretrained if size in (None, pretrained.architecture.image_size) else resized(pretrained, size)


def resized(pretrained: Pretrained, size: int) -> Pretrained:
    """Return weights for frames of another size: the table of patch positions is interpolated.

    Source: open_clip's resize_pos_embed, bicubic with antialiasing.

    Raises:
        ValueError: frames smaller than a patch.
    """
    old = pretrained.architecture
    if size < old.patch_size:
        raise ValueError(f"model.image_size: expected at least a patch, {old.patch_size}, found {size}")
    new = replace(old, image_size=size)
    if pretrained.weights is None:
        return Pretrained(architecture=new, weights=None)
    (form,) = stored_names(old, ["vision.position_embedding"]).values()
    table = form.read(pretrained.weights)
    first, grid = table.tensor_split([len(table) - old.patches])
    grid = grid.T.unflatten(1, (old.side, old.side))[None]  # 1 w y x
    grid = F.interpolate(grid.float(), (new.side, new.side), mode="bicubic", antialias=True)[0]
    table = torch.cat([first, grid.flatten(1).T.to(table.dtype)])
    return Pretrained(architecture=new, weights={**pretrained.weights, **form.write(table)})


def _load(config: ModelConfig) -> Pretrained:
    """`load_pretrained` at the size of the architecture."""
    named = _named_architecture(config.architecture)
    if config.pretrained == "random":
        if named is None:
            raise ValueError("model.architecture: expected a name for a random start, found none")
        return Pretrained(architecture=_check_activation(config, named, None), weights=None)
    if config.pretrained in DRAWN:
        return read_drawn_clip(DRAWN[config.pretrained])
    if _is_file(config.pretrained):
        path = Path(config.pretrained)
        weights, activation = read_weights(path)
        weights = without_prefix(weights)
        if named is None:
            named = _infer_architecture(path, weights, config, activation)
        return Pretrained(architecture=_check_activation(config, named, activation), weights=weights)
    path, activation = _download(config.architecture, config.pretrained)
    assert named is not None, "a tag without an architecture is refused by _download"
    assert config.architecture is not None, "a tag without an architecture is refused by _download"
    named = replace(named, preprocessing=preprocessing(config.architecture, config.pretrained))
    origin = weights_origin(config)
    log.info("weights %s: licence %s", origin.name, origin.licence)
    architecture = _check_activation(config, named, activation)
    return Pretrained(architecture=architecture, weights=read_weights(path)[0])


def _is_file(pretrained: str) -> bool:
    """Return True for the path of a file, False for a tag."""
    path = Path(pretrained)
    return path.suffix in FILE_SUFFIXES or path.is_file() or len(path.parts) > 1


def read_weights(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Read weights with OpenAI's or open_clip's names from a file, recognised by its content.

    Reads OpenAI's JIT archives, torch checkpoints, safetensors, and arrays in .npz files and pickles.  A
    checkpoint may hold one state dict beside other values, under any name; the parts of names that
    torch.compile and parallel training add, and "text." on the text tower, are dropped.

    Returns:
        Float32 weights by OpenAI's names, and the activation if the file determines it, as only a JIT archive
        of OpenAI does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no state dict, or several, or a weight that is not finite.
    """
    kind = recognise(path, EXPECTED)
    content = _content(path, kind)
    state = without_wrappers(path, _state_dict(path, content))
    if TEXT_ANCHOR in state:
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    state = {name: t for name, t in state.items() if name not in NOT_WEIGHTS and name != "attn_mask"}
    for name, tensor in state.items():
        values = _unusable_values(tensor)
        if values:
            raise ValueError(f"{path}: {name}: expected floating point numbers, found {values}")
    weights = {
        name: tensor.to_dense().float() if tensor.is_floating_point() or not tensor.dim() else tensor
        for name, tensor in state.items()
    }
    for name, tensor in weights.items():
        if name.endswith("attn_mask"):
            continue  # -inf above the diagonal
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise ValueError(
                f"{path}: {name}: expected finite numbers, found {bad} of {tensor.numel()} that are not"
            )
    return weights, "quick_gelu" if kind == "jit" else None


def _unusable_values(tensor: Tensor) -> str:
    """Return why a tensor of a file cannot be a weight; "" if it can.

    Tables of indices that other models store are integers and of no use to a tower.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return "no values"
    if tensor.is_complex():
        return f"complex numbers, {name}"
    if tensor.is_quantized or name in ("int8", "uint8") or name.startswith(("float8", "float4")):
        return f"quantised values, {name}"
    return ""


def _content(path: Path, kind: Kind) -> Any:
    """Return what a file of a format holds."""
    match kind:
        case "jit":
            return read_jit(path, EXPECTED)
        case "safetensors":
            return read_safetensors(path, EXPECTED)
        case "torch":
            return read_torch(path, EXPECTED)
        case "npz" | "npy":
            return read_arrays(path, kind, EXPECTED)
        case "pickle":
            try:
                return read_plain_pickle(path, arrays=True)
            except ValueError as error:
                reason = str(error).removeprefix(f"{path}: ")
                raise ValueError(f"{path}: expected {EXPECTED}, found {reason}") from error
        case "text":
            with path.open("rb") as file:
                index = b'"weight_map"' in file.read(2**20)
                file.seek(0)
                start = file.read(40).decode(errors="replace").strip()
            found = "an index of several files of weights; join them in one"
            found = found if index else f"a text file that begins with {start!r}"
            raise ValueError(f"{path}: expected {EXPECTED}, found {found}")


def without_wrappers(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the parts of names that wrappers of a model add.

    Raises:
        ValueError: two names become one.
    """
    bare: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        while short.startswith("module."):
            short = short.removeprefix("module.")
        if short in bare:
            raise ValueError(f"{path}: expected one tensor for {short}, found another, {name}")
        bare[short] = tensor
    return bare


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a CLIP that is part of another model ("clip.visual.proj") by its own names."""
    anchored = [name for name in weights if name.endswith(f".{VISION_ANCHOR}")]
    if VISION_ANCHOR in weights or len(anchored) != 1:
        return dict(weights)
    prefix = anchored[0].removesuffix(VISION_ANCHOR)
    bare = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if len(bare) < len(weights):
        return dict(weights)  # two names would become one
    log.warning("weights: the names of the CLIP begin with %r, which is dropped", prefix)
    if TEXT_ANCHOR in bare:
        bare = {name.removeprefix("text."): tensor for name, tensor in bare.items()}
    return bare


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """Return the one state dict in the content of a file; other values beside its tensors are left out.

    Raises:
        ValueError: there is none, or more than one.
    """
    sources = {
        name: inner
        for name, inner in nested(content)
        if isinstance(inner, Mapping) and not name.startswith(NOT_MODELS)
    }
    states = {
        name: {str(key): _tensor(value) for key, value in inner.items() if _is_tensor(value)}
        for name, inner in sources.items()
    }
    states = {name: state for name, state in states.items() if state}
    # Any CLIP has position embeddings; a head or a list of losses beside it has none.
    models = {name: state for name, state in states.items() if any("position" in key for key in state)}
    if len(models) > 1:
        raise ValueError(
            f"{path}: expected one state dict, found {len(models)}: {', '.join(models)}; save one alone"
        )
    if not models and len(states) != 1:
        raise ValueError(f"{path}: expected {EXPECTED}, found {describe(content)}")
    name, state = next(iter((models or states).items()))
    others = [str(key) for key in sources[name] if str(key) not in state]
    if others:
        log.warning("%s: values beside the weights are left out: %s", path, ", ".join(others[:5]))
    return state


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # torch has neither long doubles nor another byte order
    return torch.from_numpy(np.asarray(value, np.float32 if value.dtype.kind == "f" else None))


def read_drawn_clip(path: Path) -> Pretrained:
    """Read the small CLIP of the drawn world; token rows that are not stored are zero."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the drawn world's CLIP is missing; make it: configs/pretrain_drawn.toml"
        )
    with safe_open(path, framework="pt") as file:
        architecture = Architecture.from_dict(json.loads(file.metadata()["architecture"]))
    weights = {name: tensor.float() for name, tensor in load_file(path).items() if name != "token_ids"}
    rows = weights["token_embedding.weight"]
    table = torch.zeros(architecture.vocab_size, rows.shape[1])
    table[load_file(path)["token_ids"].long()] = rows
    weights["token_embedding.weight"] = table
    return Pretrained(architecture=architecture, weights=weights)


def write_drawn_clip(
    path: Path, architecture: Architecture, weights: Mapping[str, Tensor], token_ids: Sequence[int]
) -> None:
    """Write a small CLIP: weights by OpenAI's names in float16, token rows of `token_ids` only."""
    small = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    ids = torch.tensor(sorted(token_ids), dtype=torch.int32)
    small["token_embedding.weight"] = small["token_embedding.weight"][ids.long()].contiguous()
    metadata = {"architecture": json.dumps(architecture.to_dict())}
    write_tensors(path, {**small, "token_ids": ids}, metadata)


def load_weights(model: nn.Module, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by OpenAI's names into a model with `vision`, `text` and `logit_scale`, strictly.

    Parameters that a method adds (adapters, heads) keep their values.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; the first few are named.
    """
    own = model.state_dict(keep_vars=True)
    stored = stored_names(architecture, clip_names(architecture))
    expected = {part: None for form in stored.values() for part in form.names}
    unused = re.compile(unused_names(architecture))
    missing = [part for part in expected if part not in weights]
    unexpected = [n for n in weights if n not in expected and not unused.fullmatch(n)]
    read: dict[str, Tensor] = {}
    shapes = []
    for ours, form in stored.items():
        if any(part in missing for part in form.names):
            continue
        try:
            tensor = form.read(weights)
        except RuntimeError:
            tensor = torch.empty(0)  # parts that do not fit each other
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            shapes.append(f"{form.names[0]}: expected floating point numbers, found {dtype}")
        elif _fits(tensor, own[ours]):
            read[ours] = tensor
        else:
            found = ", ".join(str(tuple(weights[part].shape)) for part in form.names)
            shapes.append(f"{form.names[0]}: expected {tuple(own[ours].shape)}, found {found}")
    misfits = misfit_text(missing=missing, unexpected=unexpected, shapes=shapes)
    if misfits:
        raise ValueError(f"weights do not fit the architecture: {misfits}")
    with torch.no_grad():
        for ours, tensor in read.items():
            own[ours].copy_(tensor.reshape(own[ours].shape))


def misfit_text(
    *, missing: Sequence[str] = (), unexpected: Sequence[str] = (), shapes: Sequence[str] = ()
) -> str:
    """Return how a state dict differs from the expected one, the first names of each kind; "" if equal."""
    parts = []
    for kind, names in (("missing ", missing), ("unexpected ", unexpected), ("", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{kind}{', '.join(names[:3])}{more}")
    return "; ".join(parts)


def _fits(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape == own.shape or tensor.numel() == own.numel() == 1


def openai_weights(
    model: nn.Module, architecture: Architecture, updates: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Copy the weights of the towers inside a model, by open_clip's names: the inverse of `load_weights`.

    Args:
        updates: by our names, to be added to the weights.
    """
    own, updates, weights = model.state_dict(), updates or {}, {}
    for name, form in stored_names(architecture, clip_names(architecture)).items():
        tensor = own[name].detach()
        weights |= form.write(tensor + updates[name] if name in updates else tensor)
    return weights


def clip_names(architecture: Architecture) -> list[str]:
    """List our names of the parameters of both towers and the logit scale."""
    with torch.device("meta"):
        towers = {"vision": VisionTower(architecture), "text": TextTower(architecture)}
    names = [f"{side}.{name}" for side, tower in towers.items() for name in tower.state_dict()]
    return [*names, "logit_scale.log", *(["logit_scale.bias"] if architecture.logit_bias else [])]


def initialise(
    model: nn.Module, architecture: Architecture, seed: int, position_std: float | None = None
) -> None:
    """Initialise a CLIP's parameters from a seed.

    Standard deviations are those of OpenAI's code, except for the patch embedding's, width^-0.5 as in all
    other projections; position_std as in `ModelConfig`.
    """
    generator = torch.Generator().manual_seed(seed)
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in clip_names(architecture):
            tower = architecture.text if name.startswith("text.") else architecture.vision
            std = _initial_std(name, tower.width, tower.layers)
            if position_std is not None and name in VISION_POSITIONS:
                std = position_std
            if std is not None:
                own[name].normal_(0, std, generator=generator)
            else:
                own[name].fill_(_initial_constant(name))


def _initial_constant(name: str) -> float:
    """Initial value of a parameter that starts at a constant."""
    if name == "logit_scale.log":
        return START
    if name == "logit_scale.bias":
        return BIAS_START
    if name.endswith("layer_scale.gamma"):
        return LAYER_SCALE_START
    return 1.0 if name.endswith(("weight", "running_var")) else 0.0


def _initial_std(name: str, width: int, layers: int) -> float | None:
    """Standard deviation of a parameter's initial values; None for a constant."""
    constants = ("bias", "gamma", "running_mean", "running_var", "bn.weight", "pool.ln.weight")
    if name.endswith(constants) or ".ln_" in name or name == "logit_scale.log":
        return None
    if name == "text.token_embedding.weight":
        return 0.02
    if name == "text.position_embedding":
        return 0.01
    if "attention.out" in name or "mlp.down" in name:
        return width**-0.5 * (2 * layers) ** -0.5
    return (2 * width) ** -0.5 if "mlp.up" in name else width**-0.5


def _named_architecture(name: str | None) -> Architecture | None:
    if name is None:
        return None
    if name.endswith(".json"):
        values = read_json(Path(name), "a model config in open_clip's form")
        if {"vision", "text"} <= set(values):  # the form of `Architecture.to_dict`
            return Architecture.from_dict(values)
        return architecture_from_config(name, values)
    torchvision_cpu.install()
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"model.architecture: expected a name open_clip knows (such as ViT-B-32), found {name!r}"
        )
    architecture = architecture_from_config(name, config)
    return replace(architecture, preprocessing=preprocessing(name))


def preprocessing(name: str, tag: str | None = None) -> Preprocessing:
    """Return the preprocessing of frames of open_clip's weights.

    Args:
        name: of the model.  tag: of the weights; None: what all of its weights have in common, else CLIP's.
    """
    torchvision_cpu.install()
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name) if tag is None else [tag]
    kinds = []
    for values in (get_pretrained_cfg(name, known) for known in tags):
        kind = Preprocessing(
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            resize=values["resize_mode"],
            interpolation=values["interpolation"],
        )
        if kind not in kinds:
            kinds.append(kind)
    if len(kinds) > 1:
        log.warning("%s: its weights differ in preprocessing; OpenAI's is used", name)
    return kinds[0] if len(kinds) == 1 else Preprocessing()


def _tag_config(name: str | None, tag: str) -> dict[str, Any]:
    """Return open_clip's entry for a tag of a model.

    Raises:
        ValueError: no name, or a tag that the model has not.
    """
    if name is None:
        raise ValueError(
            f"model.architecture: expected a name to go with model.pretrained={tag!r}, found none"
        )
    torchvision_cpu.install()
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    config = get_pretrained_cfg(name, tag)
    if not config:
        known = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"model.pretrained: expected a file (.pt, .safetensors), 'drawn', 'random' or a tag of {name}"
            f" ({known}), found {tag!r}"
        )
    return config


def _download(name: str | None, tag: str) -> tuple[Path, str]:
    """Return the file of an open_clip tag, downloaded unless cached, and its activation."""
    config = _tag_config(name, tag)
    from huggingface_hub import constants
    from open_clip.pretrained import download_pretrained

    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    hub = config.get("hf_hub")
    offline = bool(hub) and not reachable(constants.ENDPOINT)
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, offline or constants.HF_HUB_OFFLINE
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(READ_SECONDS)  # open_clip downloads from other servers without one
    try:
        return Path(download_pretrained(config)), activation
    except (OSError, RuntimeError) as error:
        source = f"{constants.ENDPOINT}/{hub.rstrip('/')}" if hub else config.get("url")
        reason = "no connection" if offline else " ".join(str(error).split())
        raise ValueError(
            f"model.pretrained={tag!r}: expected the weights of {name} in the cache, or from {source}, found "
            f"{reason}; give a downloaded file: model.pretrained=/path/to/weights.safetensors"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = before
        socket.setdefaulttimeout(patience)


def reachable(url: str) -> bool:
    """Return True if a server answers within a few seconds; the hub's own client tries for a minute."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _infer_architecture(
    path: Path, weights: Mapping[str, Tensor], config: ModelConfig, known: str | None
) -> Architecture:
    activation = known or config.activation
    if activation == "auto":
        raise ValueError(
            f"{path}: bare weights do not fix the activation: set model.activation or model.architecture"
        )
    try:
        architecture = architecture_from_state_dict(
            weights, "quick_gelu" if activation == "quick_gelu" else "gelu"
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    log.warning(
        "%s: no architecture named; assuming %d vision and %d text heads of width 64",
        path,
        architecture.vision.heads,
        architecture.text.heads,
    )
    return architecture


def _check_activation(config: ModelConfig, architecture: Architecture, known: str | None) -> Architecture:
    """Return the architecture with the activation of the weights; refuse a config that contradicts it."""
    activation = known or architecture.activation
    if config.activation not in ("auto", activation):
        raise ValueError(
            f"model.activation: expected {activation!r} for these weights, found {config.activation!r}"
        )
    if activation != architecture.activation:
        log.warning(
            "%s: using %s, the activation of the weights, instead of %s",
            config.architecture,
            activation,
            architecture.activation,
        )
    return replace(architecture, activation="quick_gelu" if activation == "quick_gelu" else "gelu")
