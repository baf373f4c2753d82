"""Reading DiscoVLA's golden files into our model; sizes come from the sidecar, names from the release."""

from __future__ import annotations

from pathlib import Path

import torch

from discovla.batch import Batch
from discovla.methods.discovla import DiscoVLA, DiscoVLAConfig
from discovla.testing import tiny_architecture
from discovla.towers.names import openai_name
from discovla.towers.weights import load_weights
from tests.methods.golden_files import Golden

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


def read(folder: Path, name: str) -> Golden:
    return Golden.read(folder / "discovla", name)


def build(golden: Golden, dtype: torch.dtype) -> DiscoVLA:
    """The golden model: base weights by strict loading, trained parameters by their released names."""
    c, architecture = golden.config, golden.architecture
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
