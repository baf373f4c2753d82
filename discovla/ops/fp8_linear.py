"""A linear map by a frozen weight in FP8: one scale for each output, and one for each row of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from discovla.ops.blocks import expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose
from discovla.ops.quantise_rows import FP8, LARGEST, Rows, Through, quantise_rows

HOPPER = (9, 0)
MULTIPLE = 16  # the product wants sizes of the weight to be multiples of that

# rows t k by the weight n k (uint8), columns n scaled by float32, with a bias n or none: t n of a dtype
Product = Callable[[Rows, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
How = tuple[Product, Impl]  # and the implementation that rounds rows


@dataclass(frozen=True, kw_only=True)
class FP8Weight:
    """A frozen weight o i as diag(scale) q.

    bits: o i, uint8, the bytes of q in float8_e4m3fn (collectives know no float8).
    scale: o, float32, powers of two: so `plain` is exact in bfloat16 and wider.
    plain: o i, diag(scale) q as a tensor of the dtype that gradients are computed in.
    transposed: i o, the bytes of qᵀ, for a backward in FP8: a GPU multiplies by columns in one piece alone.
    """

    bits: Tensor
    scale: Tensor
    plain: Tensor
    transposed: Tensor | None = None

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What backward needs of it."""
        return (self.plain,) if self.transposed is None else (self.transposed, self.scale)

    def __getitem__(self, outputs: slice) -> FP8Weight:
        """Some of its outputs."""
        return FP8Weight(
            bits=self.bits[outputs],
            scale=self.scale[outputs],
            plain=self.plain[outputs],
            transposed=None if self.transposed is None else self.transposed[:, outputs],
        )


def quantise_weight(weight: Tensor, *, backward: bool = False) -> FP8Weight:
    """The FP8 weight closest to `weight`, o i, whose every row fills the range of FP8 to half at least.

    backward: with a second copy of its o i bytes, transposed, by which its gradients too are in FP8.
    """
    largest = weight.detach().to(sum_dtype(weight)).abs().amax(1)
    _, exponent = torch.frexp(largest / LARGEST)
    scale = torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)
    q = (weight.detach() / scale[:, None]).to(FP8)
    plain = (q.to(scale.dtype) * scale[:, None]).to(weight.dtype)
    bits = q.view(torch.uint8)
    transposed = bits.T.contiguous() if backward else None
    return FP8Weight(bits=bits, scale=scale.float(), plain=plain, transposed=transposed)


def fp8_linear(x: Tensor, weight: FP8Weight, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """diag(r) q_x (diag(s) q_w)ᵀ + bias, where diag(r) q_x is x rounded to FP8 row by row.

    Backward gives what belongs to the rounded weight, grad diag(s) q_w, as if x had not been rounded: exactly
    in the dtype of x, or where the weight has a `transposed` in FP8, where grad diag(s) is rounded by rows.
    That is to e4m3 too, whose error is half that of e5m2: the scales of rows make up for its range.
    The weight and the bias are constants, so nothing is kept of x.

    Args:
        x: ... i.
        bias: o, frozen, computed with in the dtype of x.
        impl: torch (a product of FP8 numbers: on GPUs of Hopper and later, for sizes that are multiples of
            16; x must be bfloat16), triton (the same, rows being rounded by a kernel), reference (the same
            numbers multiplied in float32, anywhere), or auto: torch on a GPU, else reference.

    Returns:
        ... o, in the dtype of x; sums are float32.

    Raises:
        ValueError: shapes that do not fit, or a bias that asks for a gradient.
        KernelUnavailable: the implementation asked for by name does not exist.
    """
    check_fp8(x, weight, bias)
    out = _FP8Linear.apply(x.flatten(0, -2), weight, bias.to(x.dtype), how_multiplied(impl, x))
    return out.view(*x.shape[:-1], len(weight.bits))


def fp8_unsupported(device: torch.device, sizes: tuple[int, int] = (MULTIPLE, MULTIPLE)) -> str:
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


def check_fp8(x: Tensor, weight: FP8Weight, bias: Tensor) -> None:
    """Refuse shapes that do not fit, and a bias that trains."""
    outputs, inputs = weight.bits.shape
    expect_shape("x", x, (*x.shape[:-1], inputs))
    expect_shape("bias", bias, (outputs,))
    if bias.requires_grad:
        raise ValueError("bias: expected a frozen one, found one that asks for a gradient")


def how_multiplied(impl: Impl, x: Tensor) -> How:
    """What multiplies rows by a weight there, and what rounds them."""
    chosen = choose("fp8_linear", impl, x.device.type, operands=(x,))
    product = _scaled if chosen == "torch" or (chosen == "triton" and x.is_cuda) else _reference
    return product, "triton" if chosen == "triton" else "reference"


def multiplied_back(grad: Tensor, kept: Sequence[Tensor], how: How, through: Through | None = None) -> Tensor:
    """The gradient by what a weight, that `kept` this of itself, was multiplied with.

    through: in FP8, what `grad` passes before.
    """
    if len(kept) == 1:
        return grad @ kept[0].to(grad.dtype)
    (transposed, scale), (product, impl) = kept, how
    rows = quantise_rows(grad, scale, through=through, impl=impl)
    return product(rows, transposed, scale.new_ones(len(transposed)), None, grad.dtype)


class _FP8Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FP8Weight, bias: Tensor, how: How) -> Tensor:
        ctx.how = product, impl = how
        ctx.save_for_backward(*weight.kept)
        return product(quantise_rows(x, impl=impl), weight.bits, weight.scale, bias, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return multiplied_back(grad, ctx.saved_tensors, ctx.how), None, None, None


def _reference(rows: Rows, bits: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The formula: the 8-bit numbers are exact in float32, and so are their products."""
    q, scale = rows
    sums = q.to(scale.dtype) @ bits.view(FP8).to(scale.dtype).T * scale * columns
    return (sums if bias is None else sums + bias).to(dtype)


def _scaled(rows: Rows, bits: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same by the hardware's FP8 product with float32 sums."""
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows[0],
        bits.view(FP8).T,
        scale_a=rows[1],
        scale_b=columns[None],
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=False,
    )
