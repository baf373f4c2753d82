"""The optimisers the methods were trained with, torch's AdamW, and the learning rate of each step."""

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

    name: "adamw_released" (DiscoVLA's: eps before bias correction, decay after the update), torch's "adamw",
        or "bert_adam" (CLIP4Clip's: no bias correction, decay within the update).
    lr: at the end of the warm-up.
    clip_grad_norm: largest global norm of the gradient, None for no clipping.
    clip_tensor_norm: of bert_adam alone: largest norm of each tensor's gradient, after the global clipping.
    warmup: share of all steps in which lr rises from 0.
    schedule: "cosine" to 0 after the warm-up, "warmup_cosine" (CLIP4Clip's: the cosine of the whole run from
        where the warm-up ends), "constant", or "t2vparser" (from 5 % through the warm-up, then ten cycles
        that end at the peak).
    ema: decay of an exponential moving average of what is trained, which is then evaluated, selected and
        exported in its place; None for none.
    skip_nonfinite: steps of a run whose gradient is not finite that are left out, and counted, before it
        stops; 0 stops at the first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["adamw_released", "adamw", "bert_adam"] = "adamw_released"
    lr: float = Field(default=6e-4, gt=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    clip_grad_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    clip_tensor_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    warmup: float = Field(default=0.1, ge=0, le=1)
    schedule: Literal["cosine", "warmup_cosine", "constant", "t2vparser"] = "cosine"
    ema: float | None = Field(default=None, gt=0, lt=1)
    skip_nonfinite: int = Field(default=0, ge=0)


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


class BertAdam(torch.optim.Optimizer):
    """The Adam that CLIP4Clip was trained with, from BERT's first releases.

    g <- g min(1, clip / (‖g‖ + 1e-6)) for each tensor by itself;  m <- b1 m + (1 - b1) g;
    v <- b2 v + (1 - b2) g^2;  x <- x - lr (m / (sqrt(v) + eps) + weight_decay x).  No bias correction.
    All but the clipping works element by element; see `for_partitions`.

    Args:
        params: tensors or groups, as for any torch optimiser; floating point of any width.
        lr, betas, eps, weight_decay: as above.
        clip_tensor_norm: clip, or None.

    Source: specification of CLIP2Video, section 10; checked against numbers from the released code.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip_tensor_norm: float | None = 1.0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "clip_tensor_norm": clip_tensor_norm})

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
                    _bert_update(param, self.state[param] or _start_state(self, param), group)
        return loss


def for_partitions(config: OptimConfig) -> OptimConfig:
    """The settings under which flat slices of many tensors are updated as the tensors would be.

    A slice cannot be clipped as a tensor; but where the global norm is clipped to the same limit before, no
    tensor's can exceed it, and its own clipping is left out.

    Raises:
        ValueError: the clipping of tensors would do something.
    """
    if config.name != "bert_adam" or config.clip_tensor_norm is None:
        return config
    if config.clip_grad_norm is None or config.clip_grad_norm > config.clip_tensor_norm:
        raise ValueError(
            f"optim.clip_tensor_norm: expected optim.clip_grad_norm <= {config.clip_tensor_norm:g} with a "
            f"zero_stage above 0, which holds slices of tensors, found {config.clip_grad_norm}"
        )
    return config.model_copy(update={"clip_tensor_norm": None})


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Learning rate of one optimiser step.

    cosine: w = int(warmup total); step < w: lr step / w; then lr (1 + cos(pi (step - w) / (total - w))) / 2.
    warmup_cosine: x = step / total; x < warmup: lr x / warmup; then lr (1 + cos(pi x)) / 2.
    constant: as cosine, but lr after the warm-up.
    t2vparser: step < w: lr (0.05 + 0.95 step / (w - 1)); then lr (1 + cos(20 pi x)) / 2 with
        x = (step - w) / (total - w): ten cycles, of nine epochs each in its hundred.
    With a warm-up step 0 has learning rate 0, as published.

    Args:
        step: from 0.
        total: steps of the whole run.
        config: of the optimiser.

    Source: specification of DiscoVLA, section 6; of CLIP2Video, section 10; of T2VParser, section 8.2.
    """
    if config.schedule == "warmup_cosine":
        x = step / total
        return config.lr * (x / config.warmup if x < config.warmup else 0.5 * (1.0 + math.cos(math.pi * x)))
    warmup = int(config.warmup * total)
    if config.schedule == "t2vparser":
        return config.lr * _cycles(step, warmup, total)
    if step < warmup:
        return config.lr * (step / max(1, warmup))
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total - warmup)
    return config.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def _cycles(step: int, warmup: int, total: int) -> float:
    """T2VParser's share of the learning rate."""
    if step < warmup:
        return 0.05 + 0.95 * step / max(1, warmup - 1)
    return 0.5 * (1.0 + math.cos(20 * math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(
    module: nn.Module, config: OptimConfig, groups: Sequence[ParameterGroup] = ()
) -> torch.optim.Optimizer:
    """The configured optimiser over the parameters of `module` that require a gradient.

    Raises:
        ValueError: nothing to train, or a group whose patterns fit no trained parameter.
    """
    sorted_groups = _sort(module, config, groups)
    lr, betas, eps, decay = config.lr, config.betas, config.eps, config.weight_decay
    match config.name:
        case "adamw":
            return torch.optim.AdamW(sorted_groups, lr=lr, betas=betas, eps=eps, weight_decay=decay)
        case "adamw_released":
            return AdamW(sorted_groups, lr=lr, betas=betas, eps=eps, weight_decay=decay)
        case "bert_adam":
            clip = config.clip_tensor_norm
            return BertAdam(
                sorted_groups, lr=lr, betas=betas, eps=eps, weight_decay=decay, clip_tensor_norm=clip
            )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the schedule's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def start_state(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Create the state of our optimisers as it is before the first step, so that a saved one can go in."""
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


def _bert_update(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One step of BertAdam on one tensor."""
    beta1, beta2 = group["betas"]
    grad, clip = param.grad, group["clip_tensor_norm"]
    assert grad is not None
    if clip is not None:
        grad = grad * (clip / (torch.linalg.vector_norm(grad) + 1e-6)).clamp(max=1.0)
    state["step"] += 1
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.mul_(beta1).add_(grad, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    update = mean / square.sqrt().add_(group["eps"])
    if group["weight_decay"]:
        update.add_(param, alpha=group["weight_decay"])
    param.add_(update, alpha=-group["lr"])


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
