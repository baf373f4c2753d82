"""LoRA in the format of the library PEFT, out and in.

Our LoRA is one joint update of rank r of queries, keys and values, without a scale: b a.  PEFT scales by
lora_alpha / r, so lora_alpha = r.  Where the other library has one projection to queries, keys and values,
a and b are written as they are; where it has three, a is written for each, and b in three parts.  In reading,
the updates of three projections become one of rank 3r, which is exact too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.foreign import read_safetensors
from discovla.methods.base import Method
from discovla.nn.block import Attention
from discovla.tensor_files import write_tensors
from discovla.towers.architecture import Architecture
from discovla.towers.names import stored_names

Library = Literal["open_clip", "transformers"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names
TRANSFORMERS = {"vision": "vision_model.encoder.layers.", "text": "text_model.encoder.layers."}


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Module of another library that projects to queries, keys and values.

    modules: its name, or those of the three projections.
    joint: True for torch's multi-head attention, whose LoRA PEFT applies to the output projection too.
    """

    modules: tuple[str, ...]
    joint: bool = False


def projection(architecture: Architecture, attention: str, library: Library) -> Projection:
    """Return the modules that hold the projection of an attention of ours ("vision.blocks.0.attention").

    Raises:
        ValueError: the library does not have these towers.
    """
    side, _, layer, _ = attention.split(".")
    if library == "transformers":
        if not architecture.plain:
            raise ValueError("peft: expected the towers of a plain CLIP for transformers, found others")
        stem = f"{TRANSFORMERS[side]}{layer}.self_attn."
        return Projection(modules=tuple(f"{stem}{part}_proj" for part in "qkv"))
    name = f"{attention}.qkv.weight"
    stored = stored_names(architecture, [name])[name].names
    custom = architecture.frames.names == "timm" or architecture.captions.readout == "class"
    prefix = "text." if side == "text" and custom else ""
    if stored[0].endswith(".in_proj_weight"):
        return Projection(modules=(prefix + stored[0].removesuffix(".in_proj_weight"),), joint=True)
    return Projection(modules=tuple(prefix + part.removesuffix(".weight") for part in stored))


def write_peft(method: Method, out: Path, library: Library, base: str) -> list[Path]:
    """Write the LoRA of a method so that `peft.PeftModel.from_pretrained(model, out)` applies it.

    Args:
        out: folder.
        library: whose model it is for.
        base: name of the base model, which PEFT records.

    Returns:
        The files written.

    Raises:
        ValueError: the method trains other parameters than LoRA, or none, or the library lacks its towers.
    """
    attentions = lora_attentions(method)
    others = [name for name in method.trained_state() if ".attention.lora." not in name]
    if others or not attentions:
        found = f"{len(others)} other parameters, the first {others[0]}" if others else "no LoRA"
        raise ValueError(f"peft: expected a run that trains LoRA alone, found {found}")
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    for name, (a, b) in attentions.items():
        place = projection(method.architecture, name, library)
        modules += place.modules
        for module, part in zip(place.modules, b.chunk(len(place.modules)), strict=True):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.clone()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = part.clone()
        if place.joint:
            output = f"{PREFIX}{place.modules[0]}.base_layer.out_proj.lora"
            tensors[f"{output}_A.weight"] = torch.zeros_like(a)
            tensors[f"{output}_B.weight"] = b.new_zeros(a.shape[1], len(a))
    rank = len(next(iter(attentions.values()))[0])
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "inference_mode": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    write_tensors(out / WEIGHTS, tensors)
    return [out / CONFIG, out / WEIGHTS]


