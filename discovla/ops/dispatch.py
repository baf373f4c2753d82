"""The one table of ops and their implementations, and the one function that chooses between them.

On a GPU "auto" takes what `use_choices` was given: for each op, dtype and size the implementation that was
right and fastest there (`discovla.tune` measures it).  Without a measurement it takes that of AUTO.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from discovla.ops.cuda import library

logger = logging.getLogger(__name__)

# names of implementations; CANDIDATES says what each is for an op
Impl = Literal[
    "auto", "reference", "torch", "compiled", "ops", "triton", "cuda",
    "cublas", "chunks", "fast", "tensor",
    "math", "flash", "cudnn", "efficient", "varlen", "flash_attn", "quack",
]  # fmt: skip
# modes of `nn.memory`: what a transformer block keeps for backward
Memory = Literal["auto", "keep", "recompute_mlp", "recompute_projections", "recompute_blocks"]

# op -> its candidates, the default plain torch first, and what computes each
CANDIDATES: dict[str, dict[str, str]] = {
    "alignment_losses": {
        "reference": "matrices in memory",
        "torch": "blocks of pairs, computed again in backward",
        "triton": "blocks of pairs in one kernel each, or one kernel for a small batch",
        "chunks": "larger blocks: the vendor's products, all else fused by torch.compile",
        "compiled": "the reference under torch.compile",
    },
    "attention": {
        "reference": "scores in memory",
        "torch": "torch's fused attention, by the back end that torch chooses",
        "math": "torch's back end with scores in memory",
        "flash": "torch's flash attention",
        "cudnn": "cuDNN's attention through torch",
        "efficient": "torch's memory-efficient attention",
    },
    "block": {
        "reference": "ops by their references",
        "torch": "plain torch, attention padded",
        "triton": "ops by their kernels",
        "compiled": "plain torch under torch.compile",
        "ops": "each op by its own choice",
    },
    "fp8_linear": {
        "reference": "8-bit numbers multiplied in float32",
        "torch": "torch._scaled_mm with a scale a row",
        "triton": "the same, rows rounded by a kernel",
        "fast": "the same with the hardware's fast sums",
        "tensor": "torch._scaled_mm with fast sums, and one scale for all rows",
    },
    "frame_patches": {
        "reference": "plain torch",
        "triton": "one kernel",
    },
    "frame_similarity": {
        "reference": "all products in memory",
        "torch": "blocks of pairs, computed again in backward",
        "triton": "blocks of pairs in one kernel each",
        "chunks": "larger blocks: the vendor's products, all else fused by torch.compile",
        "compiled": "the reference under torch.compile",
    },
    "fusion_norm": {
        "reference": "plain torch",
        "triton": "one kernel",
    },
    "info_nce": {
        "reference": "the matrix in memory",
        "torch": "blocks of pairs, computed again in backward",
        "triton": "blocks of pairs in one kernel each",
        "chunks": "larger blocks: the vendor's products, all else fused by torch.compile",
        "compiled": "the reference under torch.compile",
    },
    "late_interaction": {
        "reference": "all products in memory",
        "torch": "blocks of pairs, computed again in backward",
        "triton": "blocks of pairs in one kernel each",
    },
    "layer_norm": {
        "reference": "plain torch",
        "triton": "one kernel",
        "compiled": "the reference under torch.compile",
    },
    "lora_norm": {
        "reference": "plain torch",
        "triton": "one kernel",
        "compiled": "the reference under torch.compile",
    },
    "merge_tokens": {
        "reference": "products with one-hot rows",
        "torch": "scatters",
        "triton": "one kernel",
    },
    "mlp": {
        "reference": "plain torch",
        "triton": "Triton's products with the activation in their epilogue",
        "compiled": "the reference under torch.compile",
        "cublas": "the vendor's products, and one kernel for the activation",
        "quack": "QuACK's products with the activation in their epilogue",
    },
    "preprocess_frames": {
        "reference": "plain torch",
        "triton": "one kernel",
    },
    "quantise_rows": {
        "reference": "plain torch",
        "triton": "one kernel",
    },
    "rank_of_positive": {
        "reference": "scores in memory",
        "torch": "scores of some queries at a time",
        "triton": "tiles of scores in one kernel",
    },
    "readout_attention": {
        "reference": "scores in memory",
        "torch": "torch's fused attention on padded rows",
        "triton": "one kernel",
        "math": "torch's back end with scores in memory, on padded rows",
        "efficient": "torch's memory-efficient attention on padded rows",
    },
    "readout_lora_norm": {
        "reference": "plain torch",
        "triton": "one kernel",
        "compiled": "the reference under torch.compile",
    },
    "short_attention": {
        "reference": "scores in memory, packed rows padded",
        "torch": "torch's fused attention, packed rows padded",
        "triton": "one kernel, nothing padded",
        "math": "torch's back end with scores in memory, packed rows padded",
        "flash": "torch's flash attention, of rows that are not packed",
        "cudnn": "cuDNN's attention through torch, of rows that are not packed",
        "efficient": "torch's memory-efficient attention, packed rows padded",
        "varlen": "torch.nn.attention.varlen, of packed rows",
        "flash_attn": "the package flash-attn, nothing padded",
    },
    "sigmoid_loss": {
        "reference": "logits in memory",
        "torch": "blocks of pairs, their gradients beside the loss",
        "chunks": "larger blocks: the vendor's products, all else fused by torch.compile",
    },
    "soft_vlad": {
        "reference": "plain torch",
        "torch": "some samples at a time",
        "triton": "one kernel",
    },
    "temporal_fusion": {  # all but reference and triton attend across frames by torch's fused attention
        "reference": "scores in memory, packed rows padded",
        "torch": "torch's fused attention, packed rows padded",
        "triton": "one kernel for both, nothing padded",
        "math": "within frames as short_attention's math",
        "flash": "within frames as short_attention's flash",
        "cudnn": "within frames as short_attention's cudnn",
        "efficient": "within frames as short_attention's efficient",
        "varlen": "within frames as short_attention's varlen",
        "flash_attn": "within frames as short_attention's flash_attn",
    },
    "token_communication": {
        "reference": "all products in memory",
        "torch": "blocks of pairs, computed again in backward",
    },
    "token_similarity": {
        "reference": "all products in memory",
        "torch": "blocks of pairs, computed again in backward",
        "triton": "blocks of pairs in one kernel each",
    },
    "token_training_similarity": {
        "reference": "all products in memory",
        "torch": "blocks of pairs, computed again in backward",
        "triton": "blocks of pairs in one kernel each",
    },
    "top_k": {
        "reference": "scores in memory",
        "torch": "scores of some queries at a time",
        "cuda": "tiles of scores in one kernel, in CUDA C++",
    },
    "unit_mean": {
        "reference": "plain torch",
        "triton": "one kernel",
        "compiled": "the reference under torch.compile",
    },
}
OWN = (
    "reference",
    "torch",
    "triton",
    "cuda",
    "cublas",
)  # the other candidates are those of compilers and libraries
# op -> its implementations in this repository
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    op: tuple(name for name in names if name in OWN) for op, names in CANDIDATES.items()
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
    "merge_tokens": "merge_tokens",
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
# op -> device -> the implementation that `auto` takes without a measurement; "reference" if not listed
AUTO: dict[str, dict[str, str]] = {
    "alignment_losses": {"cpu": "torch", "cuda": "torch"},
    "attention": {"cpu": "torch", "cuda": "torch"},
    "block": {"cpu": "torch", "cuda": "compiled", "meta": "torch"},
    "fp8_linear": {"cpu": "reference", "cuda": "torch"},
    "frame_similarity": {"cpu": "torch", "cuda": "torch"},
    "info_nce": {"cpu": "torch", "cuda": "torch"},
    "late_interaction": {"cpu": "torch", "cuda": "torch"},
    "merge_tokens": {"cpu": "torch", "cuda": "torch", "meta": "torch"},
    "rank_of_positive": {"cpu": "torch", "cuda": "torch"},
    "readout_attention": {"cpu": "torch", "cuda": "torch"},
    "short_attention": {"cpu": "torch", "cuda": "torch"},
    "sigmoid_loss": {"cpu": "torch", "cuda": "torch"},
    "soft_vlad": {"cpu": "torch", "cuda": "torch"},
    "temporal_fusion": {"cpu": "torch", "cuda": "torch"},
    "token_communication": {"cpu": "torch", "cuda": "torch"},
    "token_similarity": {"cpu": "torch", "cuda": "torch"},
    "token_training_similarity": {"cpu": "torch", "cuda": "torch"},
    "top_k": {"cpu": "torch", "cuda": "torch"},
}

# an op that shares the weights of another takes its choice
SHARED = {"readout_lora_norm": "lora_norm"}
ROWS = {
    "fp8_linear",
    "layer_norm",
    "fusion_norm",
    "lora_norm",
    "mlp",
}  # ops of rows, whatever axes these have
SDPA = {  # torch's back ends of attention
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MEASURED_ON = ("cuda",)  # devices on which `auto` takes measured choices

# an op with the dtype and axes of its first operand but the leading one, and that one
Problem = tuple[str, int]
# Problem[0] -> number of rows, as text -> implementation
Choices = Mapping[str, Mapping[str, str]]

_choices: dict[str, dict[int, str]] = {}
_observed: list[Problem] | None = None


class KernelUnavailable(RuntimeError):
    """An implementation asked for by name does not exist or cannot run."""


def choose(
    op: str, impl: str, device_type: str, *, small: bool = False, operands: Sequence[Tensor | None] = ()
) -> str:
    """Name the implementation that serves `op` on a device.

    Args:
        op: name of the op, a key of CANDIDATES.
        impl: "auto", or an implementation, which is then never replaced by another.
        device_type: "cpu" or "cuda".
        small: True if the op is one block, so that streaming has no point.
        operands: tensors for the kernel, in the order of its `unsupported`.

    Raises:
        KernelUnavailable: `impl` is not among the op's implementations, or cannot run here.
    """
    if _observed is not None and operands:
        _observed.append(problem(op, operands))
    if impl == "auto" or (impl == "ops" and op != "block"):
        return _automatic(op, device_type, small, operands)
    if impl not in implementations(op):
        known = ", ".join(("auto", *implementations(op)))
        raise KernelUnavailable(f"{op}: no implementation {impl!r}; use one of {known}")
    if reason := unavailable(op, impl, device_type, operands):
        raise KernelUnavailable(f"{op}: impl={impl!r}: {reason}")
    return impl


def describe(impl: str, device_type: str) -> str:
    """Name the implementations that an option `impl` stands for on a device, for a reader."""
    if impl != "auto":
        return impl
    named: dict[str, list[str]] = {}
    for op in IMPLEMENTATIONS:
        default = AUTO.get(op, {}).get(device_type, "reference")
        sizes = [by for key, by in _choices.items() if key.split()[0] == op and device_type in MEASURED_ON]
        for name in sorted({x for by in sizes for x in by.values()} or {default}):
            named.setdefault(name, []).append(op)
    parts = [
        f"{name} for {', '.join(ops)}" for name, ops in named.items() if name not in ("torch", "reference")
    ]
    return f"auto: {'; '.join(parts) or 'PyTorch for every op'}"


def implementations(op: str) -> tuple[str, ...]:
    """Return the names of all implementations of an op, whether they can run here or not."""
    return tuple(CANDIDATES[op])


def problem(op: str, operands: Sequence[Tensor | None]) -> Problem:
    """Return what a choice is measured for: op, dtype and inner axes, and the length of the first axis."""
    first, op = operands[0], SHARED.get(op, op)
    assert first is not None, op
    if op in ROWS:
        first = first.flatten(0, -2)
    axes = "x".join(str(size) for size in first.shape[1:])
    return f"{op} {str(first.dtype)[6:]} {axes}", len(first)


def use_choices(choices: Choices) -> None:
    """Let `auto` take these measured choices on GPUs, in place of all earlier ones.

    A size between measured ones takes the nearest, by the ratio; other dtypes and axes take that of AUTO.
    """
    _choices.clear()
    _choices.update({key: {int(rows): x for rows, x in by.items()} for key, by in choices.items()})


@contextmanager
def observed_problems() -> Iterator[list[Problem]]:
    """Collect the problems that ops choose an implementation for."""
    global _observed
    outer, _observed = _observed, []
    try:
        yield _observed
    finally:
        _observed = outer


def cache_folder() -> Path:
    """Return the user's folder of measured choices and compiled code: DISCOVLA_CACHE, or the platform's."""
    if folder := os.environ.get("DISCOVLA_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "discovla"


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function under torch.compile; its code is kept on disk in `cache_folder`."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(64, dynamo.recompile_limit)  # blocks of two towers, with their tails
    return torch.compile(function)


def run_reference(chosen: str, reference: Callable[..., Any], *inputs: Any) -> Any:
    """Call the reference of an op, under torch.compile if "compiled" was chosen."""
    return (compiled(reference) if chosen == "compiled" else reference)(*inputs)


@cache
def compile_fails(device: torch.device) -> str:
    """Return why torch.compile of a small product and its backward fails on a device, or ""."""

    def step(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x @ x).softmax(-1).sum()

    try:
        x = torch.ones(16, 16, device=device, requires_grad=True)
        compiled(step)(x).backward()
    except (RuntimeError, ImportError, OSError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def kernel(op: str, impl: str = "triton") -> ModuleType:
    """Import and return the module with the kernels of `op`; triton is not imported before this."""
    if impl == "cuda":
        return importlib.import_module(f"discovla.ops.cuda.{op}")
    return importlib.import_module(f"discovla_kernels.{KERNELS[op]}")


def _automatic(op: str, device_type: str, small: bool, operands: Sequence[Tensor | None]) -> str:
    if _choices and operands and device_type in MEASURED_ON:
        measured = _measured(op, operands)
        if measured is not None and not unavailable(op, measured, device_type, operands):
            return measured
    chosen = AUTO.get(op, {}).get(device_type, "reference")
    if small and chosen == "torch" and op in KERNELS:
        return "reference"
    if chosen == "triton" and (reason := _triton_unavailable(op, device_type, operands)):
        warn_once(f"{op}: plain torch instead of the kernel: {reason}")
        return "torch"
    return chosen


def _measured(op: str, operands: Sequence[Tensor | None]) -> str | None:
    """Return the choice measured at the nearest size, None if there is none."""
    key, rows = problem(op, operands)
    sizes = _choices.get(key)
    if not sizes:
        return None
    return sizes[min(sizes, key=lambda size: abs(math.log(size / max(1, rows))))]


def unavailable(op: str, impl: str, device_type: str, operands: Sequence[Tensor | None]) -> str:
    """Return why an implementation cannot run, or ""; `operands` as for `choose`."""
    if impl in ("triton", "cublas", "fast"):
        return _triton_unavailable(op, device_type, operands)
    if impl == "cuda":
        return _cuda_unavailable(op, device_type, operands)
    if impl in SDPA or impl in LIBRARIES:
        return _library_unavailable(op, impl, device_type, operands)
    return ""


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


# op -> the places among its operands of a mask within sequences and of the offsets of packed rows
MASK_AND_OFFSETS = {
    "attention": (1, None),
    "readout_attention": (4, 3),
    "short_attention": (1, 2),
    "temporal_fusion": (3, 2),
}
# implementation -> the module it needs, and how it is installed
LIBRARIES = {
    "varlen": ("torch.nn.attention.varlen", "torch >= 2.13 has it"),
    "flash_attn": ("flash_attn", "pip install 'discovla[flash]'"),
    "quack": ("quack", "pip install 'discovla[quack]'"),
}


def _library_unavailable(op: str, impl: str, device_type: str, operands: Sequence[Tensor | None]) -> str:
    """Return why a library, or a back end of torch's attention, cannot run, or ""."""
    if impl == "math":
        return ""
    if impl in LIBRARIES and not _installed(LIBRARIES[impl][0]):
        return f"{LIBRARIES[impl][0]} is not installed: {LIBRARIES[impl][1]}"
    if device_type != "cuda":
        return f"it needs a CUDA device, found {device_type}"
    if not operands or impl == "efficient":
        return ""
    if operands[0] is not None and operands[0].element_size() != 2:
        return f"it takes float16 and bfloat16, found {operands[0].dtype}"
    mask, offsets = MASK_AND_OFFSETS.get(op, (None, None))
    packed = offsets is not None and operands[offsets] is not None
    if mask is not None and operands[mask] is not None:
        return "it takes no mask"
    if op == "short_attention" and len(operands) > 3 and operands[3] is not None:
        return "it takes no sizes of keys"
    if impl in ("flash", "cudnn") and packed:
        return "it takes no packed sequences"
    if impl == "varlen" and not packed:
        return "it takes packed sequences"
    return ""


@cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would contain it
        return False


@cache
def warn_once(message: str) -> None:
    """Log a warning, the same text once in a process."""
    logger.warning(message)
