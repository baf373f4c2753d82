"""The frame similarity of a block of pairs by csrc/frame_similarity.cu, with what its backward needs.

The same functions as `discovla.ops.streamed.frame_similarity`, which says what they compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from discovla.ops.blocks import product
from discovla.ops.cuda.library import ops, rows, unsupported_tensors

MAX_PARTS = 144  # their products with as many lie in the shared memory of an A100
BLOCK_BYTES = 3 << 25  # of one block of pairs
Masks = tuple[Tensor | None, Tensor | None]


def unsupported(text: Tensor, video: Tensor, *masks: Tensor | None) -> str:
    """Why the kernel does not take t i d texts and v j d videos; empty where it does."""
    for name, x in (("text", text), ("video", video)):
        if x.shape[1] > MAX_PARTS:
            return f"expected at most {MAX_PARTS} parts of a {name}, found {x.shape[1]}"
    return unsupported_tensors(text, video, *masks)


@dataclass(frozen=True, kw_only=True)
class Maxima:
    """What a block keeps for backward: the kernel's outputs after the similarity, in its order.

    kept: best matches t i v and their places, t v j and theirs, pools 5 t v, of which the last is dG / ds.
    """

    similarity: Tensor
    kept: tuple[Tensor, ...]


def maxima(text: Tensor, video: Tensor, scale: Tensor, masks: Masks, keep: bool) -> Maxima:
    """Similarities of unit rows, t i d and v j d, and with `keep` what `gradients` needs."""
    similarity, *kept = ops().frame_similarity(rows(text), rows(video), scale, *_contiguous(masks), keep)
    return Maxima(similarity=similarity, kept=tuple(kept))


def gradients(
    grad: Tensor, found: Maxima, text: Tensor, video: Tensor, scale: Tensor, masks: Masks
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `maxima`'s similarity: t i d, v j d and a scalar, float32."""
    (t, i, d), (v, j, _) = text.shape, video.shape
    dense = ops().frame_similarity_backward(
        grad.contiguous(), rows(text), rows(video), scale, *_contiguous(masks), *found.kept
    )
    text_grad = product(dense, video.reshape(v * j, d), grad.dtype).view(t, i, d)
    video_grad = product(dense.T, text.reshape(t * i, d), grad.dtype).view(v, j, d)
    return text_grad, video_grad, (grad * found.kept[-1][4]).sum()


def pairs_per_block(text: Tensor, video: Tensor, keep: bool) -> int:
    """How many pairs one block may have, so that all it writes stays within BLOCK_BYTES."""
    i, j = text.shape[1], video.shape[1]
    per_pair = i * j * text.element_size() + 6 * (i + j) + 24 if keep else 4
    return max(1, BLOCK_BYTES // per_pair)


def _contiguous(masks: Masks) -> Masks:
    text_mask, video_mask = (None if mask is None else mask.contiguous() for mask in masks)
    return text_mask, video_mask
