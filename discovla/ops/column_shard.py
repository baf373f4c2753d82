"""A similarity matrix whose columns are shared out over processes, and its losses from each one's own."""

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


def column_losses(
    student: Tensor,
    teacher: Tensor | None,
    columns: ColumnShard,
    *,
    kl_weight: float = 0.0,
    detach_teacher: bool = False,
) -> Tensor:
    """Symmetric cross-entropy; with a teacher also the teacher's, and the divergence from it, both ways.

    Args:
        student, teacher: logits t v, these columns of each.
        kl_weight: w of `alignment_losses`.
        detach_teacher: no gradient of the divergence into the teacher.

    Returns:
        1 or 3 losses of the whole matrices, on every process.
    """
    sums = statistics(student, teacher, columns.first_text, detach_teacher)
    return merged_losses(*sums, columns, kl_weight, detach_teacher)[0]


def statistics(
    student: Tensor, teacher: Tensor | None, first: int, detach: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `merged_losses` takes of logits t v, where text `first` matches the first video."""
    matrices = [student] if teacher is None else [student, teacher]
    matched = torch.stack([x.diagonal(-first).sum() for x in matrices])
    return _along(student, teacher, 1, detach), _along(student, teacher, 0, detach), matched


def placed(rows: Tensor, start: int, count: int) -> Tensor:
    """Statistics k t of some neighbouring texts among those of `count`, of which the others have nothing."""
    before, after = (
        rows.new_full((len(rows), n), -torch.inf) for n in (start, count - start - rows.shape[1])
    )
    before[2:] = after[2:] = 0
    return torch.cat([before, rows, after], dim=1)


def _along(student: Tensor, teacher: Tensor | None, dim: int, detach: bool) -> Tensor:
    """Along `dim`, log-sum-exp; with a teacher its own too, and the mean of teacher - student under it."""
    if teacher is None:
        return student.logsumexp(dim)[None]
    fixed = _fixed(teacher, detach)
    mean = (fixed.softmax(dim) * (fixed - student)).sum(dim)
    return torch.stack([student.logsumexp(dim), teacher.logsumexp(dim), mean])


def merged_losses(
    rows: Tensor, across: Tensor, matched: Tensor, columns: ColumnShard, kl_weight: float, detach: bool
) -> tuple[Tensor, Tensor]:
    """Losses from the statistics of one process's columns; two collectives, of 2 or 5 numbers a text.

    Args:
        rows: k t, of these columns' part of every row: log-sum-exp of the student, and where k = 3 of the
            teacher and the mean difference under it.
        across: k v, the same of every column, whole.
        matched: m, sums of the logits of matching pairs; m = 2 with a teacher, else 1.
        columns, kl_weight, detach: as in `column_losses`.

    Returns:
        The losses, 1 or 3, and the statistics k t of whole rows.
    """
    m, count = len(matched), 2 * rows.shape[1]
    highest = columns.all_reduce_max(rows[:m].detach())
    weights = (rows[:m] - highest).exp()  # m t
    own = across[:m].sum(1) - 2 * matched
    if m == 1:
        total, own = columns.all_reduce(weights, own)
        whole = highest + total.log()
        return (whole.sum(1) + own) / count, whole
    differences = (across[2] - _fixed(across[1], detach) + across[0]).sum()
    parts = torch.cat([weights, (_fixed(weights[1], detach) * rows[2])[None]])
    total, own = columns.all_reduce(parts, torch.cat([own, differences[None]]))
    whole, mean = highest + total[:m].log(), total[2] / _fixed(total[1], detach)
    distill = kl_weight * ((mean - _fixed(whole[1], detach) + whole[0]).sum() + own[2]) / 2
    losses = (whole.sum(1) + own[:m]) / count
    return torch.cat([losses, distill[None]]), torch.cat([whole, mean[None]])


def _fixed(x: Tensor, detach: bool) -> Tensor:
    return x.detach() if detach else x
