"""Pairwise sigmoid loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from discovla.ops.column_shard import ColumnShard


def sigmoid_loss(
    logits: Tensor, bias: Tensor, ignore: Tensor | None = None, columns: ColumnShard | None = None
) -> Tensor:
    """-1/n sum_ij log sigmoid(z_ij (S_ij + bias)), with z = 1 for the n matching pairs and -1 for the others.

    Args:
        logits: S, n n, matching on the diagonal; with `columns` n v, against the videos of this process.
        bias: scalar.
        ignore: n n or n v, bool, pairs that are left out.

    Returns:
        Scalar, the same on all processes.

    Source: SigLIP (arXiv 2303.15343), algorithm 1.
    """
    first = 0 if columns is None else columns.first_text
    matches = torch.zeros_like(logits, dtype=torch.bool)
    matches.diagonal(-first).fill_(True)
    logits = logits + bias.to(logits.dtype)
    loss = -F.logsigmoid(torch.where(matches, logits, -logits))
    if ignore is not None:
        loss = loss.masked_fill(ignore, 0.0)
    total = loss.sum() / len(logits)
    return total if columns is None else columns.all_reduce(total)[0]
