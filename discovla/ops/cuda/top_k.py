"""The k best items of every query, by csrc/top_k.cu."""

from __future__ import annotations

from torch import Tensor

from discovla.ops.cuda.library import ops, rows, unsupported_tensors


def unsupported(query: Tensor, items: Tensor, groups: Tensor | None) -> str:
    """Why the kernel does not take these; empty where it does."""
    return unsupported_tensors(query, items, groups)


def best(query: Tensor, items: Tensor, k: int, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores n k, float32, and indices n k, int64, of unit rows n d and m d."""
    return ops().top_k(rows(query), rows(items), k, None if groups is None else groups.contiguous())
