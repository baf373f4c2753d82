"""Large blocks of pairs: products by the vendor's library, all between them fused by torch.compile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from discovla.ops.dispatch import compiled
from discovla.ops.streamed import contrastive, frame_similarity

FACTOR = 16  # a block has up to this many times the pairs of `torch`'s, which has a dozen temporaries


def contrastive_functions() -> Any:
    """Return the functions of `streamed.contrastive`, compiled."""

    def place(shift: int, x: Tensor) -> Tensor:
        """The shift as a tensor: a number would be compiled in."""
        return torch.full((), shift, device=x.device)

    def statistics(text, video, scale, teacher, ignore, shift):
        shift = place(shift, scale)
        return compiled(contrastive.statistics)(text, video, scale, teacher, ignore, shift)

    def derivative(text, video, scale, teacher, ignore, shift, *sums):
        shift = place(shift, scale)
        return compiled(contrastive.derivative)(text, video, scale, teacher, ignore, shift, *sums)

    def pairs_per_block(text: Tensor, keep: bool) -> int:
        return power_of_four(FACTOR * contrastive.pairs_per_block(text, keep))

    return SimpleNamespace(statistics=statistics, derivative=derivative, pairs_per_block=pairs_per_block)


def frame_functions() -> Any:
    """Return the functions of `streamed.frame_similarity`, compiled."""

    def maxima(*inputs: Any, keep: bool) -> frame_similarity.Maxima:
        return compiled(frame_similarity.maxima)(*inputs, keep=True)  # one code for both values

    def pairs_per_block(text: Tensor, video: Tensor, keep: bool) -> int:
        return power_of_four(FACTOR * frame_similarity.pairs_per_block(text, video, keep))

    gradients = compiled(frame_similarity.gradients)
    return SimpleNamespace(maxima=maxima, gradients=gradients, pairs_per_block=pairs_per_block)


def power_of_four(number: int) -> int:
    """Return the largest power of four up to `number`: square blocks that divide large batches evenly."""
    return 1 << (number.bit_length() - 1) // 2 * 2
