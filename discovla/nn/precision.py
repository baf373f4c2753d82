"""Mixed precision of blocks: a wider residual stream, and frozen weights in FP8."""

from __future__ import annotations

import torch
from torch import nn

from discovla.nn.block import Block
from discovla.nn.layers import Linear, frozen
from discovla.ops.dispatch import Impl
from discovla.ops.fp8_linear import fp8_unsupported, quantise_weight


def widen_residual(module: nn.Module, compute: torch.dtype) -> None:
    """Keep the residual stream of a tower's blocks in float32, and compute their updates in `compute`."""
    for block in module.modules():
        if isinstance(block, Block):
            block.ln_1.compute_dtype = block.ln_2.compute_dtype = compute


def quantise_frozen(
    module: nn.Module, device: torch.device, *, backward: bool = False, impl: Impl = "auto"
) -> int:
    """Make every frozen linear layer of a model multiply in FP8 on `device`.

    Its weight is rounded to FP8 in place, for good, and kept in one byte a number beside it, with `backward`
    in two.  Parameters that train are not changed.

    Args:
        backward: compute gradients in FP8 too.
        impl: of `ops.fp8_linear`.

    Returns:
        The number of these layers.

    Raises:
        ValueError: there are none, or the device or the sizes do not allow FP8; one line.
    """
    layers = {name: x for name, x in module.named_modules() if isinstance(x, Linear) and frozen(x)}
    if not layers:
        raise ValueError("fp8: expected frozen linear layers, found none (method.tune = 'lora' has them)")
    for name, layer in layers.items():
        if reason := fp8_unsupported(device, (layer.out_features, layer.in_features)):
            raise ValueError(f"fp8: {name}: {reason}")
    for layer in layers.values():
        rounded = quantise_weight(layer.weight, backward=backward)
        layer.weight.data = rounded.plain
        layer.fp8_bits, layer.fp8_scale = rounded.bits, rounded.scale
        layer.fp8_transposed, layer.fp8_impl = rounded.transposed, impl
    return len(layers)
