"""The implementations of a training step that take turns in `train_step.py`, each with weights of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import peft_step, step_inputs
from benchmarks.peft_step import PeftStep
from benchmarks.product_step import ProductStep
from benchmarks.reference_step import ReferenceStep, compiled
from discovla.batch import Batch, Losses
from discovla.engine.capture import make_capture
from discovla.engine.config import EngineConfig
from discovla.engine.distributed import World
from discovla.methods.discovla import DiscoVLA
from discovla.ops.fp8_linear import fp8_unsupported
from discovla.towers.architecture import Architecture
from discovla.train_step import TrainStep, set_precision

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
    "ours bf16 triton",
    "ours fp8",
    "ours bf16 captured",
    "ours bf16 triton captured",
    "ours fp8 backward",
    "ours fp8 backward triton",
    "ours fp8 backward triton captured",
    "products alone",
    "products alone bf16",
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """call: forward and backward.  forward: the losses alone.  parameters: what is there anyway.

    calls: until it runs as it will.  anew: forgets what these have recorded.
    """

    call: Callable[[Batch], object]
    forward: Callable[[Batch], object]
    parameters: list[torch.Tensor]
    calls: int = 1
    anew: Callable[[], None] = lambda: None


def unavailable(name: str, device: str) -> str:
    """Why an implementation is not timed here, in one line; empty where it can be."""
    if name.startswith("peft"):
        return peft_step.absent()
    gpus = {
        "compiled": "torch.compile's fastest mode is timed on GPUs alone",
        "fp8": "a CPU has no product in FP8, it is emulated there",
        "triton": "its kernels run on GPUs",
        "captured": "CUDA graphs are recorded on GPUs",
    }
    if device == "cpu":
        return next((reason for word, reason in gpus.items() if word in name), "")
    return fp8_unsupported(torch.device(device)) if "fp8" in name else ""


def make_step(name: str, architecture: Architecture, device: str) -> Step:
    """The step of that name; all start from equal weights.

    Raises:
        ValueError: an unknown name.
    """
    if name not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, found {name!r}")
    if name.startswith("ours"):
        return _ours(name, architecture, device)
    if name.startswith("products"):
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        products = ProductStep(architecture, dtype=dtype, device=device)
        return Step(call=products, forward=products, parameters=[])
    how = {"sdpa": "sdpa" in name, "autocast": torch.bfloat16 if "bf16" in name else None}
    model = step_inputs.method(architecture, device=device)
    if name.startswith("peft"):
        reference = PeftStep(model, **how)
    else:
        reference = ReferenceStep(model, anomaly="anomaly" in name, **how)
    call = compiled(reference) if "compiled" in name else reference
    return Step(call=call, forward=reference.losses, parameters=list(reference.weights.values()))


def _ours(name: str, architecture: Architecture, device: str) -> Step:
    model = step_inputs.method(architecture, device=device)
    words = {"fp8 backward": "fp8_backward", "fp8": "fp8", "bf16": "bf16", "": "fp32"}
    precision = next(value for word, value in words.items() if word in name)
    impl = "triton" if "triton" in name else "auto"
    config = EngineConfig.model_validate({"precision": precision, "impl": impl})
    set_precision(model, config, torch.device(device))
    model.vision.impl = model.text.impl = impl
    if "captured" in name:
        captured = _Captured(model, torch.device(device))
        return Step(
            call=captured,
            forward=captured.step.losses,
            parameters=list(model.parameters()),
            calls=2,
            anew=captured.anew,
        )
    return Step(
        call=lambda batch: step_inputs.step(model, batch),
        forward=lambda batch: _losses(model, batch),
        parameters=list(model.parameters()),
    )


def _losses(model: DiscoVLA, batch: Batch) -> Losses:
    return model.losses(*model.encode(batch))


class _Captured:
    """Our step as engine.capture = "graph" takes it."""

    def __init__(self, model: DiscoVLA, device: torch.device) -> None:
        self.step = TrainStep(model, World(rank=0, size=1, local_rank=0, device=device), "exact")
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.anew()

    def anew(self) -> None:
        """Forget what was recorded."""
        engine = EngineConfig(capture="graph")
        self.capture = make_capture(self.step.losses, self.trained, engine, self.step.world)

    def __call__(self, batch: Batch) -> None:
        for parameter in self.trained:
            parameter.grad = None
        assert self.capture is not None, "the config asks for it"
        self.capture(batch).total.backward()
