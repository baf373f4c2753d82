"""A linear map by a frozen weight in FP8: one scale for each output, and one for each row of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from discovla.ops.blocks import expect_shape, wide
from discovla.ops.dispatch import Impl, choose

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
HOPPER = (9, 0)
MULTIPLE = 16  # the product wants sizes of the weight to be multiples of that


@dataclass(frozen=True, kw_only=True)
class FP8Weight:
    """A frozen weight o i as diag(scale) q.

    bits: o i, uint8, the bytes of q in float8_e4m3fn (collectives know no float8).
    scale: o, float32, powers of two: so `plain` is exact in bfloat16 and wider.
    plain: o i, diag(scale) q as a tensor of the dtype that gradients are computed in.
    """

    bits: Tensor
    scale: Tensor
    plain: Tensor

    def __getitem__(self, outputs: slice) -> FP8Weight:
        """Some of its outputs."""
        return FP8Weight(bits=self.bits[outputs], scale=self.scale[outputs], plain=self.plain[outputs])


def quantise_weight(weight: Tensor) -> FP8Weight:
    """The FP8 weight closest to `weight`, o i, whose every row fills the range of FP8 to half at least."""
    largest = weight.detach().to(wide(weight)).abs().amax(1)
    _, exponent = torch.frexp(largest / LARGEST)
    scale = torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)
    q = (weight.detach() / scale[:, None]).to(FP8)
    plain = (q.to(scale.dtype) * scale[:, None]).to(weight.dtype)
    return FP8Weight(bits=q.view(torch.uint8), scale=scale.float(), plain=plain)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """q (t i, float8_e4m3fn) and scale (t 1) with x about scale * q: each row fills the range of FP8."""
    wider = x.to(wide(x))
    largest = wider.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    return (wider / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def fp8_linear(x: Tensor, weight: FP8Weight, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """diag(r) q_x (diag(s) q_w)ᵀ + bias, where diag(r) q_x is x rounded to FP8 row by row.

    Backward gives what belongs to the rounded weight, exactly: grad diag(s) q_w, in the dtype of x, as if x
    had not been rounded.  The weight and the bias are constants, so nothing is kept of x.

    Args:
        x: ... i.
        bias: o, frozen, computed with in the dtype of x.
        impl: torch (a product of FP8 numbers: on GPUs of Hopper and later, for sizes that are multiples of
            16; x must be bfloat16), reference (the same numbers multiplied in float32, anywhere), or auto:
            torch on a GPU, else reference.

    Returns:
        ... o, in the dtype of x; sums are float32.

    Raises:
        ValueError: shapes that do not fit, or a bias that asks for a gradient.
        KernelUnavailable: the implementation asked for by name does not exist.
    """
    outputs, inputs = weight.bits.shape
    expect_shape("x", x, (*x.shape[:-1], inputs))
    expect_shape("bias", bias, (outputs,))
    if bias.requires_grad:
        raise ValueError("bias: expected a frozen one, found one that asks for a gradient")
    chosen = choose("fp8_linear", impl, x.device.type, operands=(x,))
    product = _scaled if chosen == "torch" else _reference
    out = _FP8Linear.apply(x.flatten(0, -2), weight, bias.to(x.dtype), product)
    return out.view(*x.shape[:-1], outputs)


def fp8_lacks(device: torch.device, sizes: tuple[int, int] = (MULTIPLE, MULTIPLE)) -> str:
    """Why a weight of these sizes (o i) cannot be multiplied in FP8 there, in one line; empty where it can.

    A CPU computes the same numbers by the reference, slowly.
    """
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_capability(device)
    if found < HOPPER:
        name = f"{torch.cuda.get_device_name(device)} with {found[0]}.{found[1]}"
        return f"expected a GPU of compute capability 9.0 (Hopper) or later, found {name}"
    if any(size % MULTIPLE for size in sizes):
        return f"expected widths that are multiples of {MULTIPLE}, found a weight of {sizes[0]} x {sizes[1]}"
    return ""


class _FP8Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FP8Weight, bias: Tensor, product: Any) -> Tensor:
        ctx.save_for_backward(weight.plain)
        return product(*quantise_rows(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (plain,) = ctx.saved_tensors
        return grad @ plain.to(grad.dtype), None, None, None


def _reference(q: Tensor, scale: Tensor, weight: FP8Weight, bias: Tensor) -> Tensor:
    """The formula: the 8-bit numbers are exact in float32, and so are their products."""
    sums = q.to(scale.dtype) @ weight.bits.view(FP8).to(scale.dtype).T
    return (sums * scale * weight.scale + bias).to(bias.dtype)


def _scaled(q: Tensor, scale: Tensor, weight: FP8Weight, bias: Tensor) -> Tensor:
    """The same by the hardware's FP8 product with float32 sums."""
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        q,
        weight.bits.view(FP8).T,
        scale_a=scale,
        scale_b=weight.scale[None],
        bias=bias,
        out_dtype=bias.dtype,
        use_fast_accum=False,
    )
