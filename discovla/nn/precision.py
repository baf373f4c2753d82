"""Which numbers the blocks of a model compute with, where that is not one dtype throughout."""

from __future__ import annotations

import torch
from torch import nn

from discovla.nn.block import Block
from discovla.nn.layers import Linear, frozen
from discovla.ops.dispatch import Impl
from discovla.ops.fp8_linear import fp8_unsupported, quantise_weight


def widen_residual(module: nn.Module, compute: torch.dtype) -> None:
    """Let the blocks of a tower add up their updates in float32, and compute these in `compute`."""
    for block in module.modules():
        if isinstance(block, Block):
            block.ln_1.compute_dtype = block.ln_2.compute_dtype = compute


def quantise_frozen(
    module: nn.Module, device: torch.device, *, backward: bool = False, impl: Impl = "auto"
) -> int:
    """Let every frozen linear layer of a model multiply in FP8 on `device`; with `backward` both ways.

    Its `weight` is rounded to what FP8 holds, once and for good; parameters that train stay as they are.
    Beside it lies the same in one byte a number, for both ways in two.  impl: of `fp8_linear`.

    Returns:
        How many layers there are.

    Raises:
        ValueError: there are none, or the device cannot; the message is one line.
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
