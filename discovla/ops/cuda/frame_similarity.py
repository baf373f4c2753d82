"""Frame similarity of one block of pairs by csrc/frame_similarity.cu, and its gradients.

Same functions as `discovla.ops.streamed.frame_similarity`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from discovla.ops.blocks import matmul
from discovla.ops.cuda.library import align_rows, ops, unsupported_tensors

MAX_PARTS = 144  # their products with as many fit into the shared memory of an A100
BLOCK_BYTES = 3 << 25  # of one block of pairs


def unsupported(text: Tensor, video: Tensor, *masks: Tensor | None) -> str:
    """Return why the kernel cannot take t i d texts and v j d videos, or ""."""
    for name, x in (("text", text), ("video", video)):
        if x.shape[1] > MAX_PARTS:
            return f"expected at most {MAX_PARTS} parts of a {name}, found {x.shape[1]}"
    return unsupported_tensors(text, video, *masks)


@dataclass(frozen=True, kw_only=True)
class Maxima:
    """Output of the kernel for a block.

    saved: for backward, best matches t i v and their indices, the same t v j, and pooled sums 5 t v, of
    which the last is dG / ds.
    """

    similarity: Tensor
    saved: tuple[Tensor, ...]


def maxima(
    text: Tensor,
    video: Tensor,
    scale: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    keep: bool,
) -> Maxima:
    """Similarities of unit rows, t i d and v j d, and with `keep` what `gradients` needs."""
    masks = _contiguous(text_mask), _contiguous(video_mask)
    similarity, *saved = ops().frame_similarity(align_rows(text), align_rows(video), scale, *masks, keep)
    return Maxima(similarity=similarity, saved=tuple(saved))


def gradients(
    grad: Tensor,
    maxima: Maxima,
    text: Tensor,
    video: Tensor,
    scale: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the similarity by text, video and scale: t i d, v j d and a scalar, float32."""
    (t, i, d), (v, j, _) = text.shape, video.shape
    masks = _contiguous(text_mask), _contiguous(video_mask)
    dmatch = ops().frame_similarity_backward(
        grad.contiguous(), align_rows(text), align_rows(video), scale, *masks, *maxima.saved
    )
    dtext = matmul(dmatch, video.reshape(v * j, d), grad.dtype).view(t, i, d)
    dvideo = matmul(dmatch.T, text.reshape(t * i, d), grad.dtype).view(v, j, d)
    return dtext, dvideo, (grad * maxima.saved[-1][4]).sum()


def pairs_per_block(text: Tensor, video: Tensor, keep: bool) -> int:
    """Return how many pairs a block may have, so that all it writes stays within BLOCK_BYTES."""
    i, j = text.shape[1], video.shape[1]
    per_pair = i * j * text.element_size() + 6 * (i + j) + 24 if keep else 4
    return max(1, BLOCK_BYTES // per_pair)


def _contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()
