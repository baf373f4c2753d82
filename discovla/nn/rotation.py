"""Rotary position embedding of the patches of an image.

Source: RoFormer (arXiv 2104.09864) in two axes, as EVA-02 (arXiv 2303.11331) and Perception Encoder
(arXiv 2504.13181) use it; frequencies and their order as in timm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

TEMPERATURE = 10_000.0  # ratio of the highest frequency to the lowest, but for one step


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Rotary embedding of a square grid of patches.

    grid: patches of a side at which the tower was trained; other grids are stretched to it.
    offset: added to the place of each patch.
    order: "xy", the first half of a head's channels turns with the column; "yx", with the row.
    """

    grid: int
    offset: float = 0.0
    order: Literal["xy", "yx"] = "yx"

    def table(self, side: int, head_width: int, *, class_row: bool) -> Tensor:
        """Return cosine and sine of each token's angles, l c/2 2, float32; a class row comes first, unturned.

        Args:
            side: patches of a side of the grid.  head_width: c, a multiple of 4.

        Raises:
            ValueError: the head width is no multiple of 4.
        """
        if head_width % 4:
            raise ValueError(f"head width: expected a multiple of 4 for a rotary embedding, got {head_width}")
        bands = head_width // 4
        frequency = 1.0 / TEMPERATURE ** (torch.arange(bands, dtype=torch.float32) / bands)
        place = (torch.arange(side, dtype=torch.float32) + self.offset) / side * self.grid
        row, column = torch.meshgrid(place, place, indexing="ij")  # y x
        axes = (column, row) if self.order == "xy" else (row, column)
        angle = torch.stack(axes, -1)[..., None] * frequency  # y x 2 bands
        angle = angle.flatten(2).flatten(0, 1)  # p 2bands
        table = torch.stack([angle.cos(), angle.sin()], -1)  # p 2bands 2
        if not class_row:
            return table
        unturned = torch.tensor([1.0, 0.0]).expand(1, 2 * bands, 2)
        return torch.cat([unturned, table])


def rotate(x: Tensor, heads: int, table: Tensor, parts: int) -> Tensor:
    """Turn the first `parts` of projections that lie side by side.

    Channels 2i and 2i + 1 of a head are one plane, which turns by the angle of the row.

    Args:
        x: n l (k w), k > `parts` projections of width w, such as queries, keys and values.
        table: l c/2 2, cosine and sine (`Rotation.table`); the product is formed in its dtype at least.
    """
    if torch.compiler.is_compiling():
        return rotate_reference(x, heads, table, parts)
    return _Rotate.apply(x.contiguous(), heads, table, parts)


def rotate_reference(x: Tensor, heads: int, table: Tensor, parts: int) -> Tensor:
    """The formula of `rotate`, which torch.compile computes in one pass."""
    turned, rest = x.tensor_split([parts * (x.shape[-1] // (parts + 1))], -1)
    even, odd = turned.unflatten(-1, (parts * heads, -1, 2)).unbind(-1)  # n l kh c/2
    cosine, sine = table[:, None].unbind(-1)  # l 1 c/2
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1)
    return torch.cat([turned.to(x.dtype).flatten(-3), rest], -1)


class _Rotate(Function):
    """`rotate` by one multiplication of complex numbers, a plane each; backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, table: Tensor, parts: int) -> Tensor:
        ctx.heads, ctx.parts = heads, parts
        ctx.save_for_backward(table)
        return _turned(x, heads, torch.view_as_complex(table), parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (table,) = ctx.saved_tensors
        turn = torch.view_as_complex(table).conj().resolve_conj()
        return _turned(grad.contiguous(), ctx.heads, turn, ctx.parts), None, None, None


def _turned(x: Tensor, heads: int, turn: Tensor, parts: int) -> Tensor:
    """Multiply planes by complex numbers l c/2, in the precision of these; without autograd."""
    out, width = torch.empty_like(x), parts * (x.shape[-1] // (parts + 1))
    turned, result = x[..., :width], out[..., :width]
    out[..., width:] = x[..., width:]
    if x.dtype == turn.dtype.to_real():
        torch.mul(_planes(turned, heads * parts), turn[:, None], out=_planes(result, heads * parts))
    else:
        turned = turned.to(turn.dtype.to_real())
        _planes(turned, heads * parts).mul_(turn[:, None])
        result.copy_(turned)
    return out


def _planes(x: Tensor, heads: int) -> Tensor:
    """n l (h c) -> n l h c/2, complex, of the same storage."""
    return torch.view_as_complex(x.unflatten(-1, (heads, -1, 2)))
