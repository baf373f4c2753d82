"""The published step with the low-rank updates that the peft library makes, for those who would use it.

peft wraps linear layers of their own for q, k and v, so each has an a of its own where the release has one
for all three: more is trained and computed.  It starts from the release's numbers: losses are the same.
No dependency: `pip install --no-deps peft transformers accelerate tokenizers` brings all that is not there.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.reference_step import ReferenceStep
from discovla import torchvision_cpu
from discovla.methods.discovla import DiscoVLA

NEEDED = ("peft", "transformers", "accelerate")  # what peft imports, and torch


def absent() -> str:
    """Why peft cannot be timed, in one line; empty where it can."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: pip install --no-deps {' '.join(NEEDED)} tokenizers"
    torchvision_cpu.install()  # transformers imports torchvision
    try:
        importlib.import_module("peft")
    except (ImportError, RuntimeError, OSError) as error:
        return f"peft does not import: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return ""


class PeftStep(ReferenceStep):
    """Forward and backward of a batch.

    Raises:
        ModuleNotFoundError: peft or what it needs is not installed.
    """

    def __init__(self, method: DiscoVLA, *, sdpa: bool = False, autocast: torch.dtype | None = None) -> None:
        super().__init__(method, sdpa=sdpa, autocast=autocast)
        if reason := absent():
            raise ModuleNotFoundError(reason)
        names = [name.removesuffix(".lora.a") for name in self.weights if name.endswith(".lora.a")]
        self.layers = {name: self._wrapped(name) for name in names}
        self.trained = {name: p for name, p in self.weights.items() if p.requires_grad}

    def _wrapped(self, name: str) -> nn.ModuleDict:
        """Layers q, k and v of an attention with peft's updates, their parameters among `weights`."""
        peft: Any = importlib.import_module("peft")
        weight, bias = (self.weights.pop(f"{name}.qkv.{kind}").chunk(3) for kind in ("weight", "bias"))
        a, b = self.weights.pop(f"{name}.lora.a"), self.weights.pop(f"{name}.lora.b").chunk(3)
        layers: dict[str, nn.Linear] = {}
        for part, w, c in zip("qkv", weight, bias, strict=True):
            layers[part] = nn.Linear(a.shape[1], len(w), device=w.device, dtype=w.dtype)
            with torch.no_grad():
                layers[part].weight.copy_(w)
                layers[part].bias.copy_(c)
        config = peft.LoraConfig(
            r=len(a), lora_alpha=len(a), lora_dropout=0.0, target_modules=["q", "k", "v"]
        )
        wrapped = cast(Any, peft.inject_adapter_in_model(config, nn.ModuleDict(layers)))
        with torch.no_grad():
            for part, up in zip("qkv", b, strict=True):
                wrapped[part].lora_A["default"].weight.copy_(a)
                wrapped[part].lora_B["default"].weight.copy_(up)
        wrapped.to(a.device, a.dtype)
        self.weights.update({f"{name}.{own}": p for own, p in wrapped.named_parameters()})
        return wrapped

    def heads(self, side: str, block: str, y: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, n h l c."""
        heads = (self.architecture.vision if side == "vision" else self.architecture.text).heads
        layers = self.layers[f"{block}.attention"]
        return tuple(
            layers[part](y).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for part in "qkv"
        )
