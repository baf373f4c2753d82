"""Updates of Adam and its variants, on one tensor or on a flat buffer of many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Buffers:
    """Parameters, moments and gradient of one update; all of one shape, dtype and device."""

    param: Tensor
    mean: Tensor
    square: Tensor
    grad: Tensor


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """Factors of one update, as Python numbers or as 0-dim tensors in the buffers' dtype and device.

    A step that is left out has keep_* = keep = root = 1, size = lerp = 0 and a gradient of zeros.

    keep_mean, keep_square: factors on the moments, beta1 and beta2.
    lerp: 1 - beta1.
    root: sqrt(1 - beta2^t).
    size: factor on the direction of the update.
    keep: factor on the parameters, by decoupled weight decay.
    """

    keep_mean: float | Tensor
    keep_square: float | Tensor
    lerp: float | Tensor
    root: float | Tensor
    size: float | Tensor
    keep: float | Tensor


def update_released(x: Buffers, c: Coefficients, settings: Mapping[str, Any]) -> None:
    """Update buffers in place by the released AdamW; see `AdamW`."""
    _update_moments(x, c, settings)
    x.param.addcdiv_(x.mean * c.size, x.square.sqrt().add_(settings["eps"]), value=-1)
    if settings["weight_decay"]:
        x.param.mul_(c.keep)


def update_torch(x: Buffers, c: Coefficients, settings: Mapping[str, Any]) -> None:
    """Update buffers in place with the operations of torch's AdamW, in its order."""
    x.param.mul_(c.keep)
    x.mean.lerp_(x.grad, c.lerp)
    x.square.mul_(c.keep_square).addcmul_(x.grad, x.grad, value=1 - settings["betas"][1])
    x.param.addcdiv_(x.mean * c.size, (x.square.sqrt() / c.root).add_(settings["eps"]), value=-1)


def update_bert(x: Buffers, c: Coefficients, settings: Mapping[str, Any]) -> None:
    """Update buffers in place by BertAdam, whose gradients are clipped tensor by tensor before."""
    _update_moments(x, c, settings)
    update = x.mean / x.square.sqrt().add_(settings["eps"])
    if settings["weight_decay"]:
        update.add_(x.param, alpha=settings["weight_decay"])
    x.param.addcmul_(update, torch.as_tensor(c.size, dtype=update.dtype, device=update.device), value=-1)


def _update_moments(x: Buffers, c: Coefficients, settings: Mapping[str, Any]) -> None:
    beta1, beta2 = settings["betas"]
    x.mean.mul_(c.keep_mean).add_(x.grad, alpha=1 - beta1)
    x.square.mul_(c.keep_square).addcmul_(x.grad, x.grad, value=1 - beta2)


Update = Callable[[Buffers, Coefficients, Mapping[str, Any]], None]
UPDATES: dict[str, Update] = {
    "adamw_released": update_released,
    "adamw": update_torch,
    "bert_adam": update_bert,
}


def step_size(name: str, lr: Number, root: Number, bias: Number) -> Number:
    """Return the factor on the direction of an update, of Python numbers or tensors.

    Args:
        lr: learning rate.  root: sqrt(1 - beta2^t).  bias: 1 - beta1^t.
    """
    match name:
        case "adamw_released":
            return lr * root / bias
        case "adamw":
            return lr / bias
    return lr


def clip_factors(norms: Tensor, limit: float) -> Tensor:
    """Return min(1, limit / (norm + 1e-6)), the factors that bound gradients of these norms."""
    return (limit / (norms + 1e-6)).clamp(max=1.0)
