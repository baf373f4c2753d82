"""The exponential moving average of what is trained: what is evaluated and exported in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from discovla.engine.strategy import Strategy, check_state, copy_to_cpu, whole_shape


class EMA:
    """a <- decay a + (1 - decay) x after each step, in float32, whole on every process.

    Args:
        trained: parameters by name, where the average starts.
        decay: above 0 and below 1.
    """

    def __init__(self, trained: Mapping[str, Tensor], decay: float) -> None:
        self.trained = dict(trained)
        self.values = {name: param.detach().float().clone() for name, param in trained.items()}
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take the parameters in as they are after a step."""
        current = [param.detach().float() for param in self.trained.values()]
        self._average(list(self.values.values()), current, 1)

    def state(self) -> dict[str, Tensor]:
        """The average by name, copied to the CPU; to be called on every process."""
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
        parameters = self._parameters()
        kept = {name: param.detach().clone() for name, param in parameters.items()}
        with torch.no_grad():
            for name, param in parameters.items():
                param.copy_(self._whole(name))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, param in parameters.items():
                    param.copy_(kept[name])

    def _parameters(self) -> Mapping[str, Tensor]:
        return self.trained

    def _whole(self, name: str) -> Tensor:
        return self.values[name]


class Splits(Protocol):
    """A strategy at ZeRO's stage 3, of whose parameters a process holds slices; see `DeepSpeedStrategy`."""

    trained: dict[str, nn.Parameter]

    def pieces(self, param: nn.Parameter) -> list[tuple[Tensor, int]]:
        """This process's part of a parameter, and where in it that begins."""
        ...

    def together(self, param: nn.Parameter, pieces: list[tuple[Tensor, int]]) -> Tensor:
        """The whole of all processes' pieces."""
        ...


class ShardedEMA(EMA):
    """The same, of which every process holds the slices that it has of the parameters' float32 masters.

    `in_place` needs whole parameters, as they are inside of the strategy's `whole`.
    """

    def __init__(self, strategy: Splits, decay: float) -> None:
        self.strategy = strategy
        held = {name: strategy.pieces(param) for name, param in strategy.trained.items()}
        self.starts = {name: start for name, pieces in held.items() for _, start in pieces}
        super().__init__({name: piece for name, pieces in held.items() for piece, _ in pieces}, decay)

    def state(self) -> dict[str, Tensor]:
        return {name: copy_to_cpu(self._whole(name)) for name in self._parameters()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state("average", dict(state), {name: whole_shape(p) for name, p in self._parameters().items()})
        for name, value in self.values.items():
            start = self.starts[name]
            value.copy_(state[name].reshape(-1)[start : start + value.numel()])

    def _parameters(self) -> Mapping[str, nn.Parameter]:
        return self.strategy.trained

    def _whole(self, name: str) -> Tensor:
        held = [(self.values[name], self.starts[name])] if name in self.values else []
        return self.strategy.together(self.strategy.trained[name], held)


def make_ema(strategy: Strategy, decay: float | None) -> EMA | None:
    """The average of what a strategy trains; None where none is asked for."""
    if decay is None:
        return None
    if getattr(strategy, "stage", 0) == 3:
        return ShardedEMA(cast(Splits, strategy), decay)
    return EMA(strategy.trained, decay)
