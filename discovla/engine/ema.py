"""Exponential moving average of the trained parameters, evaluated and exported in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from discovla.engine.deepspeed import DeepSpeedStrategy
from discovla.engine.strategy import Strategy, check_state, copy_to_cpu, full_shape


class EMA:
    """Average a <- decay a + (1 - decay) x after each step, in float32, unsharded on every process.

    Args:
        trained: parameters by name, the initial value of the average.
        decay: above 0 and below 1.
    """

    def __init__(self, trained: Mapping[str, Tensor], decay: float) -> None:
        self.trained = dict(trained)
        self.values = {name: param.detach().float().clone() for name, param in trained.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """Update the average with the parameters after a step.

        Args:
            norm: 0-dim, the gradient norm of the step.  If it is not finite, the average stays.
        """
        weight = torch.where(norm.isfinite(), 1 - self.decay, 0.0).float()
        for name, value in self.values.items():
            value.lerp_(self.trained[name].detach().float(), weight.to(value.device))

    def state(self) -> dict[str, Tensor]:
        """Return the average by name, copied to the CPU; call it on every process."""
        return {name: copy_to_cpu(value) for name, value in self.values.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load an average.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape.
        """
        check_state("average", dict(state), {name: value.shape for name, value in self.values.items()})
        for name, value in self.values.items():
            value.copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the parameters to the average inside the context, and back after it; do not train inside."""
        parameters = self._parameters()
        originals = {name: param.detach().clone() for name, param in parameters.items()}
        with torch.no_grad():
            for name, param in parameters.items():
                param.copy_(self._full(name))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, param in parameters.items():
                    param.copy_(originals[name])

    def _parameters(self) -> Mapping[str, Tensor]:
        return self.trained

    def _full(self, name: str) -> Tensor:
        return self.values[name]


class ShardedEMA(EMA):
    """EMA at ZeRO stage 3: each process averages its slices of the parameters' float32 masters.

    `applied` needs unsharded parameters, as inside the strategy's `gathered`.
    """

    def __init__(self, strategy: DeepSpeedStrategy, decay: float) -> None:
        self.strategy = strategy
        slices = {name: strategy.local_slice(param) for name, param in strategy.trained.items()}
        self.starts = {name: held[1] for name, held in slices.items() if held is not None}
        super().__init__({name: held[0] for name, held in slices.items() if held is not None}, decay)

    def state(self) -> dict[str, Tensor]:
        return {name: copy_to_cpu(self._full(name)) for name in self._parameters()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        check_state("average", dict(state), {name: full_shape(p) for name, p in self._parameters().items()})
        for name, value in self.values.items():
            start = self.starts[name]
            value.copy_(state[name].reshape(-1)[start : start + value.numel()])

    def _parameters(self) -> Mapping[str, nn.Parameter]:
        return self.strategy.trained

    def _full(self, name: str) -> Tensor:
        held = (self.values[name], self.starts[name]) if name in self.values else None
        return self.strategy.assemble(self.strategy.trained[name], held)


def make_ema(strategy: Strategy, decay: float | None) -> EMA | None:
    """Return the average of a strategy's trained parameters, or None without a decay."""
    if decay is None:
        return None
    if isinstance(strategy, DeepSpeedStrategy) and strategy.stage == 3:
        return ShardedEMA(strategy, decay)
    return EMA(strategy.trained, decay)
