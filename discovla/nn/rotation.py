"""Rotary position embedding of the patches of an image.

Source: RoFormer (arXiv 2104.09864) in two axes, as EVA-02 (arXiv 2303.11331) and Perception Encoder
(arXiv 2504.13181) use it; frequencies and their order as in timm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
        """Return sine and cosine of each token's angles, l 2c, float32; a class row comes first, unturned.

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
        sine, cosine = (values.repeat_interleave(2, -1) for values in (angle.sin(), angle.cos()))
        if class_row:
            sine = torch.cat([sine.new_zeros(1, head_width), sine])
            cosine = torch.cat([cosine.new_ones(1, head_width), cosine])
        return torch.cat([sine, cosine], -1)


def rotate(x: Tensor, heads: int, table: Tensor, parts: int) -> Tensor:
    """Turn the first `parts` of projections that lie side by side.

    Channels 2i and 2i + 1 of a head are one plane, which turns by the angle of the row.

    Args:
        x: n l (k w), k > `parts` projections of width w, such as queries, keys and values.
        table: l 2c, sine and cosine (`Rotation.table`); the product is formed in its dtype at least.
    """
    turned, rest = x.tensor_split([parts * (x.shape[-1] // (parts + 1))], -1)
    turned = turned.unflatten(-1, (parts, heads, -1))  # n l k h c
    sine, cosine = (values[:, None, None] for values in table.chunk(2, -1))  # l 1 1 c
    quarter = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    turned = (turned * cosine + quarter * sine).to(x.dtype)
    return torch.cat([turned.flatten(-3), rest], -1)
