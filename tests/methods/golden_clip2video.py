"""Reading the golden files of CLIP2Video and CLIP4Clip into our models, by the released names."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from discovla.methods.base import Method
from discovla.methods.config import MethodConfig
from discovla.methods.released import released_names
from discovla.testing import tiny_architecture
from discovla.towers.architecture import Architecture, TowerShape
from discovla.towers.weights import initialise, openai_weights
from tests.methods import golden_files

# sections 13 and 15 of the specification and the sidecars: float64, and float32 by kind
FLOAT64 = 1e-10
FEATURES, LOSSES, TIGHT_LOGITS, PER_SCALE = 5e-6, 5e-6, 2e-5, 5e-6


class Golden(golden_files.Golden):
    def get(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.tensors[name]
        return tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.bool()

    def parameters(self) -> dict[str, Tensor]:
        return {n.removeprefix("param."): t for n, t in self.tensors.items() if n.startswith("param.")}

    def check(self, name: str, got: Tensor, dtype: torch.dtype, limit: float) -> None:
        """|got - wanted| at most 1e-10 in float64 and `limit` in float32."""
        limit = FLOAT64 if dtype == torch.float64 else limit
        want = self.tensors[name]
        assert got.shape == want.shape, name
        error = (got.detach().double() - want).abs().max().item()
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.0e}"

    def check_gradient(self, name: str, got: Tensor | None, dtype: torch.dtype) -> None:
        assert got is not None, name
        self.check(name, got, dtype, 5e-5 * self.tensors[name].abs().max().item() + 1e-6)


def read(folder: Path, name: str) -> Golden:
    return Golden.read(folder / "clip2video", name)


def architecture(golden: Golden) -> Architecture:
    """Random towers from which heads of the golden sizes are made; they are as deep as the deepest head."""
    c = golden.sidecar["case"]
    layers, width = max(c["layers"], c["tight_layers"]), c["D"]
    return replace(
        tiny_architecture(),
        embed_dim=width,
        context_length=c["P"],
        vision=TowerShape(width=width, layers=1, heads=1, mlp_width=width),
        text=TowerShape(width=width, layers=layers, heads=c["H"], mlp_width=mlp_width(golden)),
    )


def mlp_width(golden: Golden) -> int:
    """The width of the MLPs of the heads, or four times the joint width if the file holds no weights."""
    widths = {len(t) for n, t in golden.parameters().items() if n.endswith("mlp.c_fc.weight")}
    assert len(widths) <= 1, widths
    return widths.pop() if widths else 4 * golden.sidecar["case"]["D"]


def released(golden: Golden, method: Method) -> dict[str, Tensor]:
    """A checkpoint under the released names: the file's heads and logit scale, towers from anywhere."""
    clip = {f"clip.{n}": t for n, t in openai_weights(method, method.architecture).items()}
    return {**clip, **golden.parameters()}


def load(golden: Golden, cls: type[Method], config: MethodConfig, dtype: torch.dtype) -> Method:
    """The method with the golden heads, by `released_parameters`, in evaluation mode."""
    method = cls(architecture(golden), config)
    initialise(method, method.architecture, 0)
    expected = set(names(method).values())
    found = method.released_parameters({n: t for n, t in released(golden, method).items() if n in expected})
    method = method.to(dtype).eval()
    parameters = dict(method.named_parameters())
    with torch.no_grad():
        for name, tensor in found.items():
            parameters[name].copy_(tensor)
    return method


def names(method: Method) -> dict[str, str]:
    """Released names of our parameters."""
    return released_names(method, sys.modules[type(method).__module__].RELEASED)


def check_gradients(golden: Golden, prefix: str, method: Method, dtype: torch.dtype) -> None:
    """Every gradient of a parameter in the file is that of the method, and all others are zero."""
    parameters = dict(method.named_parameters())
    got = {theirs: parameters[ours].grad for ours, theirs in names(method).items()}
    wanted = {n.removeprefix(prefix) for n in golden.tensors if n.startswith(prefix)}
    for name in wanted:
        golden.check_gradient(prefix + name, got[name], dtype)
    for name, gradient in got.items():
        if name not in wanted and gradient is not None:
            limit = FLOAT64 if dtype == torch.float64 else 1e-6
            assert gradient.abs().max().item() <= limit, name
