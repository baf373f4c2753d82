"""An activation and its derivative, element by element, between products of the vendor's library."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.mlp import activate, activation_slope
from discovla_kernels.tiles import accumulator

BLOCK = 2048  # elements of a program


@triton.jit
def _activation_forward(h_ptr, g_ptr, N, GELU: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """g = act(h).

    Tile: BLOCK elements in registers.  Backward: `_activation_backward`.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + place, mask=place < N, other=0.0).to(ACC)
    tl.store(g_ptr + place, activate(h, GELU), mask=place < N)


@triton.jit
def _activation_backward(
    dg_ptr, h_ptr, dh_ptr, N, GELU: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """dh = dg act'(h)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + place, mask=place < N, other=0.0).to(ACC)
    dg = tl.load(dg_ptr + place, mask=place < N, other=0.0).to(ACC)
    tl.store(dh_ptr + place, dg * activation_slope(h, GELU), mask=place < N)


def activation(h: Tensor, gelu: bool) -> Tensor:
    """Return act(h) of a contiguous tensor, computed in float32 at least, in the dtype of h."""
    g = torch.empty_like(h)
    grid = (triton.cdiv(h.numel(), BLOCK),)
    _activation_forward[grid](h, g, h.numel(), GELU=gelu, BLOCK=BLOCK, ACC=accumulator(h), num_warps=8)
    return g


def activation_gradient(grad: Tensor, h: Tensor, gelu: bool) -> Tensor:
    """Return grad act'(h), written over `grad`; both contiguous."""
    grid = (triton.cdiv(h.numel(), BLOCK),)
    options = {"GELU": gelu, "BLOCK": BLOCK, "ACC": accumulator(h), "num_warps": 8}
    _activation_backward[grid](grad, h, grad, h.numel(), **options)
    return grad
