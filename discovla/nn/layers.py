"""The parts of a block that know nothing of sequences: linear maps, layer norms, activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.nn.layout import Rows
from discovla.nn.recompute import SLOPE, recompute_in_backward
from discovla.ops.dispatch import Impl, choose
from discovla.ops.fp8_linear import FP8Weight, fp8_linear
from discovla.ops.fusion_norm import AdapterWeights, fusion_norm
from discovla.ops.layer_norm import layer_norm


class Linear(nn.Linear):
    """A linear map that computes in its input's dtype, whatever its weights are stored in.

    A frozen one may be told to multiply in FP8: `nn.precision`.
    """

    fp8_bits: Tensor | None
    fp8_scale: Tensor | None
    fp8_transposed: Tensor | None
    fp8_impl: Impl = "auto"

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        for name in ("fp8_bits", "fp8_scale", "fp8_transposed"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, input: Tensor, outputs: slice | None = None) -> Tensor:
        """outputs: those that are wanted, where not all are."""
        fp8, bias = self.fp8, self.bias if outputs is None else self.bias[outputs]
        if fp8 is not None:
            fp8 = fp8 if outputs is None else fp8[outputs]
            return fp8_linear(input, fp8, bias, impl=self.fp8_impl)
        weight = self.weight if outputs is None else self.weight[outputs]
        return F.linear(input, weight.to(input.dtype), bias.to(input.dtype))

    @property
    def fp8(self) -> FP8Weight | None:
        """The weight as it is multiplied in FP8, if it is; `weight` then holds the same numbers."""
        if self.fp8_bits is None or self.fp8_scale is None:
            return None
        return FP8Weight(
            bits=self.fp8_bits, scale=self.fp8_scale, plain=self.weight, transposed=self.fp8_transposed
        )

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias in `dtype`."""
        return self.weight.to(dtype), self.bias.to(dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 at least; the result has the input's dtype, or `compute` where that is set."""

    compute: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.promote_types(input.dtype, torch.float32) == input.dtype:
            return self.widened(input, self.weight, self.bias)
        return recompute_in_backward(
            self.widened, input, self.weight, self.bias
        )  # keeps no float32 copy of its input

    def widened(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The norm in float32 at least."""
        work = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(x.to(work), self.normalized_shape, weight.to(work), bias.to(work), self.eps)
        return y.to(self.compute or x.dtype)

    def of_sum(self, x: Tensor, update: Tensor | None, impl: Impl) -> tuple[Tensor, Tensor]:
        """x + update and its norm, by the op."""
        dtype = self.compute or x.dtype
        if frozen(self):
            affine = self.weight, self.bias
            return layer_norm(x, update, affine=affine, eps=self.eps, dtype=dtype, impl=impl)
        work = torch.promote_types(x.dtype, torch.float32)
        total, y = layer_norm(x, update, eps=self.eps, dtype=work, impl=impl)
        return total, self.scaled(y, dtype)

    def of_fusion(
        self, x: Tensor, u: tuple[Tensor, AdapterWeights], slots: tuple[Tensor, int], impl: Impl
    ) -> tuple[Tensor, Tensor]:
        """The sum of x and an update that fusion gave, and its norm, by the op.

        slots: and `first` of `fusion_norm`.
        """
        dtype, given = self.compute or x.dtype, (x, *u, slots[0])
        how = {"first": slots[1], "eps": self.eps, "impl": impl}
        if frozen(self):
            return fusion_norm(*given, affine=(self.weight, self.bias), dtype=dtype, **how)
        work = torch.promote_types(x.dtype, torch.float32)
        total, y = fusion_norm(*given, dtype=work, **how)
        return total, self.scaled(y, dtype)

    def of_rows(self, x: Rows, impl: str) -> Tensor:
        """The norm of rows, or of the sum that a chain of ops left as two; impl: what computes blocks."""
        x, update = x if isinstance(x, tuple) else (x, None)
        chosen = choose("block", impl, x.device.type, operands=(x,))
        return self(x) if chosen == "torch" else self.of_sum(x, update, cast(Impl, chosen))[1]

    def scaled(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Normed rows times the gain, which trains, and the shift."""
        return torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype)).to(dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), OpenAI CLIP's activation."""
    return F.silu(SLOPE * x) / SLOPE


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


def frozen(*modules: nn.Module) -> bool:
    """Whether none of their parameters trains."""
    return not any(p.requires_grad for module in modules for p in module.parameters(recurse=False))
