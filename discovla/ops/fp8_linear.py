"""A linear map by a frozen weight in FP8, with one scale for each output and each row of the input."""

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
from discovla.ops.mlp import Activation
from discovla.ops.quantise_rows import FP8, LARGEST, Rows, quantise_rows

HOPPER = (9, 0)
MULTIPLE = 16  # of which both sizes of the weight must be multiples

# (rows t k, weight n k in uint8, its column scales n in float32, bias n or None, dtype) -> t n
Product = Callable[[Rows, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


@dataclass(frozen=True, kw_only=True)
class FP8Weight:
    """A frozen weight o i as diag(scale) q.

    bits: o i, uint8, the bytes of q in float8_e4m3fn (collectives have no float8).
    scale: o, float32, powers of two, so that `plain` is exact in bfloat16 and wider.
    plain: o i, diag(scale) q in the dtype in which gradients are computed.
    transposed: i o, the bytes of qᵀ, for a backward in FP8: GPUs need the operand contiguous along k.
    """

    bits: Tensor
    scale: Tensor
    plain: Tensor
    transposed: Tensor | None = None

    @property
    def backward_tensors(self) -> tuple[Tensor, ...]:
        """Tensors that backward needs: `plain`, or `transposed` and `scale` for a backward in FP8."""
        return (self.plain,) if self.transposed is None else (self.transposed, self.scale)

    def __getitem__(self, outputs: slice) -> FP8Weight:
        """Select outputs."""
        return FP8Weight(
            bits=self.bits[outputs],
            scale=self.scale[outputs],
            plain=self.plain[outputs],
            transposed=None if self.transposed is None else self.transposed[:, outputs],
        )


@dataclass(frozen=True)
class FP8Method:
    """Functions that compute an FP8 product on a device.

    product: multiplies rows by a weight.  rounding: the implementation of `quantise_rows`.
    one_scale: True if all rows of a tensor have the same scale.
    """

    product: Product
    rounding: Impl
    one_scale: bool = False

    def round(
        self,
        x: Tensor,
        column_scale: Tensor | None = None,
        *,
        activation: Activation | None = None,
        hidden: Tensor | None = None,
    ) -> Rows:
        """`quantise_rows` as `product` takes its rows."""
        options = {"activation": activation, "hidden": hidden, "one_scale": self.one_scale}
        return quantise_rows(x, column_scale, **options, impl=self.rounding)


def quantise_weight(weight: Tensor, *, backward: bool = False) -> FP8Weight:
    """Return the FP8 weight closest to `weight`, o i; every row fills at least half the range of FP8.

    backward: add the transposed copy, o i bytes, with which gradients are computed in FP8 too.
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

    Backward treats the rounding of x as the identity and returns grad diag(s) q_w: exactly in the dtype of
    x, or in FP8 if the weight has a `transposed`, where the rows of grad diag(s) are rounded to e4m3 too.
    Its error is half that of e5m2, and the scales of rows make up for its range.  The weight and the bias are
    constants, so x is not saved.

    Args:
        x: ... i.
        bias: o, frozen, used in the dtype of x.
        impl: torch (a product of FP8 numbers: on Hopper GPUs and later, for sizes that are multiples of 16;
            x must be bfloat16), triton (the same, with rows rounded by a kernel), fast (that with the
            hardware's fast sums), tensor (fast sums and one scale for all rows and one for the weight),
            reference (the same numbers multiplied in float32, anywhere), or auto: torch on a GPU, else
            reference.

    Returns:
        ... o, in the dtype of x; sums are float32.

    Raises:
        ValueError: shapes that do not fit, or a bias that requires a gradient.
        KernelUnavailable: the implementation asked for by name does not exist.
    """
    check_fp8(x, weight, bias)
    out = _FP8Linear.apply(x.flatten(0, -2), weight, bias.to(x.dtype), choose_method(impl, x))
    return out.view(*x.shape[:-1], len(weight.bits))


def fp8_unsupported(device: torch.device, sizes: tuple[int, int] = (MULTIPLE, MULTIPLE)) -> str:
    """Return why a device cannot multiply a weight of these sizes (o i) in FP8, in one line, or "".

    A CPU computes the same numbers by the reference, slowly.
    """
    if device.type != "cuda":
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability < HOPPER:
        name = f"{torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}"
        return f"expected a GPU of compute capability 9.0 (Hopper) or later, found {name}"
    if any(size % MULTIPLE for size in sizes):
        return f"expected widths that are multiples of {MULTIPLE}, found a weight of {sizes[0]} x {sizes[1]}"
    return ""


def check_fp8(x: Tensor, weight: FP8Weight, bias: Tensor) -> None:
    """Raise ValueError if shapes do not fit or the bias requires a gradient."""
    outputs, inputs = weight.bits.shape
    expect_shape("x", x, (*x.shape[:-1], inputs))
    expect_shape("bias", bias, (outputs,))
    if bias.requires_grad:
        raise ValueError("bias: expected a frozen tensor, found one that requires a gradient")


def choose_method(impl: Impl, x: Tensor) -> FP8Method:
    """Return the functions that multiply rows like x in FP8."""
    chosen = choose("fp8_linear", impl, x.device.type, operands=(x,))
    products = {"torch": _scaled_product, "triton": _scaled_product, "fast": _fast_product}
    products |= {"tensor": _tensor_product, "reference": _reference}
    product = products[chosen] if x.is_cuda or chosen == "torch" else _reference
    rounding: Impl = "triton" if chosen in ("triton", "fast") else "reference"
    return FP8Method(product, rounding, one_scale=chosen == "tensor")


def input_gradient(
    grad: Tensor,
    weight: Sequence[Tensor],
    method: FP8Method,
    *,
    activation: Activation | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Return the gradient by the input of a product; weight: its `backward_tensors`.

    activation, hidden: in FP8, grad is first multiplied by act'(hidden).
    """
    if len(weight) == 1:
        return grad @ weight[0].to(grad.dtype)
    transposed, scale = weight
    rows = method.round(grad, scale, activation=activation, hidden=hidden)
    return method.product(rows, transposed, scale.new_ones(len(transposed)), None, grad.dtype)


class _FP8Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FP8Weight, bias: Tensor, method: FP8Method) -> Tensor:
        ctx.method = method
        ctx.save_for_backward(*weight.backward_tensors)
        rows = method.round(x)
        return method.product(rows, weight.bits, weight.scale, bias, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return input_gradient(grad, ctx.saved_tensors, ctx.method), None, None, None


def _reference(rows: Rows, bits: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The formula: the 8-bit numbers are exact in float32, and so are their products."""
    q, scale = rows
    sums = q.to(scale.dtype) @ bits.view(FP8).to(scale.dtype).T * scale * columns
    return (sums if bias is None else sums + bias).to(dtype)


def _scaled_product(
    rows: Rows,
    bits: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    fast: bool = False,
) -> Tensor:
    """`_reference` by the hardware's FP8 product; fast: with its sums of less precision than float32."""
    scales = {"scale_a": rows[1], "scale_b": columns[None]}
    options = {"bias": bias, "out_dtype": dtype, "use_fast_accum": fast}
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows[0], bits.view(FP8).T, **scales, **options
    )


def _fast_product(
    rows: Rows, bits: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _scaled_product(rows, bits, columns, bias, dtype, fast=True)


def _tensor_product(
    rows: Rows, bits: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product with one scale for all rows, and one for the weight, which is rounded to it here.

    The scales of a weight are powers of two, so that this changes only its smallest numbers.
    """
    largest = columns.max()
    weight = (bits.view(FP8).to(columns.dtype) * (columns / largest)[:, None]).to(FP8)
    scales = {"scale_a": rows[1][0, 0], "scale_b": largest}
    options = {"bias": bias, "out_dtype": dtype, "use_fast_accum": True}
    return torch._scaled_mm(rows[0], weight.T, **scales, **options)  # pyright: ignore[reportPrivateImportUsage]
