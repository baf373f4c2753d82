"""Small maths on features and their masks, without parameters."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last axis, without an epsilon: a zero vector is a fault that must show."""
    return x / x.norm(dim=-1, keepdim=True)


def widen(x: Tensor) -> Tensor:
    """x in float32 at least: what similarities and losses work in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of n k d over the k where mask (n k) is true; 0 where none is."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)


def on(device: torch.device, mask: Tensor) -> Tensor:
    """The mask on a device, which is not waited for."""
    return mask.to(device, non_blocking=True)


def expect(found: Tensor, message: str) -> None:
    """Refuse what is not all true (bool); a GPU stops at it later, so that it is not waited for."""
    if found.is_cuda:
        torch.ops.aten._assert_async.msg(found.all(), message)
    elif not found.is_meta and not found.all():  # meta tensors, with which work is counted, hold nothing
        raise ValueError(message)


def check_mask(what: str, mask: Tensor, *, prefix: bool = False) -> None:
    """Refuse rows of a mask (n k, bool) without a true entry, whose feature would not be a number.

    prefix: refuse real entries that come after padding, too.  The row is named of a mask on the CPU.
    """
    if mask.device.type != "cpu":
        expect(mask.any(1), f"{what}: expected at least one entry that is no padding in each mask")
        if prefix:
            expect(mask[:, :-1] | ~mask[:, 1:], f"{what}: expected padding at the end only, found it before")
        return
    empty = ~mask.any(1)
    if empty.any():
        row = int(empty.nonzero()[0])
        raise ValueError(
            f"{what} {row}: expected at least one entry that is no padding, found none in its mask"
        )
    if prefix and (late := (mask[:, 1:] & ~mask[:, :-1]).any(1)).any():
        raise ValueError(
            f"{what} {int(late.nonzero()[0])}: expected padding at the end only, found it before"
        )
