"""Merging of similar tokens: those of one half that are closest to one of the other half join it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from discovla.ops.blocks import expect_mask, expect_shape, sum_dtype
from discovla.ops.dispatch import Impl, choose, kernel

FLOOR = 1e-12  # of the norm of a metric row, so that a row of zeros has cosine 0 with all
DIFFERENT = -2.0  # score of two tokens that should not merge: below any cosine


@dataclass(frozen=True, kw_only=True)
class MergedTokens:
    """Tokens after a merge.

    rows: n l' w.  sizes: n l', numbers of tokens in each.  target: n l, int64, the row in which each token
    from before the merge lies.
    """

    rows: Tensor
    sizes: Tensor
    target: Tensor


def merge_tokens(
    x: Tensor,
    sizes: Tensor,
    metric: Tensor,
    count: int,
    *,
    fixed: int = 1,
    visible: Tensor | None = None,
    impl: Impl = "auto",
) -> MergedTokens:
    """Merge `count` tokens of every sequence into others that are similar to them.

    Tokens at even places are the sources, those at odd places the destinations; the first `fixed` tokens are
    neither.  Each source chooses the destination with the highest cosine of their metrics, and the `count`
    sources whose cosine is highest are averaged into it, weighted by sizes.  Order of the result: fixed
    tokens, sources that were not merged, destinations.  Of equal cosines the lower place is taken first.
    Gradients pass through the average only.

    Args:
        x: n l w.
        sizes: n l, float32 or the dtype of x.
        metric: n l c; cosines are computed in float32 at least.
        count: 0 <= count <= number of sources.
        visible: n l, bool.  Tokens with different values merge only if no others are left, and the invisible
            one then has no weight.  None: all are alike.
        impl: reference (products with one-hot rows), torch, triton, or auto.

    Raises:
        ValueError: shapes that do not fit, or more merges than sources.
        KernelUnavailable: the implementation asked for by name cannot run here.

    Source: ToMe (arXiv 2210.09461), bipartite soft matching; TempMe (arXiv 2409.01156).
    """
    n, length, _ = x.shape
    expect_shape("sizes", sizes, (n, length))
    expect_shape("metric", metric[..., 0], (n, length))
    expect_mask("visible", visible, (n, length))
    if not 0 <= count <= source_count(length, fixed):
        raise ValueError(
            f"count: expected 0 to {source_count(length, fixed)} merges of {length} tokens, found {count}"
        )
    if not count:
        return MergedTokens(rows=x, sizes=sizes, target=torch.arange(length, device=x.device).repeat(n, 1))
    chosen = choose("merge_tokens", impl, x.device.type, operands=(x, metric.detach(), visible))
    if chosen == "reference":
        target = match_tokens(metric, count, fixed=fixed, visible=visible)
        return _merge_reference(x, sizes, target, count, visible)
    metric = metric.detach().to(sum_dtype(metric)).contiguous()
    rows, merged_sizes, target = _merge(
        x.contiguous(), sizes.contiguous(), metric, count, fixed, visible, chosen
    )
    return MergedTokens(rows=rows, sizes=merged_sizes, target=target)


def source_count(length: int, fixed: int) -> int:
    """Return the number of sources among `length` tokens, and so the most that can be merged."""
    return (length + 1) // 2 - (fixed + 1) // 2


@torch.no_grad()
def match_tokens(metric: Tensor, count: int, *, fixed: int, visible: Tensor | None = None) -> Tensor:
    """Return the row after the merge in which each token lies, n l, int64; arguments as in `merge_tokens`."""
    n, length, _ = metric.shape
    sources = slice(fixed + fixed % 2, length, 2)
    destinations = slice(fixed + (fixed + 1) % 2, length, 2)
    target = torch.arange(length, device=metric.device).repeat(n, 1)
    unit = metric.to(sum_dtype(metric))
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp(min=FLOOR)
    scores = _products(unit[:, sources], unit[:, destinations])  # n s d
    if visible is not None:
        alike = visible[:, sources, None] == visible[:, None, destinations]
        scores = scores.masked_fill(~alike, DIFFERENT)
    best = scores.amax(-1)
    places = torch.arange(scores.shape[2], device=metric.device)
    destination = places.expand_as(scores).masked_fill(scores != best[..., None], length).amin(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged = torch.zeros_like(best, dtype=torch.bool).scatter_(1, order[:, :count], True)
    kept = scores.shape[1] - count
    target[:, sources] = fixed + torch.where(merged, kept + destination, (~merged).cumsum(1) - 1)
    target[:, destinations] = fixed + kept + places
    return target


def _products(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ in full float32: TF32 would change which tokens merge."""
    if not x.is_cuda:
        return x @ y.mT
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return x @ y.mT
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _weights(sizes: Tensor, target: Tensor, count: int, visible: Tensor | None) -> Tensor:
    """Weight of each token in its average: its size, or 0 if it is invisible and another is not."""
    if visible is None:
        return sizes
    seen = torch.zeros_like(sizes[:, count:]).scatter_add_(1, target, visible.to(sizes.dtype))
    return sizes * (visible | (seen.gather(1, target) == 0))


