"""Strategies by their names in the config."""

from __future__ import annotations

import logging

from torch import nn

from discovla.engine.config import choose_strategy
from discovla.engine.deepspeed import DeepSpeedStrategy
from discovla.engine.strategy import StepPlan, Strategy, TorchStrategy, trained_size

logger = logging.getLogger(__name__)

STRATEGIES: dict[str, type[Strategy]] = {"deepspeed": DeepSpeedStrategy, "torch": TorchStrategy}


def make_strategy(module: nn.Module, plan: StepPlan) -> Strategy:
    """Make the configured strategy for a module, and log which.

    Args:
        module: its forward(batch) returns `Losses`; parameters with requires_grad are trained.
        plan: of the run.

    Raises:
        ValueError: nothing to train, or a setting that does not fit the module.
    """

    trained = trained_size(module)
    name, reason = choose_strategy(plan.engine, trained, plan.world.size)
    logger.info("strategy: %s (%s), %s trained parameters", name, reason, f"{trained:,}")
    return STRATEGIES[name](module, plan)
