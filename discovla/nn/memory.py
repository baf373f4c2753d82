"""What a transformer block keeps for backward, and what it computes again instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def again(function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """function(*inputs), of which backward computes again what it needs; the inputs alone are kept.

    Args:
        function: without randomness; parameters it uses get their gradients.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
