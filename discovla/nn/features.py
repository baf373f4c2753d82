"""Small maths on features and their masks, without parameters."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last axis, without an epsilon: a zero vector becomes NaN instead of passing."""
    return x / x.norm(dim=-1, keepdim=True)


def widen(x: Tensor) -> Tensor:
    """Cast x to float32 at least, for similarities and losses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of n k d over the k at which mask (n k) is true; 0 if there are none."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def on(device: torch.device, mask: Tensor) -> Tensor:
    """Copy a mask to a device without a sync."""
    return mask.to(device, non_blocking=True)


def expect(condition: Tensor, message: str) -> None:
    """Raise ValueError unless the condition (bool) is true everywhere; a GPU fails later, without a sync."""
    if condition.is_cuda:
        torch.ops.aten._assert_async.msg(condition.all(), message)
    elif not condition.is_meta and not condition.all():  # meta tensors have no values
        raise ValueError(message)


def check_mask(name: str, mask: Tensor, *, prefix: bool = False) -> None:
    """Raise ValueError for a row of a mask (n k, bool) without a true entry: its feature would be NaN.

    Args:
        name: "caption" or "video", for the message, which names the row if the mask is on the CPU.
        prefix: refuse true entries after false ones too.
    """
    if mask.device.type != "cpu":
        expect(mask.any(1), f"{name}: expected at least one entry that is no padding in each mask")
        if prefix:
            expect(mask[:, :-1] | ~mask[:, 1:], f"{name}: expected padding at the end only, found it before")
        return
    empty = ~mask.any(1)
    if empty.any():
        row = int(empty.nonzero()[0])
        raise ValueError(
            f"{name} {row}: expected at least one entry that is no padding, found none in its mask"
        )
    if prefix and (late := (mask[:, 1:] & ~mask[:, :-1]).any(1)).any():
        raise ValueError(
            f"{name} {int(late.nonzero()[0])}: expected padding at the end only, found it before"
        )
