"""Rows to FP8, each with a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel
from discovla.ops.mlp import Activation

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
LEAST = LARGEST / torch.finfo(torch.float32).max  # rows of nothing larger count as zeros: 448 / it overflows
SLOPE = 1.702  # of QuickGELU's sigmoid

Rows = tuple[Tensor, Tensor]  # t i in FP8, and the scale of each, t 1


@dataclass(frozen=True, kw_only=True)
class Through:
    """What rows pass before they are rounded: the activation of an MLP, or its derivative.

    hidden: t i; where given, rows are multiplied by the derivative there.
    """

    activation: Activation
    hidden: Tensor | None = None


def quantise_rows(
    x: Tensor, columns: Tensor | None = None, *, through: Through | None = None, impl: Impl = "auto"
) -> Rows:
    """q (t i, float8_e4m3fn) and scale (t 1) with x about scale * q: each row fills the range of FP8.

    Args:
        columns: i, float32, what columns of x are multiplied by before.
        through: what x passes before.
        impl: reference (plain torch, ten passes over the rows), triton (one), or auto.

    Raises:
        ValueError: shapes that do not fit.
        KernelUnavailable: the implementation asked for by name cannot run here.
    """
    hidden = None if through is None else through.hidden
    expect_shape("columns", columns, (x.shape[1],))
    expect_shape("hidden", hidden, tuple(x.shape))
    if choose("quantise_rows", impl, x.device.type, operands=(x, hidden)) == "triton":
        activation = "" if through is None else through.activation
        bits, scale = _quantise_rows(x.contiguous(), columns, activation, hidden)
        return bits.view(FP8), scale
    wider = x.to(sum_dtype(x)) if through is None else passed(x.to(sum_dtype(x)), through)
    wider = wider if columns is None else wider * columns
    largest = wider.abs().amax(1, keepdim=True)
    some, most = largest > LEAST, torch.full_like(largest, LARGEST)  # by a number torch divides otherwise
    scale, inverse = (torch.where(some, x, 1.0) for x in (largest / most, most / largest))
    return (wider * inverse).clamp(-LARGEST, LARGEST).to(FP8), scale


def passed(x: Tensor, through: Through) -> Tensor:
    """The activation of x, or x times its derivative at `through.hidden`; computed and returned as x is."""
    gelu = through.activation == "gelu"
    if through.hidden is None:
        return F.gelu(x) if gelu else F.silu(SLOPE * x) / SLOPE
    h = through.hidden.to(x.dtype)
    return torch.ops.aten.gelu_backward(x, h) if gelu else torch.ops.aten.silu_backward(x, SLOPE * h)


@torch.library.custom_op("discovla::quantise_rows", mutates_args=())
def _quantise_rows(
    x: Tensor, columns: Tensor | None, activation: str, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The bytes of q, t i, and scale, t 1, float32; activation: "" for none."""
    return kernel("quantise_rows").quantise_rows(x, columns, (activation, hidden), LARGEST)


@_quantise_rows.register_fake
def _(x, columns, activation, hidden):
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)
