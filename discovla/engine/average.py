"""The exponential moving average of what is trained: what is evaluated and exported in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from discovla.engine.strategy import Strategy, check_state, copy_to_cpu


class Average:
    """a <- decay a + (1 - decay) x after each step, in float32, whole on every process.

    Args:
        trained: parameters by name, where the average starts; whole ones, so below ZeRO's stage 3.
        decay: above 0 and below 1.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        self.trained = dict(trained)
        self.values = {name: param.detach().float().clone() for name, param in trained.items()}
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take the parameters in as they are after a step."""
        current = [param.detach().float() for param in self.trained.values()]
        self._average(list(self.values.values()), current, 1)

    def state(self) -> dict[str, Tensor]:
        """The average by name, copied to the CPU."""
        return {name: copy_to_cpu(value) for name, value in self.values.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put an average back.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """
        check_state("average", dict(state), {name: value.shape for name, value in self.values.items()})
        for name, value in self.values.items():
            value.copy_(state[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands where the parameters are, which come back as they were; not to be trained in."""
        kept = {name: param.detach().clone() for name, param in self.trained.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, param in self.trained.items():
            param.copy_(values[name])


def make_average(strategy: Strategy, decay: float | None) -> Average | None:
    """The average of what a strategy trains; None where none is asked for.

    Raises:
        ValueError: at ZeRO's stage 3, where no process has whole parameters.
    """
    if decay is None:
        return None
    if getattr(strategy, "stage", 0) == 3:
        raise ValueError("optim.ema: expected a zero_stage below 3, which keeps parameters whole")
    return Average(strategy.trained, decay)
