"""Strategies by their names in the config."""

from __future__ import annotations

from torch import nn

from discovla.engine.deepspeed import DeepSpeedStrategy
from discovla.engine.strategy import StepPlan, Strategy, TorchStrategy

STRATEGIES: dict[str, type[Strategy]] = {"deepspeed": DeepSpeedStrategy, "torch": TorchStrategy}


def make_strategy(module: nn.Module, plan: StepPlan) -> Strategy:
    """Make the configured strategy for a module.

    Args:
        module: its forward(batch) returns `Losses`; parameters with requires_grad are trained.
        plan: of the run.

    Raises:
        ValueError: nothing to train, or a setting that does not fit the module.
    """

    return STRATEGIES[plan.engine.strategy](module, plan)
