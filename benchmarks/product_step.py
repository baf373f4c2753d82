"""The frozen products of our training step alone: what no step of that work undercuts on that machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.step_inputs import size_of
from benchmarks.step_work import blocks
from discovla.batch import Batch
from discovla.methods.discovla import DiscoVLAConfig
from discovla.towers.architecture import Architecture


class ProductStep:
    """Every product of a row with a frozen weight of the blocks, forward and by the input in backward.

    Attention, low-rank updates, layer norms, activations and the losses are left out.  Weights are noise, one
    for each projection of each block, so that none is in the cache which would not be in a step.
    """

    def __init__(self, architecture: Architecture, *, dtype: torch.dtype, device: str) -> None:
        self.architecture, self.dtype, self.device = architecture, dtype, device
        self.weights: dict[tuple[int, int, int], Tensor] = {}
        self.inputs: dict[tuple[int, int], Tensor] = {}

    def __call__(self, batch: Batch) -> None:
        """All products for a batch of this size; results are dropped."""
        with torch.no_grad():
            for number, (rows, inputs, outputs, backward) in enumerate(self.products(batch)):
                weight = self._weight(number, inputs, outputs)
                torch.mm(self._rows(rows, inputs), weight.T)
                if backward:
                    torch.mm(self._rows(rows, outputs), weight)

    def products(self, batch: Batch) -> Iterator[tuple[int, int, int, bool]]:
        """Rows, inputs, outputs, and whether there is a gradient by the input."""
        return blocks(self.architecture, DiscoVLAConfig(), size_of(batch))

    def _weight(self, number: int, inputs: int, outputs: int) -> Tensor:
        key = number, inputs, outputs
        if key not in self.weights:
            self.weights[key] = self._noise(outputs, inputs)
        return self.weights[key]

    def _rows(self, rows: int, width: int) -> Tensor:
        if (rows, width) not in self.inputs:
            self.inputs[rows, width] = self._noise(rows, width)
        return self.inputs[rows, width]

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)
