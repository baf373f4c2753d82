"""The precision that a run computes in, as its config says."""

from __future__ import annotations

import torch

from discovla.engine.strategy import cast_frozen
from discovla.engine.zero import EngineConfig
from discovla.methods.base import Method
from discovla.nn.precision import quantise_frozen, widen_residual


def set_precision(method: Method, engine: EngineConfig, device: torch.device) -> None:
    """Let a method compute in the config's precision, before it moves to the device it will be on.

    Raises:
        ValueError: nothing is frozen that could be in FP8, or the device has no FP8.
    """
    if engine.precision == "fp32":
        return
    method.compute_dtype = torch.bfloat16
    if engine.residual == "fp32":
        for tower in (method.vision, method.text):
            widen_residual(tower, torch.bfloat16)
    if engine.precision.startswith("fp8"):
        try:
            impl = "triton" if engine.impl == "triton" else "auto"
            quantise_frozen(method, device, backward=engine.precision == "fp8_backward", impl=impl)
        except ValueError as error:
            raise ValueError(f"engine.precision: {error}") from None
    if not engine.bf16_parameters:
        cast_frozen(method, torch.bfloat16)
