"""Losses of a similarity matrix whose columns are shared out over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ColumnShard:
    """The columns of one process: all texts against its own videos.

    first_text: the text that matches the first of these videos; the others match in order.
    all_reduce: sums each of several tensors of one dtype over processes.  Every process computes the same
        loss from the sums, so its backward passes the gradient on unchanged: the gradient by a local tensor
        is the derivative of the loss by it.
    all_reduce_max: the elementwise maximum of one tensor over processes, without gradient.
    """

    first_text: int
    all_reduce: Callable[..., Sequence[Tensor]]
    all_reduce_max: Callable[[Tensor], Tensor]


# of a single process
ALL_COLUMNS = ColumnShard(
    first_text=0, all_reduce=lambda *tensors: tensors, all_reduce_max=torch.Tensor.detach
)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over the softmaxes of a block of logits t v, from which its losses are computed.

    rows: k t, of every row: the log-sum-exp of the student; with a teacher (k = 3) its log-sum-exp too, and
        the mean of teacher - student under the teacher's softmax.
    columns: k v, the same of every column.
    matched: m, the sums of the logits of matching pairs; m = 2 with a teacher, else 1.
    """

    rows: Tensor
    columns: Tensor
    matched: Tensor


def column_losses(
    student: Tensor,
    teacher: Tensor | None,
    columns: ColumnShard,
    *,
    kl_weight: float = 0.0,
    detach_teacher: bool = False,
) -> Tensor:
    """Symmetric cross-entropy; with a teacher also the teacher's, and KL(teacher ‖ student) both ways.

    Args:
        student, teacher: logits t v, these columns of each.
        kl_weight: w of `alignment_losses`.
        detach_teacher: no gradient of the divergence into the teacher.

    Returns:
        1 or 3 losses of the whole matrices, the same on every process.
    """
    statistics = logit_statistics(student, teacher, columns.first_text, detach_teacher)
    return merge_statistics(statistics, columns, kl_weight, detach_teacher)[0]


def logit_statistics(
    student: Tensor, teacher: Tensor | None, first_text: int, detach_teacher: bool
) -> Statistics:
    """Statistics of logits t v; text `first_text` matches the first video."""
    matrices = [student] if teacher is None else [student, teacher]
    return Statistics(
        rows=_reduce(student, teacher, 1, detach_teacher),
        columns=_reduce(student, teacher, 0, detach_teacher),
        matched=torch.stack([x.diagonal(-first_text).sum() for x in matrices]),
    )


def pad_statistics(rows: Tensor, start: int, count: int) -> Tensor:
    """Place statistics k t of neighbouring texts at `start` among `count`; the others have no logits."""
    before, after = (
        rows.new_full((len(rows), n), -torch.inf) for n in (start, count - start - rows.shape[1])
    )
    before[2:] = after[2:] = 0
    return torch.cat([before, rows, after], dim=1)


def merge_statistics(
    statistics: Statistics, columns: ColumnShard, kl_weight: float, detach_teacher: bool
) -> tuple[Tensor, Tensor]:
    """Losses of whole matrices from every process's statistics; two collectives, of 2 or 5 numbers a text.

    Args:
        statistics: of this process's columns.
        columns, kl_weight, detach_teacher: as in `column_losses`.

    Returns:
        The losses, 1 or 3, and the statistics of whole rows, k t.
    """
    rows, across, matched = statistics.rows, statistics.columns, statistics.matched
    m, count = len(matched), 2 * rows.shape[1]
    highest = columns.all_reduce_max(rows[:m].detach())
    weights = (rows[:m] - highest).exp()  # m t
    local = across[:m].sum(1) - 2 * matched
    if m == 1:
        total, local = columns.all_reduce(weights, local)
        lse = highest + total.log()
        return (lse.sum(1) + local) / count, lse
    divergence = (across[2] - _detach_if(across[1], detach_teacher) + across[0]).sum()
    parts = torch.cat([weights, (_detach_if(weights[1], detach_teacher) * rows[2])[None]])
    total, local = columns.all_reduce(parts, torch.cat([local, divergence[None]]))
    lse, mean = highest + total[:m].log(), total[2] / _detach_if(total[1], detach_teacher)
    distill = kl_weight * ((mean - _detach_if(lse[1], detach_teacher) + lse[0]).sum() + local[2]) / 2
    losses = (lse.sum(1) + local[:m]) / count
    return torch.cat([losses, distill[None]]), torch.cat([lse, mean[None]])


def _reduce(student: Tensor, teacher: Tensor | None, dim: int, detach_teacher: bool) -> Tensor:
    """Statistics along `dim`."""
    if teacher is None:
        return student.logsumexp(dim)[None]
    target = _detach_if(teacher, detach_teacher)
    mean = (target.softmax(dim) * (target - student)).sum(dim)
    return torch.stack([student.logsumexp(dim), teacher.logsumexp(dim), mean])


def _detach_if(x: Tensor, detach: bool) -> Tensor:
    return x.detach() if detach else x
