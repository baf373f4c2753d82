"""Scaled dot-product attention, the one door every tower and head goes through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.dispatch import Impl, choose


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, impl: Impl = "auto"
) -> Tensor:
    """softmax(q kᵀ / sqrt(c) + log mask) v.

    Args:
        q: n h i c.  k, v: n h j c.
        mask: bool, broadcastable to n h i j; true where a query may see a key.  Every query must see one key.
        causal: query i sees keys j <= i only (besides `mask`).
        impl: reference (plain torch), torch (its fused kernel) or auto.

    Returns:
        n h i c, in the dtype of q.
    """
    chosen = choose("attention", impl, q.device.type)
    if causal and mask is not None:
        mask = mask & _causal(q.shape[-2], k.shape[-2], q.device)
        causal = False
    if chosen == "torch":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return attention_reference(q, k, v, mask=mask, causal=causal)


def attention_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, *, mask: Tensor | None = None
) -> Tensor:
    """`attention` in training: a weight is dropped with probability `dropout`, else over 1 - dropout."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The formula of `attention`, with every score in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # n h i j
    if causal:
        scores = scores.masked_fill(~_causal(q.shape[-2], k.shape[-2], q.device), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
