"""The compiled kernels of csrc/ as torch.ops.discovla, loaded on first use."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.cuda.build import LIBRARY

REMEDY = "`python -m discovla.ops.cuda.build` builds it where nvcc is installed"


def missing() -> str:
    """Load the library; return why that failed, or ""."""
    if not LIBRARY.is_file():
        return f"the CUDA library is not built: {REMEDY}"
    try:
        _load()
    except OSError as error:
        return f"{LIBRARY}: {str(error).splitlines()[0]}; {REMEDY}"
    return ""


def ops() -> Any:
    """Return torch.ops.discovla with the kernels registered."""
    _load()
    return torch.ops.discovla


def unsupported_tensors(*tensors: Tensor | None) -> str:
    """Return why no CUDA kernel can take these tensors, or ""."""
    present = [x for x in tensors if x is not None]
    embeddings = [x for x in present if x.is_floating_point()]
    if len(dtypes := {x.dtype for x in embeddings}) > 1:
        return f"expected all embeddings in one dtype, found {sorted(map(str, dtypes))}"
    if embeddings[0].dtype == torch.float64:
        return "float64 has no kernel on a GPU: impl='torch' computes it"
    for x in present:
        if x.device != present[0].device:
            return f"expected all tensors on {present[0].device}, found one on {x.device}"
    if (capability := torch.cuda.get_device_capability(present[0].device)) < (8, 0):
        return f"expected a GPU of compute capability 8.0 or later, found {capability[0]}.{capability[1]}"
    return ""


def align_rows(x: Tensor) -> Tensor:
    """Return `x` contiguous and aligned, its rows zero-padded to a multiple of 16 bytes."""
    x = F.pad(x, (0, -x.shape[-1] % (16 // x.element_size()))).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@cache
def _load() -> None:
    """Load the library and register output shapes, for torch.compile and meta tensors."""
    torch.ops.load_library(LIBRARY)
    for name, fake in FAKES.items():
        torch.library.register_fake(f"discovla::{name}", fake)


def _top_k(query, items, k, groups):
    values = query.new_empty(query.shape[0], k, dtype=torch.float32)
    return values, torch.empty_like(values, dtype=torch.int64)


FAKES = {"top_k": _top_k}
