"""Numbers of rows for packed captions, rounded so that batches have few distinct shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SHARE = 40  # rounding wastes at most a 40th of all tokens per set of captions
MIN_ROWS = 64  # step below which waste costs less than one more shape

PackedRows = Mapping[tuple[int, int], int]  # rows of packed captions by the shape n l of their mask


def bucketed_rows(masks: Sequence[Tensor], fewest: int = MIN_ROWS) -> PackedRows:
    """Return the number of rows for sets of captions, each alone and all together.

    The tokens of a set are rounded up to a multiple of the largest power of two that is at most a 40th of
    all tokens.  So with two sets at most 5 % of the rows are waste, and their number changes little.

    Args:
        masks: of each set, n l, bool, true on real tokens; on the CPU, since a GPU would sync.
        fewest: smallest step of rounding.
    """
    return rows_by_shape(masks, [rows for rows, _ in bucket_sizes(masks, fewest)])


def bucket_sizes(masks: Sequence[Tensor], fewest: int = MIN_ROWS) -> list[tuple[int, int]]:
    """Return for each set the rows that `bucketed_rows` gives it, and the most that it has places for."""
    tokens = [int(mask.sum()) for mask in masks]
    step = max(fewest, 1 << max(0, (sum(tokens) // SHARE).bit_length() - 1))
    places = [real + int(_spare(mask).sum()) for mask, real in zip(masks, tokens, strict=True)]
    return [(min(-(-real // step) * step, most), most) for real, most in zip(tokens, places, strict=True)]


def rows_by_shape(masks: Sequence[Tensor], counts: Sequence[int]) -> PackedRows:
    """Return the given numbers of rows by the shape of each mask, and their sum by that of all together."""
    rows: dict[tuple[int, int], int] = {}
    for mask, count in zip(masks, counts, strict=True):
        shape = len(mask), mask.shape[1]
        rows[shape] = max(count, rows.get(shape, 0))
    if len(masks) > 1:
        joint_shape = sum(len(mask) for mask in masks), max(mask.shape[1] for mask in masks)
        rows[joint_shape] = sum(rows[len(mask), mask.shape[1]] for mask in masks)
    return rows


def fill_bucket(mask: Tensor, rows: int) -> Tensor:
    """Return the mask n l with places after the ends of captions added until `rows` of it are true.

    The added places come after all tokens of their caption, so under the causal mask no token sees them.
    Does not sync with a GPU.

    Args:
        mask: n l, bool, true on real tokens.
        rows: at most the number that `bucketed_rows` gives.
    """
    spare = _spare(mask)
    order = spare.flatten().cumsum(0).view(mask.shape)
    return mask | (spare & (order <= rows - mask.sum()))


def _spare(mask: Tensor) -> Tensor:
    """Return the places after the last token of each caption, n l, bool."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return place > (mask * place).amax(1, keepdim=True)
