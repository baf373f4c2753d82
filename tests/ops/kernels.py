"""Where the tests of kernels run: on the GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def skip_what_no_gpu_kernel_takes(impl: str, dtype: torch.dtype) -> None:
    """On a GPU the kernels have no float64; there float32 and benchmarks/gpu.py test them."""
    if impl == "triton" and dtype == torch.float64 and DEVICE == "cuda":
        pytest.skip("kernels on a GPU take no float64")
