"""Linear maps, layer norms and activations of transformer blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovla.nn.layout import Residual, resolve_impl
from discovla.nn.recompute import QUICK_GELU_SLOPE, recompute_in_backward
from discovla.ops.blocks import norm_dtype
from discovla.ops.dispatch import Impl
from discovla.ops.fp8_linear import FP8Weight, fp8_linear
from discovla.ops.fusion_norm import AdapterWeights, fusion_norm
from discovla.ops.layer_norm import layer_norm


class Linear(nn.Linear):
    """A linear map in the dtype of its input, whatever its weights are stored in.

    `nn.precision.quantise_frozen` makes frozen ones multiply in FP8.
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
        """Map ... i to ... o; `outputs` selects some of the o."""
        fp8, bias = self.fp8, self.whole_bias() if outputs is None else self.whole_bias()[outputs]
        if fp8 is not None:
            fp8 = fp8 if outputs is None else fp8[outputs]
            return fp8_linear(input, fp8, bias, impl=self.fp8_impl)
        weight = self.weight if outputs is None else self.weight[outputs]
        return F.linear(input, weight.to(input.dtype), bias.to(input.dtype))

    @property
    def fp8(self) -> FP8Weight | None:
        """The weight in FP8, or None; `weight` then holds the same numbers."""
        if self.fp8_bits is None or self.fp8_scale is None:
            return None
        return FP8Weight(
            bits=self.fp8_bits, scale=self.fp8_scale, plain=self.weight, transposed=self.fp8_transposed
        )

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias in `dtype`."""
        return self.weight.to(dtype), self.whole_bias().to(dtype)

    def whole_bias(self) -> Tensor:
        """The bias of all outputs."""
        return self.bias


class UnbiasedKeys(Linear):
    """A projection to queries, keys and values whose keys have no bias; `bias` holds the other two, 2w."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.bias = nn.Parameter(torch.zeros(2 * outputs // 3))

    def whole_bias(self) -> Tensor:
        query, value = self.bias.chunk(2)
        return torch.cat([query, torch.zeros_like(query), value])


class LayerScale(nn.Module):
    """A trained factor of each channel.

    Source: CaiT (arXiv 2103.17239), section 2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class ReadoutAdapter:
    """Adapter that `LayerNorm.add` applies to the last n' rows of an update and adds to the readout rows.

    readout_index: of each row of the residual stream the sequence whose readout row it is, or -1.
    ungrouped: number of sequences before the n' grouped ones.
    """

    weights: AdapterWeights
    readout_index: Tensor
    ungrouped: int


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 at least.

    The result has the dtype of the input, or `compute_dtype` if that is set: the residual stream is then
    wider than what blocks compute in.
    """

    compute_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        if norm_dtype(input) == input.dtype:
            return self._forward(input, self.weight, self.bias)
        # keeps the input for backward, not its copy in float32
        return recompute_in_backward(self._forward, input, self.weight, self.bias)

    def _forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dtype = norm_dtype(x)
        y = F.layer_norm(x.to(dtype), self.normalized_shape, weight.to(dtype), bias.to(dtype), self.eps)
        return y.to(self.result_dtype(x))

    def result_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the norm of x."""
        return self.compute_dtype or x.dtype

    def add(
        self, x: Tensor, update: Tensor | None, impl: Impl, adapter: ReadoutAdapter | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x + update and its norm; kernels compute both in one pass.

        Args:
            x: ... w.  update: ... w; with an adapter r + n' rows, see `ReadoutAdapter`.
        """
        if impl == "torch":
            x = x if update is None else x + update
            return x, self(x)
        # kernels take a frozen gain and shift; ones that train are applied to the kernel's result
        affine = (self.weight, self.bias) if frozen(self) else None
        dtype = self.result_dtype(x) if affine else torch.promote_types(x.dtype, torch.float32)
        options = {"affine": affine, "eps": self.eps, "dtype": dtype, "impl": impl}
        if adapter is None:
            x, y = layer_norm(x, update, **options)
        else:
            assert update is not None, "an adapter reads rows of the update"
            readout, first = adapter.readout_index, adapter.ungrouped
            x, y = fusion_norm(x, update, adapter.weights, readout, first=first, **options)
        if affine is None:
            y = torch.addcmul(self.bias.to(dtype), y, self.weight.to(dtype)).to(self.result_dtype(x))
        return x, y

    def norm_residual(self, x: Residual, impl: Impl) -> Tensor:
        """The norm of a residual stream, to which a pending update is added first; impl: of blocks."""
        rows, update = x if isinstance(x, tuple) else (x, None)
        return self.add(rows, update, resolve_impl(x, impl))[1]


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return F.silu(QUICK_GELU_SLOPE * x).div_(QUICK_GELU_SLOPE)  # silu keeps its input alone for backward


def gelu_tanh(x: Tensor) -> Tensor:
    """The approximation of GELU by tanh."""
    return F.gelu(x, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) value of a gate and a value side by side, ... 2m -> ... m.

    Source: GLU Variants Improve Transformer (arXiv 2002.05202).
    """
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


BlockActivation = Literal["quick_gelu", "gelu", "gelu_tanh", "swiglu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": swiglu,
}


def frozen(*modules: nn.Module) -> bool:
    """Return True if none of their parameters trains."""
    return not any(p.requires_grad for module in modules for p in module.parameters(recurse=False))


def frozen_unquantised(*modules: nn.Module) -> bool:
    """Return True if the modules are frozen and none multiplies in FP8: one op may then take all weights."""
    return frozen(*modules) and not any(isinstance(m, Linear) and m.fp8 is not None for m in modules)
