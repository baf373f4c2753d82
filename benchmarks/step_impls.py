"""The implementations of a training step that take turns in `train_step.py`, each with weights of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import peft_step, step_inputs
from benchmarks.peft_step import PeftStep
from benchmarks.reference_step import ReferenceStep, compiled
from discovla.batch import Batch, Losses
from discovla.engine.strategy import cast_frozen
from discovla.methods.discovla import DiscoVLA
from discovla.towers.architecture import Architecture

BASE = "reference"
IMPLS = (
    BASE,
    "reference anomaly",
    "reference bf16 sdpa",
    "reference bf16 sdpa compiled",
    "peft",
    "peft bf16 sdpa",
    "ours",
    "ours bf16",
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """call: forward and backward.  forward: the losses alone.  parameters: what is there anyway."""

    call: Callable[[Batch], object]
    forward: Callable[[Batch], object]
    parameters: list[torch.Tensor]


def unavailable(name: str, device: str) -> str:
    """Why an implementation is not timed here, in one line; empty where it can be."""
    if name.startswith("peft"):
        return peft_step.absent()
    if "compiled" in name and device == "cpu":
        return "torch.compile's fastest mode is timed on GPUs alone"
    return ""


def make_step(name: str, architecture: Architecture, device: str) -> Step:
    """The step of that name; all start from equal weights.

    Raises:
        ValueError: an unknown name.
    """
    if name not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, found {name!r}")
    if name.startswith("ours"):
        return _ours(name, architecture, device)
    how = {"sdpa": "sdpa" in name, "autocast": torch.bfloat16 if "bf16" in name else None}
    model = step_inputs.method(architecture, device=device)
    if name.startswith("peft"):
        reference = PeftStep(model, **how)
    else:
        reference = ReferenceStep(model, anomaly="anomaly" in name, **how)
    call = compiled(reference) if "compiled" in name else reference
    return Step(call=call, forward=reference.losses, parameters=list(reference.weights.values()))


def _ours(name: str, architecture: Architecture, device: str) -> Step:
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    model = step_inputs.method(architecture, dtype=dtype, device=device)
    cast_frozen(model, dtype)
    return Step(
        call=lambda batch: step_inputs.step(model, batch),
        forward=lambda batch: _losses(model, batch),
        parameters=list(model.parameters()),
    )


def _losses(model: DiscoVLA, batch: Batch) -> Losses:
    return model.losses(*model.encode(batch))
