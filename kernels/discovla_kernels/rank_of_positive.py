"""Count the items that score at least as high as the positive one, without a matrix of scores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import (
    Traffic,
    accumulator,
    operands_in_registers,
    precision,
    product_tile,
    unsupported_tensors,
)

MAX_GROUP = 128  # items of a group; a tile holds whole groups


def unsupported(query: Tensor, items: Tensor, groups: Tensor | None) -> str:
    """Return why the kernel cannot take these tensors, or ""."""
    if groups is not None and (largest := int(groups.bincount().max())) > MAX_GROUP:
        return f"expected at most {MAX_GROUP} items of a group, found {largest}"
    return unsupported_tensors(query, items)


@triton.jit
def _score(product, lse, lowest, scale, DUAL: tl.constexpr):
    """Return the cosine, or with DUAL the logarithm of its dual softmax."""
    if DUAL:
        product = scale * product
        lifted = tl.maximum(product - lowest, 0.0)
        product = (
            tl.where(lifted > 0, tl.log(tl.maximum(lifted, 1e-37)), -float("inf")) + product - lse[None, :]
        )
    return product


@triton.jit
def _rank_of_positive_forward(
    query_ptr, item_ptr, positive_ptr, table_ptr, lse_ptr, lowest_ptr, target_ptr, count_ptr, N, G, D, scale,
    TARGET: tl.constexpr, DUAL: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """count_0 = |{g != positive: S_ig >= S_i,positive}|, count_1 the same with >.

    S_ig is the best score of the items of group g; with SLOTS = 1 every item is a group.
    Tile: BLOCK queries x BLOCK / SLOTS groups; a group has SLOTS places in the table, -1 for an empty one.
    TARGET: a first launch computes the scores of the positives by the same arithmetic, as the diagonal of
    tiles whose groups are the positives of the queries; the second counts comparisons and adds them to
    integers, whose sum does not depend on an order.
    Traffic: `traffic`.
    """
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    positive = tl.load(positive_ptr + i, mask=i < N, other=0)
    lowest = tl.load(lowest_ptr).to(ACC)
    if TARGET:
        slot = tl.arange(0, BLOCK)
        target = tl.full((BLOCK,), -float("inf"), dtype=ACC)
        for s in range(SLOTS):
            j = positive
            if SLOTS > 1:
                j = tl.load(table_ptr + positive * SLOTS + s, mask=i < N, other=-1).to(tl.int64)
            real = (i < N) & (j >= 0)
            product = product_tile(query_ptr, item_ptr, i, j, i < N, real, D, BLOCK_D, PRECISION, ACC)
            lse = tl.load(lse_ptr + j, mask=real, other=0.0)
            score = _score(product, lse, lowest, scale, DUAL)
            own = tl.where((slot[:, None] == slot[None, :]) & real[None, :], score, -float("inf"))
            target = tl.maximum(target, tl.max(own, axis=1))
        tl.store(target_ptr + i, target, mask=i < N)
    else:
        g = (tl.program_id(1) * (BLOCK // SLOTS) + tl.arange(0, BLOCK // SLOTS)).to(tl.int64)
        j = g
        if SLOTS > 1:
            places = g[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
            j = tl.reshape(tl.load(table_ptr + places, mask=(g < G)[:, None], other=-1), (BLOCK,)).to(
                tl.int64
            )
            real = j >= 0
        else:
            real = g < G
        product = product_tile(query_ptr, item_ptr, i, j, i < N, real, D, BLOCK_D, PRECISION, ACC)
        score = _score(product, tl.load(lse_ptr + j, mask=real, other=0.0), lowest, scale, DUAL)
        score = tl.where(real[None, :], score, -float("inf"))
        if SLOTS > 1:
            score = tl.max(tl.reshape(score, (BLOCK, BLOCK // SLOTS, SLOTS)), axis=2)
        target = tl.load(target_ptr + i, mask=i < N, other=0.0)
        other = (g < G)[None, :] & (g[None, :] != positive[:, None])
        reach = tl.sum((other & (score >= target[:, None])).to(tl.int32), axis=1)
        exceed = tl.sum((other & (score > target[:, None])).to(tl.int32), axis=1)
        tl.atomic_add(count_ptr + i, reach, mask=i < N)
        tl.atomic_add(count_ptr + N + i, exceed, mask=i < N)


def count_better(
    query: Tensor, items: Tensor, positive: Tensor, groups: Tensor | None, dual: Any
) -> tuple[Tensor, Tensor]:
    """Count, per query, other items (or groups) that score at least as high as the positive, and higher.

    query, items: n d and m d, unit rows.  groups: m, the group of each item, or None.
    dual: a `DualSoftmax` (scale, lowest logit and log-sum-exp of every item) that re-weights scores, or None.
    Returns n each, int64.
    """
    (n, d), m = query.shape, len(items)
    acc = torch.promote_types(query.dtype, torch.float32)
    lse, lowest, scale = items.new_zeros(m, dtype=acc), items.new_zeros((), dtype=acc), 1.0
    if dual is not None:
        lse, lowest, scale = dual.lse, dual.lowest, dual.scale
    target = query.new_empty(n, dtype=acc)
    count = torch.zeros(2, n, dtype=torch.int32, device=query.device)
    table = positive if groups is None else _table(groups)
    slots, group_count = (1, m) if groups is None else (table.shape[1], len(table))
    block = _block(n, group_count, slots)
    if query.element_size() == 4 and slots <= 32 and operands_in_registers(query):
        block = min(block, 64)  # larger tiles of three TF32 products would spill
    # first the positives' own scores, then every tile of groups
    for only_target, across in ((True, 1), (False, triton.cdiv(group_count, block // slots))):
        _rank_of_positive_forward[(triton.cdiv(n, block), across)](
            query.contiguous(), items.contiguous(), positive, table, lse, lowest, target, count, n,
            group_count, d, scale, TARGET=only_target, DUAL=dual is not None, SLOTS=slots, BLOCK=block,
            BLOCK_D=64 if query.element_size() == 2 else 32, PRECISION=precision(query),
            ACC=accumulator(query), num_warps=8 if block == 128 else 4,
        )  # fmt: skip
    return count[0].long(), count[1].long()


def traffic(n: int, items: tuple[int, int, int], d: int) -> Traffic:
    """Traffic of `count_better` of n queries; items: their number, groups, and places a group.

    The first launch loads every query and its positive's items; the second loads the queries and items of
    every tile and adds two integers a query.
    """
    m, groups, slots = items
    block = _block(n, groups, slots)
    tiles = triton.cdiv(n, block), triton.cdiv(groups, block // slots)
    grouped = int(slots > 1)
    right = n * (1 + slots * (d + grouped) + m / groups * (d + 1)) + tiles[0]
    tables = grouped * groups * slots * tiles[0]
    every = n * (d + 2) * tiles[1] + m * (d + 1) * tiles[0] + tables + tiles[0] * tiles[1]
    return Traffic(loads=round(right + every), stores=n + 2 * n * tiles[1])


def _table(groups: Tensor) -> Tensor:
    """Return the items of each group, int32, padded with -1 to a power of two of places."""
    order, sizes = groups.argsort(stable=True), groups.bincount()
    slots = max(2, triton.next_power_of_2(int(sizes.max())))
    place = torch.arange(len(groups), device=groups.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    table = torch.full((len(sizes), slots), -1, dtype=torch.int32, device=groups.device)
    table[groups[order], place] = order.int()
    return table


def _block(n: int, groups: int, slots: int) -> int:
    """Return the side of a tile; small if large ones would leave processors idle."""
    return 128 if n * groups * slots >= 1 << 20 or slots > 32 else 32
