"""The k best items of every query, by csrc/top_k.cu."""

from __future__ import annotations

from torch import Tensor

from discovla.ops.cuda.library import align_rows, ops, unsupported_tensors


def unsupported(query: Tensor, items: Tensor, groups: Tensor | None) -> str:
    """Return why the kernel cannot take these tensors, or ""."""
    return unsupported_tensors(query, items, groups)


def best(query: Tensor, items: Tensor, k: int, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scores n k, float32, and indices n k, int64, of unit rows n d and m d."""
    groups = None if groups is None else groups.contiguous()
    return ops().top_k(align_rows(query), align_rows(items), k, groups)
