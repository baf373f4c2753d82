"""Statistics and derivative of one block of one or two similarity matrices in plain torch.

Same functions as `discovla_kernels.contrastive`, where they are derived.
"""

from __future__ import annotations

import torch
from torch import Tensor

from discovla.ops.blocks import ELEMENTS, EXCLUDED, matmul, sum_dtype

Rows = tuple[Tensor, Tensor]  # embeddings r d, and their inverse norms, r


def statistics(
    text: Rows,
    video: Rows,
    scale: Tensor,
    teacher: Tensor | None,
    ignore: Tensor | None,
    shift: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return statistics of rows k 1 r and of columns k 1 c, and the diagonal's logits m r."""
    student = _logits(_cosines(text, video), scale, ignore)
    matrices = [student] if teacher is None else [student, _logits(teacher, scale, ignore)]
    diagonal = torch.stack([_matching(x, shift) for x in matrices])
    row_sums, column_sums = ([x.logsumexp(dim) for x in matrices] for dim in (1, 0))
    if teacher is not None:
        difference = matrices[1] - student
        row_sums.append(((matrices[1] - row_sums[1][:, None]).exp() * difference).sum(1))
        column_sums.append(((matrices[1] - column_sums[1]).exp() * difference).sum(0))
    return torch.stack(row_sums)[:, None], torch.stack(column_sums)[:, None], diagonal


def derivative(
    text: Rows,
    video: Rows,
    scale: Tensor,
    teacher: Tensor | None,
    ignore: Tensor | None,
    shift: int | Tensor,
    row_sums: Tensor,
    column_sums: Tensor,
    weights: Tensor,
    detach: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return derivatives by the products of rows over norms and by the teacher, r c, and by the scale."""
    cosine = _cosines(text, video)
    student = _logits(cosine, scale, ignore)
    down, across = row_sums[..., None], column_sums[:, None]  # k r 1, k 1 c
    p_r, p_c = (student - down[0]).exp(), (student - across[0]).exp()
    ds = _less_matching(weights[0] * (p_r + p_c), 2 * weights[0], shift)
    if teacher is None:
        return _over_norms(scale * ds, text, video), None, (ds * cosine).sum()
    logits = _logits(teacher, scale, ignore)
    q_r, q_c = (logits - down[1]).exp(), (logits - across[1]).exp()
    ds += weights[2] * (p_r - q_r + p_c - q_c)
    dt = _less_matching(weights[1] * (q_r + q_c), 2 * weights[1], shift)
    if not detach:
        difference = logits - student
        dt += weights[2] * (q_r * (difference - down[2]) + q_c * (difference - across[2]))
    return _over_norms(scale * ds, text, video), scale * dt, (ds * cosine).sum() + (dt * teacher).sum()


def pairs_per_block(text: Tensor, keep: bool) -> int:
    """Return how many pairs a block may have: there are a dozen temporaries.  `keep` is for kernels."""
    return ELEMENTS // 4


def _cosines(text: Rows, video: Rows) -> Tensor:
    cosines = matmul(text[0], video[0].T, sum_dtype(text[0]))
    return cosines.mul_(text[1][:, None]).mul_(video[1])


def _over_norms(dx: Tensor, text: Rows, video: Rows) -> Tensor:
    return dx.mul_(text[1][:, None]).mul_(video[1]).to(text[0].dtype)


def _logits(cosine: Tensor, scale: Tensor, ignore: Tensor | None) -> Tensor:
    return scale * cosine if ignore is None else (scale * cosine).masked_fill(ignore, EXCLUDED)


def _matching(x: Tensor, shift: int | Tensor) -> Tensor:
    """Return the entry of each row's matching pair, r; 0 for a row without one in this block."""
    if isinstance(shift, Tensor):
        return x.masked_fill(~_is_matching(x, shift), 0).sum(1)
    (rows, columns), matching = _diagonal(x, shift), x.new_zeros(len(x))
    matching[rows] = x[rows, columns]
    return matching


def _less_matching(x: Tensor, amount: Tensor, shift: int | Tensor) -> Tensor:
    """Subtract a number from the entries of matching pairs."""
    if isinstance(shift, Tensor):
        return x - amount * _is_matching(x, shift)
    x[_diagonal(x, shift)] -= amount
    return x


def _is_matching(x: Tensor, shift: Tensor) -> Tensor:
    """Return true for matching pairs, r c: what compiled code evaluates while it writes x."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return rows[:, None] - columns == shift


def _diagonal(block: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Return row and column indices of a block's matching pairs: row = column + shift."""
    rows, columns = block.shape
    row = torch.arange(max(0, shift), max(0, shift, min(rows, columns + shift)), device=block.device)
    return row, row - shift
