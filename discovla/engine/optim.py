"""Optimisers of the published methods, torch's AdamW, and learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, overload

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from discovla.engine.adam import UPDATES, Buffers, Coefficients, clip_factors, step_size


class OptimConfig(BaseModel):
    """Optimiser, learning rate schedule and averaging; the defaults are DiscoVLA's published recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Literal["adamw_released", "adamw", "bert_adam"] = "adamw_released"
    """Optimiser: "adamw_released" is DiscoVLA's AdamW (eps before bias correction, decay after the update),
    "adamw" torch's, "bert_adam" CLIP4Clip's (no bias correction, decay within the update)."""

    lr: float = Field(default=6e-4, gt=0, allow_inf_nan=False)
    """Learning rate at the end of the warm-up."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""

    eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """Term added to the denominator of the update."""

    weight_decay: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""

    clip_grad_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest global norm of the gradient; None for no clipping."""

    clip_tensor_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest norm of each tensor's gradient, after the global clipping; "bert_adam" only. None for no
    clipping."""

    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of all steps in which the learning rate rises."""

    schedule: Literal["cosine", "warmup_cosine", "constant", "t2vparser"] = "cosine"
    """Learning rate after the warm-up: "cosine" to 0, "warmup_cosine" as CLIP4Clip (the cosine of the whole
    run, from the end of the warm-up), "constant", or "t2vparser" (warm-up from 5 %, then ten cosine cycles
    that end at the peak)."""

    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the trained parameters, which is evaluated, selected and
    exported in their place; None for no average."""

    skip_nonfinite: int = Field(default=0, ge=0)
    """Number of steps with a non-finite gradient that a run may skip; one more stops it."""


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Trained parameters with their own learning rate or weight decay.

    names: shell patterns of parameter names; a parameter belongs to the first group that matches.
    lr_scale: factor on the schedule's learning rate.
    weight_decay: None for the config's.
    """

    names: tuple[str, ...]
    lr_scale: float = 1.0
    weight_decay: float | None = None


def _start_state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """Create zero moments and step 0, with the keys of torch's AdamW and the step on the CPU as there."""
    state = optimizer.state[param]
    state["step"] = torch.tensor(0.0)
    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state


class _TensorwiseOptimizer(torch.optim.Optimizer):
    """Optimiser that updates every parameter with a gradient by itself; for the slices of ZeRO."""

    name: str

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; return the value of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, self.state[param] or _start_state(self, param), group)
        return loss

    def _update(self, param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        (beta1, beta2), lr, grad = group["betas"], group["lr"], param.grad
        assert grad is not None
        state["step"] += 1
        step = state["step"].item()
        root, bias = math.sqrt(1 - beta2**step), 1 - beta1**step
        coefficients = Coefficients(
            keep_mean=beta1,
            keep_square=beta2,
            lerp=1 - beta1,
            root=root,
            size=step_size(self.name, lr, root, bias),
            keep=1 - lr * group["weight_decay"],
        )
        buffers = Buffers(
            param=param, mean=state["exp_avg"], square=state["exp_avg_sq"], grad=self.clipped(grad, group)
        )
        UPDATES[self.name](buffers, coefficients, group)

    def clipped(self, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the gradient of one tensor, clipped if the optimiser clips tensors."""
        return grad


class AdamW(_TensorwiseOptimizer):
    """AdamW of DiscoVLA's released code.

    Step t = 1, 2, ...: m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    x <- x - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps);  x <- x (1 - lr weight_decay).
    Unlike torch's, it adds eps before the bias correction and applies the decay last.  It is elementwise, so
    a flat tensor of many parameters gives the same numbers as separate ones.

    Args:
        params: tensors or groups, floating point.
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

    name = "adamw_released"


class BertAdam(_TensorwiseOptimizer):
    """Adam of CLIP4Clip's released code, from BERT's first releases.

    g <- g min(1, clip / (‖g‖ + 1e-6)) for each tensor;  m <- b1 m + (1 - b1) g;
    v <- b2 v + (1 - b2) g^2;  x <- x - lr (m / (sqrt(v) + eps) + weight_decay x).  No bias correction.
    Everything except the clipping is elementwise; see `for_partitions`.

    Args:
        params: tensors or groups, floating point.
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

    name = "bert_adam"

    def clipped(self, grad: Tensor, group: dict[str, Any]) -> Tensor:
        limit = group["clip_tensor_norm"]
        return grad if limit is None else grad * clip_factors(torch.linalg.vector_norm(grad), limit)


def for_partitions(config: OptimConfig) -> OptimConfig:
    """Return settings with which flat slices of parameters are updated like whole tensors.

    The norm of a tensor is unknown to a slice.  If the global norm is clipped to the same limit before, no
    tensor can exceed it, so the clipping of tensors is dropped.

    Raises:
        ValueError: the clipping of tensors could have an effect.
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
    """Return the learning rate of one optimiser step.

    cosine: w = int(warmup total); step < w: lr step / w; then lr (1 + cos(pi (step - w) / (total - w))) / 2.
    warmup_cosine: x = step / total; x < warmup: lr x / warmup; then lr (1 + cos(pi x)) / 2.
    constant: as cosine, but lr after the warm-up.
    t2vparser: step < w: lr (0.05 + 0.95 step / (w - 1)); then lr (1 + cos(20 pi x)) / 2 with
        x = (step - w) / (total - w): ten cycles (of nine epochs in the published 100).
    With a warm-up, step 0 has learning rate 0, as published.

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
    """Return T2VParser's factor on the learning rate."""
    if step < warmup:
        return 0.05 + 0.95 * step / max(1, warmup - 1)
    return 0.5 * (1.0 + math.cos(20 * math.pi * (step - warmup) / max(1, total - warmup)))


def make_optimizer(
    module: nn.Module, config: OptimConfig, groups: Sequence[ParameterGroup] = ()
) -> torch.optim.Optimizer:
    """Return the configured optimiser of the parameters of `module` that require a gradient, for ZeRO.

    Raises:
        ValueError: nothing to train, or a group whose patterns match no trained parameter.
    """
    param_groups = group_parameters(module, config, groups)
    lr, betas, eps, decay = config.lr, config.betas, config.eps, config.weight_decay
    match config.name:
        case "adamw":
            return torch.optim.AdamW(param_groups, lr=lr, betas=betas, eps=eps, weight_decay=decay)
        case "adamw_released":
            return AdamW(param_groups, lr=lr, betas=betas, eps=eps, weight_decay=decay)
        case "bert_adam":
            clip = config.clip_tensor_norm
            return BertAdam(
                param_groups, lr=lr, betas=betas, eps=eps, weight_decay=decay, clip_tensor_norm=clip
            )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate from the schedule's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def start_state(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Create the optimiser's state before the first step, so that a saved one can be loaded into it."""
    for param in params:
        if not optimizer.state[param]:
            _start_state(optimizer, param)


def group_parameters(
    module: nn.Module, config: OptimConfig, groups: Sequence[ParameterGroup]
) -> list[dict[str, Any]]:
    """Return the optimiser's parameter groups; parameters without a group come last."""
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
