"""AdamW as DiscoVLA was trained with, torch's own, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, overload

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class OptimConfig(BaseModel):
    """How parameters are updated; the defaults are the published recipe.

    name: "adamw_released" (eps before bias correction, decay after the update) or torch's "adamw".
    lr: at the end of the warm-up.
    clip_grad_norm: largest global norm of the gradient, None for no clipping.
    warmup: share of all steps in which lr rises from 0.
    schedule: "cosine" to 0 after the warm-up, or "constant".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["adamw_released", "adamw"] = "adamw_released"
    lr: float = Field(default=6e-4, gt=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    clip_grad_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    warmup: float = Field(default=0.1, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Trained parameters that differ from the rest in learning rate or decay.

    names: shell patterns of parameter names; the first group with a pattern that fits has the parameter.
    lr_scale: their learning rate over the schedule's.
    weight_decay: theirs; None for the config's.
    """

    names: tuple[str, ...]
    lr_scale: float = 1.0
    weight_decay: float | None = None


class AdamW(torch.optim.Optimizer):
    """The AdamW that DiscoVLA was released with.

    Step t = 1, 2, ...: m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    x <- x - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps);  x <- x (1 - lr weight_decay).
    It differs from torch's twice: eps joins before the bias correction, and the decay comes last. It works
    element by element, so a flat partition of many parameters gets the numbers each would get alone.

    Args:
        params: tensors or groups, as for any torch optimiser; floating point of any width.
        lr, betas, eps, weight_decay: as above.

    Source: specification of DiscoVLA, section 6; checked against numbers from the released code.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _released_update(param, self.state[param] or _start_state(self, param), group)
        return loss


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Learning rate of one optimiser step.

    w = int(warmup total); step < w: lr step / w; after it lr (1 + cos(pi (step - w) / (total - w))) / 2,
    or lr where the schedule is constant. With a warm-up step 0 has learning rate 0, as published.

    Args:
        step: from 0.
        total: steps of the whole run.
        config: of the optimiser.

    Source: specification of DiscoVLA, section 6.
    """
    warmup = int(config.warmup * total)
    if step < warmup:
        return config.lr * (step / max(1, warmup))
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total - warmup)
    return config.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def make_optimizer(
    module: nn.Module, config: OptimConfig, groups: Sequence[ParameterGroup] = ()
) -> torch.optim.Optimizer:
    """The configured optimiser over the parameters of `module` that require a gradient.

    Raises:
        ValueError: nothing to train, or a group whose patterns fit no trained parameter.
    """
    sorted_groups = _sort(module, config, groups)
    if config.name == "adamw":
        return torch.optim.AdamW(
            sorted_groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    return AdamW(
        sorted_groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the schedule's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def start_state(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Create the state of both AdamWs as it is before the first step, so that a saved one can be put in."""
    for param in params:
        if not optimizer.state[param]:
            _start_state(optimizer, param)


def _start_state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """Zero moments, zero steps: the keys are those of torch's AdamW, the step lies on the CPU as there."""
    state = optimizer.state[param]
    state["step"] = torch.tensor(0.0)
    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state


def _released_update(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One step of the released AdamW on one tensor."""
    beta1, beta2 = group["betas"]
    lr, grad = group["lr"], param.grad
    assert grad is not None
    state["step"] += 1
    step = state["step"].item()
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.mul_(beta1).add_(grad, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    param.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
    if group["weight_decay"]:
        param.mul_(1 - lr * group["weight_decay"])


def _sort(module: nn.Module, config: OptimConfig, groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """Trained parameters by group, those of no group last."""
    rest = ParameterGroup(names=("*",))
    members: list[list[nn.Parameter]] = [[] for _ in (*groups, rest)]
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        fits = (i for i, g in enumerate((*groups, rest)) if any(fnmatchcase(name, p) for p in g.names))
        members[next(fits)].append(param)
    if not any(members):
        raise ValueError("optimiser: expected at least one parameter that requires a gradient, found none")
    for group, params in zip(groups, members, strict=False):
        if not params:
            raise ValueError(f"optimiser: expected trained parameters named like {group.names}, found none")
    return [
        {
            "params": params,
            "lr_scale": group.lr_scale,
            "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group, params in zip((*groups, rest), members, strict=True)
        if params
    ]
