"""Reading DiscoVLA's golden files into our model; sizes come from the sidecar, names from the release."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from discovla.batch import Batch
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.testing import tiny_architecture
from discovla.towers.architecture import Architecture, TowerShape
from discovla.towers.names import openai_name
from discovla.towers.weights import load_weights

RELEASED = (
    ("attention.lora.a", "attn.TVPt_LoRA_a"),
    ("attention.lora.b", "attn.TVPt_LoRA_b"),
    ("attention.adapter.down.weight", "attn.TVPt_down_weight"),
    ("attention.adapter.down.bias", "attn.TVPt_down_bias"),
    ("attention.adapter.up.weight", "attn.TVPt_up_weight"),
    ("attention.adapter.up.bias", "attn.TVPt_up_bias"),
)


def released_name(name: str) -> str:
    """The released code's name of one of our parameters."""
    for ours, theirs in RELEASED:
        name = name.replace(ours, theirs)
    return "clip." + openai_name(name)


@dataclass(frozen=True, kw_only=True)
class Golden:
    sidecar: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.sidecar["config"]

    def get(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.tensors[name]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor


def read(folder: Path, name: str) -> Golden:
    return Golden(
        sidecar=json.loads((folder / "discovla" / f"{name}.json").read_text()),
        tensors=load_file(folder / "discovla" / f"{name}.safetensors"),
    )


def build(golden: Golden, dtype: torch.dtype) -> DiscoVLA:
    """The golden model: base weights by strict loading, trained parameters by their released names."""
    c = golden.config
    architecture = Architecture(
        embed_dim=c["embed_dim"],
        image_size=c["image"],
        patch_size=c["patch"],
        context_length=c["context"],
        vocab_size=c["vocab"],
        activation="quick_gelu",
        vision=_tower(golden, "vision"),
        text=_tower(golden, "text"),
    )
    config = DiscoVLAConfig(
        lora_rank=c["lora_dim"],
        fused_vision_blocks=c["H_V"],
        fused_text_blocks=c["H_L"],
        alpha=c["alpha"],
        beta=c["beta"],
    )
    model = DiscoVLA(architecture, config).to(dtype)
    model.compute_dtype = dtype
    weights = {
        n.removeprefix("weights.clip."): t for n, t in golden.tensors.items() if n.startswith("weights.")
    }
    base = {n: t for n, t in weights.items() if "TVPt" not in n}
    load_weights(model, architecture, base)
    model.freeze()
    trained = {n: golden.get(f"weights.{released_name(n)}", dtype) for n in model.trained_state()}
    assert len(trained) + len(base) == len(weights)
    model.load_trained_state(trained)
    return model


def _tower(golden: Golden, side: str) -> TowerShape:
    """Sizes of a tower; heads are 64 wide unless the file states their number or width."""
    c, width = golden.config, golden.config[f"{side}_width"]
    heads = c.get(f"{side}_heads", width // c.get("head_dim", 64))
    first = "visual.transformer" if side == "vision" else "transformer"
    mlp_width = len(golden.tensors[f"weights.clip.{first}.resblocks.0.mlp.c_fc.weight"])
    return TowerShape(width=width, layers=c[f"{side}_layers"], heads=heads, mlp_width=mlp_width)


def batch(golden: Golden, dtype: torch.dtype) -> Batch:
    inputs = {n.removeprefix("in."): golden.get(n, dtype) for n in golden.tensors if n.startswith("in.")}
    n = len(inputs["text_ids"])
    return Batch(
        text_ids=inputs["text_ids"],
        text_mask=inputs["text_mask"].bool(),
        frames=inputs["video"],
        frame_mask=inputs["video_mask"].bool(),
        frame_text_ids=inputs["f_text_ids"],
        frame_text_mask=inputs["f_text_mask"].bool(),
        video_index=torch.arange(n),
        valid=torch.ones(n, dtype=torch.bool),
    )


def loss_head(golden: Golden, dtype: torch.dtype) -> DiscoVLA:
    """A model whose towers do not matter, with the golden loss weights and scale."""
    config = DiscoVLAConfig(
        fused_vision_blocks=1, fused_text_blocks=1, alpha=golden.config["alpha"], beta=golden.config["beta"]
    )
    model = DiscoVLA(tiny_architecture(), config).to(dtype)
    name = "logit_scale" if "logit_scale" in golden.tensors else "weights.clip.logit_scale"
    with torch.no_grad():
        model.logit_scale.log.copy_(golden.tensors[name])
    return model