def _merge_reference(
    x: Tensor, sizes: Tensor, target: Tensor, count: int, visible: Tensor | None
) -> MergedTokens:
    """The formula: sums over one-hot rows."""
    wide = sum_dtype(x)
    weights = _weights(sizes.to(wide), target, count, visible)
    places = torch.arange(x.shape[1] - count, device=x.device)
    share = (target[:, None] == places[:, None]).to(wide) * weights[:, None]  # n l' l
    total = share.sum(-1)
    rows = (share @ x.to(wide)) / total[..., None]
    return MergedTokens(rows=rows.to(x.dtype), sizes=total.to(sizes.dtype), target=target)


@torch.library.custom_op("discovla::merge_tokens", mutates_args=())
def _merge(
    x: Tensor, sizes: Tensor, metric: Tensor, count: int, fixed: int, visible: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "triton":
        return kernel("merge_tokens").forward(x, sizes, metric, count, fixed)
    target = match_tokens(metric, count, fixed=fixed, visible=visible)
    wide = sum_dtype(x)
    weights = _weights(sizes.to(wide), target, count, visible)
    n, length, width = x.shape
    # sums in the order of the tokens on every device: on a GPU the sorting `index_put`, which has no atomics
    rows = (target + (length - count) * torch.arange(n, device=x.device)[:, None]).flatten()
    total = _sum_rows(weights.flatten(), rows, n * (length - count)).view(n, -1)
    summed = _sum_rows((x.to(wide) * weights[..., None]).flatten(0, 1), rows, n * (length - count))
    merged = summed.view(n, -1, width) / total[..., None]
    return merged.to(x.dtype), total.to(sizes.dtype), target


def _sum_rows(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sum the rows of x that go to the same of `count` rows."""
    out = x.new_zeros(count, *x.shape[1:])
    return out.index_put_((rows,), x, accumulate=True) if x.is_cuda else out.index_add_(0, rows, x)


@_merge.register_fake
def _(x, sizes, metric, count, fixed, visible, impl):
    n, length, width = x.shape
    rows, merged = x.new_empty(n, length - count, width), sizes.new_empty(n, length - count)
    return rows, merged, torch.empty(n, length, dtype=torch.int64, device=x.device)


@torch.library.custom_op("discovla::merge_tokens_backward", mutates_args=())
def _merge_backward(grad: Tensor, weights: Tensor, merged: Tensor, target: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        return kernel("merge_tokens").backward(grad.contiguous(), weights, merged, target)
    share = weights.to(sum_dtype(grad)) / merged.gather(1, target)
    index = target[..., None].expand(*target.shape, grad.shape[-1])
    return (grad.gather(1, index) * share[..., None]).to(grad.dtype)


@_merge_backward.register_fake
def _(grad, weights, merged, target, impl):
    return grad.new_empty(*target.shape, grad.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    _, sizes, _, count, _, visible, ctx.impl = inputs
    _, merged, target = output
    ctx.save_for_backward(_weights(sizes, target, count, visible), merged, target)
    ctx.mark_non_differentiable(merged, target)


def _backward(ctx, grad, _sizes, _target):
    """dx_i = weight_i / size_t(i) dy_t(i)."""
    return _merge_backward(grad, *ctx.saved_tensors, ctx.impl), None, None, None, None, None, None


_merge.register_autograd(_backward, setup_context=_setup_context)