def lora_attentions(method: Method) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a (r w) and b (3w r) of each attention with LoRA, by its name."""
    return {
        name: (module.lora.a.detach(), module.lora.b.detach())
        for name, module in method.named_modules()
        if isinstance(module, Attention) and module.lora is not None
    }


def read_peft(folder: Path, architecture: Architecture) -> dict[str, tuple[Tensor, Tensor]]:
    """Read LoRA that PEFT wrote for open_clip or transformers, by the names of our attentions.

    Returns:
        a (R w) and b (3w R) of every attention of both towers, of one rank R; zero where PEFT has none.

    Raises:
        ValueError: another kind of adapter, an update of other modules than the projections to queries, keys
            and values, or shapes that do not fit; the first is named.
    """
    config = json.loads((folder / CONFIG).read_text())
    rank = config.get("r")
    _check_config(folder, config)
    alpha = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    state = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in read_safetensors(folder / WEIGHTS, "an adapter of PEFT").items()
    }
    library: Library = "transformers" if any("self_attn." in name for name in state) else "open_clip"
    names = [
        f"{side}.blocks.{layer}.attention"
        for side, tower in (("vision", architecture.vision), ("text", architecture.text))
        for layer in range(tower.layers)
    ]
    updates, read = {}, set()
    for name in names:
        width = (architecture.vision if name.startswith("vision") else architecture.text).width
        place = projection(architecture, name, library)
        updates[name] = _joint(state, place, width, rank, alpha)
        read |= {f"{module}.lora_{side}.weight" for module in place.modules for side in "AB"}
        if place.joint:
            output = f"{place.modules[0]}.base_layer.out_proj.lora"
            _check_zero(folder, state, f"{output}_B.weight")
            read |= {f"{output}_A.weight", f"{output}_B.weight"}
    if unknown := sorted(set(state) - read):
        raise ValueError(f"{folder / WEIGHTS}: expected LoRA of attention projections, found {unknown[0]}")
    largest = max(len(a) for a, _ in updates.values())
    return {
        name: (F.pad(a, (0, 0, 0, largest - len(a))), F.pad(b, (0, largest - len(a))))
        for name, (a, b) in updates.items()
    }


def _check_config(folder: Path, config: Mapping[str, object]) -> None:
    """Refuse adapters that are no plain LoRA of one rank."""
    wanted = {"peft_type": "LORA", "bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder / CONFIG}: {key}: expected {value!r}, found {config[key]!r}")
    if not isinstance(config.get("r"), int):
        raise ValueError(f"{folder / CONFIG}: r: expected a whole number, found {config.get('r')!r}")


def _joint(
    state: Mapping[str, Tensor], place: Projection, width: int, rank: int, alpha: float
) -> tuple[Tensor, Tensor]:
    """a and b of one attention, of rank r, or 3r for three projections."""
    parts = len(place.modules)
    a, b = torch.zeros(parts * rank, width), torch.zeros(3 * width, parts * rank)
    rows = 3 * width // parts
    for index, module in enumerate(place.modules):
        low, high = state.get(f"{module}.lora_A.weight"), state.get(f"{module}.lora_B.weight")
        if low is None or high is None:
            continue
        if low.shape != (rank, width) or high.shape != (rows, rank):
            raise ValueError(
                f"{module}: expected LoRA of {(rank, width)} and {(rows, rank)}, "
                f"found {tuple(low.shape)} and {tuple(high.shape)}"
            )
        columns = slice(index * rank, (index + 1) * rank)
        a[columns] = low.float()
        b[index * rows : (index + 1) * rows, columns] = alpha * high.float()
    return a, b


def _check_zero(folder: Path, state: Mapping[str, Tensor], name: str) -> None:
    if name in state and state[name].abs().max() > 0:
        raise ValueError(f"{folder / WEIGHTS}: {name}: expected zeros, since only qkv is updated here")


def apply_peft(method: Method, updates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Copy LoRA that `read_peft` returned into a method that has LoRA of its rank in every attention."""
    with torch.no_grad():
        for name, module in method.named_modules():
            if isinstance(module, Attention) and module.lora is not None and re.match("vision|text", name):
                a, b = updates[name]
                module.lora.a.copy_(a)
                module.lora.b.copy_(b)
