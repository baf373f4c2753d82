"""Copies between host and device for which the host does not wait."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from discovla.batch import Batch


class BatchCopier:
    """Copies batches to a device; to a GPU from pinned memory on a stream of its own.

    The copy of a batch runs while the GPU still computes the step before, because the host launches steps
    ahead of it; the two batches lie in different memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device, for use on the current stream; masks stay on the CPU."""
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)

        def used_on_current_stream(x: Tensor) -> Tensor:
            if x.is_cuda:
                x.record_stream(current)
            return x

        return moved.map(used_on_current_stream)


class LateNumbers:
    """Scalars on a device, of which a copy is on its way to the host.

    Args:
        scalars: 0-dim tensors by name; the first has the widest dtype.
    """

    def __init__(self, scalars: Mapping[str, Tensor]) -> None:
        self.names = tuple(scalars)
        dtype = next(iter(scalars.values())).dtype
        stacked = torch.stack([x.detach().to(dtype) for x in scalars.values()])
        self._host, self._copied = stacked, None
        if stacked.is_cuda:
            self._host = torch.empty(stacked.shape, dtype=dtype, pin_memory=True)
            self._host.copy_(stacked, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> dict[str, float]:
        """Return the numbers; waits for the work that computes them, but for none that was launched later."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self.names, self._host.tolist(), strict=True))
