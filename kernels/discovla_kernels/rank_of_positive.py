"""How many items score as high as the right one, without a matrix of scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from discovla_kernels.tiles import accumulator, precision, product_tile, unsupported


def supports(query: Tensor, items: Tensor, groups: Tensor | None) -> str:
    """Why the kernel does not take these; empty where it does."""
    if groups is not None:
        return "groups of items are counted by impl='torch' only"
    return unsupported(query, items)


@triton.jit
def _score(product, bias, lowest, scale, DUAL: tl.constexpr):
    """A cosine, or the logarithm of what a dual softmax makes of it."""
    if DUAL:
        product = scale * product
        lifted = tl.maximum(product - lowest, 0.0)
        product = (
            tl.where(lifted > 0, tl.log(tl.maximum(lifted, 1e-37)), -float("inf")) + product - bias[None, :]
        )
    return product


@triton.jit
def _rank_of_positive_forward(
    query_ptr, item_ptr, positive_ptr, bias_ptr, lowest_ptr, target_ptr, count_ptr, N, M, D, scale,
    TARGET: tl.constexpr, DUAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """count_0 = |{j != positive: S_ij >= S_i,positive}|, count_1 the same with >; S = query itemsᵀ.

    Tile: BLOCK queries x BLOCK items. With TARGET the items of a tile are the right ones of its queries, and
    its diagonal is kept, so that equal scores come of the same arithmetic; without, comparisons are counted
    and added to integers, whose sum no order changes.
    Traffic: N M D (2 / BLOCK) elements loaded, 8 N M / BLOCK bytes added.
    """
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    positive = tl.load(positive_ptr + i, mask=i < N, other=0)
    j = positive
    if not TARGET:
        j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    product = product_tile(query_ptr, item_ptr, i, j, i < N, j < M, D, BLOCK_D, PRECISION, ACC)
    bias = tl.load(bias_ptr + j, mask=j < M, other=0.0)
    score = _score(product, bias, tl.load(lowest_ptr).to(ACC), scale, DUAL)
    if TARGET:
        slot = tl.arange(0, BLOCK)
        own = tl.where(slot[:, None] == slot[None, :], score, -float("inf"))
        tl.store(target_ptr + i, tl.max(own, axis=1), mask=i < N)
    else:
        target = tl.load(target_ptr + i, mask=i < N, other=0.0)
        other = (j < M)[None, :] & (j[None, :] != positive[:, None])
        reach = tl.sum((other & (score >= target[:, None])).to(tl.int32), axis=1)
        exceed = tl.sum((other & (score > target[:, None])).to(tl.int32), axis=1)
        tl.atomic_add(count_ptr + i, reach, mask=i < N)
        tl.atomic_add(count_ptr + N + i, exceed, mask=i < N)


def counts(
    query: Tensor, items: Tensor, positive: Tensor, bias: Tensor | None, lowest: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Items other than the right one that score at least as high, and higher: n each, int64.

    query, items: n d and m d, unit rows.  bias, lowest, scale: of a dual softmax, or None, unused, unused.
    """
    (n, d), m = query.shape, len(items)
    acc = torch.promote_types(query.dtype, torch.float32)
    target = query.new_empty(n, dtype=acc)
    count = torch.zeros(2, n, dtype=torch.int32, device=query.device)
    bias_or_zero = items.new_zeros(m, dtype=acc) if bias is None else bias
    block = 128 if n * m >= 1 << 20 else 32
    over_items = {True: 1, False: triton.cdiv(m, block)}  # one tile of right items, or every tile of items
    for only_target, across in over_items.items():
        _rank_of_positive_forward[(triton.cdiv(n, block), across)](
            query.contiguous(), items.contiguous(), positive, bias_or_zero, lowest, target, count, n, m, d,
            scale, TARGET=only_target, DUAL=bias is not None, BLOCK=block,
            BLOCK_D=64 if query.element_size() == 2 else 32, PRECISION=precision(query),
            ACC=accumulator(query), num_warps=8 if block == 128 else 4,
        )  # fmt: skip
    return count[0].long(), count[1].long()
