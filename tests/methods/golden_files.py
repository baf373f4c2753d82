"""Golden files: tensors that the released code produced, and a sidecar with their sizes and options."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from discovla.towers.architecture import Architecture, TowerShape


@dataclass(frozen=True, kw_only=True)
class Golden:
    sidecar: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path, name: str) -> Self:
        """Read NAME.json and NAME.safetensors."""
        return cls(
            sidecar=json.loads((folder / f"{name}.json").read_text()),
            tensors=load_file(folder / f"{name}.safetensors"),
        )

    @property
    def config(self) -> dict[str, Any]:
        return self.sidecar["config"]

    def get(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor, in `dtype` if it is floating point."""
        tensor = self.tensors[name]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    @property
    def architecture(self) -> Architecture:
        """Sizes of the CLIP; heads are 64 wide unless the file states their number or width."""
        c = self.config
        return Architecture(
            embed_dim=c["embed_dim"],
            image_size=c["image"],
            patch_size=c["patch"],
            context_length=c["context"],
            vocab_size=c["vocab"],
            activation="quick_gelu",
            vision=self._tower("vision", "visual.transformer"),
            text=self._tower("text", "transformer"),
        )

    def _tower(self, side: str, released: str) -> TowerShape:
        c, width = self.config, self.config[f"{side}_width"]
        return TowerShape(
            width=width,
            layers=c[f"{side}_layers"],
            heads=c.get(f"{side}_heads", width // c.get("head_dim", 64)),
            mlp_width=len(self.tensors[f"weights.clip.{released}.resblocks.0.mlp.c_fc.weight"]),
        )
