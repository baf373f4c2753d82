"""How many rows the packed captions of a batch take, so that few numbers of rows ever come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SHARE = 40  # of all tokens: what one lot of captions may waste at most is the 40th part
MIN_ROWS = 64  # rows, below which waste costs less than another number of rows

PackedRows = Mapping[tuple[int, int], int]  # rows of packed captions by their number n and places l


def bucketed_rows(masks: Sequence[Tensor], fewest: int = MIN_ROWS) -> PackedRows:
    """Rows for lots of captions, apart and all together.

    Each lot's are its tokens rounded up to the largest power of two that is at most the 40th part of all
    tokens, so that of two lots at most 5 % of the rows are waste, and their number changes little.

    Args:
        masks: of each lot, n l, bool, true on real tokens; on the CPU, or a GPU is waited for.
        fewest: rows that are rounded up to at least.
    """
    return rows_by_shape(masks, [wanted for wanted, _ in bucket_sizes(masks, fewest)])


def bucket_sizes(masks: Sequence[Tensor], fewest: int = MIN_ROWS) -> list[tuple[int, int]]:
    """The rows that `bucketed_rows` gives each lot, and how many it has room for."""
    tokens = [int(mask.sum()) for mask in masks]
    step = max(fewest, 1 << max(0, (sum(tokens) // SHARE).bit_length() - 1))
    room = [real + int(_spare(mask).sum()) for mask, real in zip(masks, tokens, strict=True)]
    return [(min(-(-real // step) * step, most), most) for real, most in zip(tokens, room, strict=True)]


def rows_by_shape(masks: Sequence[Tensor], counts: Sequence[int]) -> PackedRows:
    """Rows for lots of captions with so many each, apart and all together."""
    found: dict[tuple[int, int], int] = {}
    for mask, rows in zip(masks, counts, strict=True):
        shape = len(mask), mask.shape[1]
        found[shape] = max(rows, found.get(shape, 0))
    if len(masks) > 1:
        whole = sum(len(mask) for mask in masks), max(mask.shape[1] for mask in masks)
        found[whole] = sum(found[len(mask), mask.shape[1]] for mask in masks)
    return found


def fill_bucket(mask: Tensor, rows: int) -> Tensor:
    """A mask n l with places after the last token of a caption added, until `rows` of it are true.

    No token sees them, for they come after all of them; a GPU is not waited for.

    Args:
        mask: n l, bool, true on real tokens.
        rows: at most as many as `bucketed_rows` gives.
    """
    spare = _spare(mask)
    order = spare.flatten().cumsum(0).view(mask.shape)
    return mask | (spare & (order <= rows - mask.sum()))


def _spare(mask: Tensor) -> Tensor:
    """The places after the last token of each caption, n l, bool."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return place > (mask * place).amax(1, keepdim=True)
