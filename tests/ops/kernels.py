"""Device of the kernel tests: the GPU if there is one, else the CPU with Triton's interpreter."""

import pytest
import torch

from discovla.ops import dispatch
from discovla.ops.cuda import library
from discovla.ops.dispatch import IMPLEMENTATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runnable(op: str) -> list[str]:
    """Implementations of `op` that can run here: cuda needs a GPU, and the library built."""
    cuda_too = DEVICE == "cuda" and not library.missing()
    return [impl for impl in IMPLEMENTATIONS[op] if impl != "cuda" or cuda_too]


def skip_what_no_gpu_kernel_takes(impl: str, dtype: torch.dtype) -> None:
    """On a GPU the kernels have no float64; there float32 and benchmarks/gpu.py test them."""
    if impl in ("triton", "cuda") and dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("kernels on a GPU take no float64")


def force(monkeypatch: pytest.MonkeyPatch, impl: str, *, blocks: bool = False) -> None:
    """Let every op that has `impl` take it where it would choose itself, on a model on the CPU.

    blocks: also those of towers and heads, which take the interpreter long.
    """
    if impl in ("triton", "cuda") and DEVICE == "cuda":
        pytest.skip("the model lies on the CPU, and kernels are compiled here")
    choose = dispatch._automatic

    def named(op: str) -> tuple[str, ...]:
        return dispatch.IMPLEMENTATIONS[op] if blocks or op != "block" else ()

    monkeypatch.setattr(
        dispatch,
        "_automatic",
        lambda op, *rest: impl if impl in named(op) else choose(op, *rest),
    )
