"""Scaled dot-product attention of every tower and head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention import sdpa_kernel

from discovla.ops.dispatch import SDPA, Impl, choose

HALVES = (torch.bfloat16, torch.float16)
CHUNK = 4_000_000  # scores that backward holds at once on a CPU: 16 MB


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """softmax(q kᵀ / sqrt(c) + bias + log mask) v.

    Args:
        q: n h i c.  k, v: n h j c.
        mask: bool, broadcastable to n h i j; true where a query sees a key.  Every query must see a key.
        bias: broadcastable to n h i j, in the dtype of q, without gradient.
        causal: query i sees keys j <= i only (besides `mask`).
        dropout: probability with which a softmax weight is dropped; the others are divided by 1 - dropout.
            Any value but 0 uses torch's fused attention, and so does torch.compile.
        impl: reference (plain torch), torch (its fused kernel), math, flash, cudnn or efficient (that back
            end of torch's), or auto.

    Returns:
        n h i c, in the dtype of q.
    """
    if causal and mask is not None:
        mask = mask & _causal(q.shape[-2], k.shape[-2], q.device)
        causal = False
    if bias is not None:
        if causal:
            raise ValueError("bias: expected causal=False")
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    if dropout or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    chosen = choose("attention", impl, q.device.type, operands=(q, mask))
    if chosen == "torch" and q.device.type == "cpu" and q.dtype in HALVES:
        return _HalfOnCPU.apply(q, k, v, mask, causal)
    if chosen in SDPA:
        with sdpa_kernel(SDPA[chosen]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if chosen == "torch":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return attention_reference(q, k, v, mask=mask, causal=causal)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The formula of `attention`, with every score in memory; mask: bool, or a bias in the dtype of q."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # n h i j
    if causal:
        scores = scores.masked_fill(~_causal(q.shape[-2], k.shape[-2], q.device), -torch.inf)
    return _masked(scores, mask).softmax(-1) @ v


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask (bool) applied or a bias (float) added, in place."""
    if mask is None:
        return scores
    return scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)


class _HalfOnCPU(Function):
    """torch's fused forward, and a backward of plain products, since torch's own is slow in 16 bits on a CPU.

    Scores, softmax and its gradient are in float32, the other four products in the dtype of q.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v, _causal(q.shape[-2], k.shape[-2], q.device) if causal else mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, mask = ctx.saved_tensors
        if mask is not None:
            mask = mask.expand(*q.shape[:-1], k.shape[-2])
        size = max(1, CHUNK // (q[0, ..., 0].numel() * k.shape[-2]))
        parts = [slice(first, first + size) for first in range(0, len(q), size)]
        gradients = [
            _half_gradients(q[part], k[part], v[part], None if mask is None else mask[part], grad[part])
            for part in parts
        ]
        dq, dk, dv = gradients[0] if len(parts) == 1 else map(torch.cat, zip(*gradients, strict=True))
        return dq, dk, dv, None, None


def _half_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq = dS k / sqrt(c), dk = dSᵀ q / sqrt(c), dv = Pᵀ do; dS = P (dP - sum P dP), dP = do vᵀ."""
    scale = q.shape[-1] ** -0.5
    scores = _masked((q.float() * scale) @ k.float().mT, mask)  # n h i j
    p = scores.softmax(-1)
    dv = p.to(q.dtype).mT @ grad
    dp = (grad @ v.mT).float()
    ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale).to(q.dtype)
    return ds @ k, ds.mT @ q, dv


def size_bias(sizes: Tensor | None, q: Tensor) -> Tensor | None:
    """log sizes, n l, in the shape of scores, n 1 1 l, and in the dtype of q."""
    if sizes is None:
        return None
    return sizes.to(torch.promote_types(q.dtype, torch.float32)).log()[:, None, None].to(q.dtype)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
