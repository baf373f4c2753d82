"""The one table of ops and their implementations, and the one function that chooses between them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Literal

from torch import Tensor

from discovla.ops.cuda import library

logger = logging.getLogger(__name__)

Impl = Literal["auto", "reference", "torch", "triton", "cuda"]
# modes of `nn.memory`: what a transformer block keeps for backward
Memory = Literal["auto", "keep", "recompute_mlp", "recompute_projections", "recompute_blocks"]

# op -> its implementations
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "alignment_losses": ("reference", "torch", "triton"),
    "attention": ("reference", "torch"),
    "block": ("reference", "torch", "triton"),
    "fp8_linear": ("reference", "torch", "triton"),
    "frame_patches": ("reference", "triton"),
    "frame_similarity": ("reference", "torch", "triton", "cuda"),
    "fusion_norm": ("reference", "triton"),
    "info_nce": ("reference", "torch", "triton"),
    "late_interaction": ("reference", "torch", "triton"),
    "layer_norm": ("reference", "triton"),
    "lora_norm": ("reference", "triton"),
    "mlp": ("reference", "triton"),
    "preprocess_frames": ("reference", "triton"),
    "quantise_rows": ("reference", "triton"),
    "rank_of_positive": ("reference", "torch", "triton", "cuda"),
    "readout_attention": ("reference", "torch", "triton"),
    "readout_lora_norm": ("reference", "triton"),
    "short_attention": ("reference", "torch", "triton"),
    "soft_vlad": ("reference", "torch", "triton"),
    "temporal_fusion": ("reference", "torch", "triton"),
    "token_communication": ("reference", "torch"),
    "token_similarity": ("reference", "torch", "triton"),
    "token_training_similarity": ("reference", "torch", "triton"),
    "top_k": ("reference", "torch", "cuda"),
    "unit_mean": ("reference", "triton"),
}
# op -> the module of discovla_kernels with its kernels
KERNELS: dict[str, str] = {
    "alignment_losses": "alignment_block",
    "block": "layer_norm",
    "fp8_linear": "quantise_rows",
    "frame_patches": "preprocess_frames",
    "frame_similarity": "frame_similarity",
    "fusion_norm": "fusion_norm",
    "info_nce": "contrastive",
    "late_interaction": "late_interaction",
    "layer_norm": "layer_norm",
    "lora_norm": "lora_norm",
    "mlp": "mlp",
    "preprocess_frames": "preprocess_frames",
    "quantise_rows": "quantise_rows",
    "rank_of_positive": "rank_of_positive",
    "readout_attention": "readout_attention",
    "readout_lora_norm": "lora_norm",
    "short_attention": "short_attention",
    "soft_vlad": "soft_vlad",
    "temporal_fusion": "temporal_fusion",
    "token_similarity": "token_similarity",
    "token_training_similarity": "token_similarity",
    "unit_mean": "unit_mean",
}
# op -> device -> the implementation that `auto` takes; "reference" if not listed.
# No kernel has run on a GPU yet, only in the interpreter.  After `benchmarks/gpu.py --suite check` has passed
# on one, "cuda" becomes "triton" for ops that it measured as faster.
AUTO: dict[str, dict[str, str]] = {
    "alignment_losses": {"cpu": "torch", "cuda": "torch"},
    "attention": {"cpu": "torch", "cuda": "torch"},
    "block": {"cpu": "torch", "cuda": "torch", "meta": "torch"},
    "fp8_linear": {"cpu": "reference", "cuda": "torch"},
    "frame_similarity": {"cpu": "torch", "cuda": "torch"},
    "info_nce": {"cpu": "torch", "cuda": "torch"},
    "late_interaction": {"cpu": "torch", "cuda": "torch"},
    "rank_of_positive": {"cpu": "torch", "cuda": "torch"},
    "readout_attention": {"cpu": "torch", "cuda": "torch"},
    "short_attention": {"cpu": "torch", "cuda": "torch"},
    "soft_vlad": {"cpu": "torch", "cuda": "torch"},
    "temporal_fusion": {"cpu": "torch", "cuda": "torch"},
    "token_communication": {"cpu": "torch", "cuda": "torch"},
    "token_similarity": {"cpu": "torch", "cuda": "torch"},
    "token_training_similarity": {"cpu": "torch", "cuda": "torch"},
    "top_k": {"cpu": "torch", "cuda": "torch"},
}


class KernelUnavailable(RuntimeError):
    """An implementation asked for by name does not exist or cannot run."""


def choose(
    op: str, impl: str, device_type: str, *, small: bool = False, operands: Sequence[Tensor | None] = ()
) -> str:
    """Name the implementation that serves `op` on a device.

    Args:
        op: name of the op, a key of IMPLEMENTATIONS.
        impl: "auto", or an implementation, which is then never replaced by another.
        device_type: "cpu" or "cuda".
        small: True if the op is one block, so that streaming has no point.
        operands: tensors for the kernel, in the order of its `unsupported`.

    Raises:
        KernelUnavailable: `impl` is not among the op's implementations, or cannot run here.
    """
    if impl == "auto":
        return _automatic(op, device_type, small, operands)
    if impl not in IMPLEMENTATIONS[op]:
        known = ", ".join(("auto", *IMPLEMENTATIONS[op]))
        raise KernelUnavailable(f"{op}: no implementation {impl!r}; use one of {known}")
    unavailable = {"triton": _triton_unavailable, "cuda": _cuda_unavailable}.get(impl)
    if unavailable is not None and (reason := unavailable(op, device_type, operands)):
        raise KernelUnavailable(f"{op}: impl={impl!r}: {reason}")
    return impl


def describe(impl: str, device_type: str) -> str:
    """Name the implementations that an option `impl` stands for on a device, for a reader."""
    if impl != "auto":
        return impl
    ops: dict[str, list[str]] = {"triton": [], "cuda": []}
    for op in IMPLEMENTATIONS:
        ops.get(AUTO.get(op, {}).get(device_type, "reference"), []).append(op)
    named = [f"{kernels} for {', '.join(names)}" for kernels, names in ops.items() if names]
    return f"auto: {'; '.join(named) or 'PyTorch for every op'}"


def kernel(op: str, impl: str = "triton") -> ModuleType:
    """Import and return the module with the kernels of `op`; triton is not imported before this."""
    if impl == "cuda":
        return importlib.import_module(f"discovla.ops.cuda.{op}")
    return importlib.import_module(f"discovla_kernels.{KERNELS[op]}")


def _automatic(op: str, device_type: str, small: bool, operands: Sequence[Tensor | None]) -> str:
    chosen = AUTO.get(op, {}).get(device_type, "reference")
    if small and chosen == "torch" and op in KERNELS:
        return "reference"
    if chosen == "triton" and (reason := _triton_unavailable(op, device_type, operands)):
        _warn_once(f"{op}: plain torch instead of the kernel: {reason}")
        return "torch"
    return chosen


def _triton_unavailable(op: str, device_type: str, operands: Sequence[Tensor | None]) -> str:
    """Return why the Triton kernel of `op` cannot run, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a CUDA device, or TRITON_INTERPRET=1 in the environment before Python starts"
    return kernel(op).unsupported(*operands) if operands else ""


def _cuda_unavailable(op: str, device_type: str, operands: Sequence[Tensor | None]) -> str:
    """Return why the CUDA kernel of `op` cannot run, or ""."""
    if device_type != "cuda":
        return f"its tensors are on {device_type}: move them to a CUDA device, or use impl='torch'"
    if reason := library.missing():
        return reason
    return kernel(op, "cuda").unsupported(*operands) if operands else ""


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
