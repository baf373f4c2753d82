"""Records that pass between modules: batches, embeddings and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BadClip:
    """A clip that could not be read, with the reason."""

    id: str
    video: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a training batch.

    text_ids: b l, int64, padded with 0.  text_mask: b l, bool, true on real tokens.
    frames: b f y x c, uint8 RGB; float b f c y x is already normalised; float b f d are features of a frozen
        vision tower, b f l w tokens of its first blocks.  frame_mask: b f, bool.
    frame_text_ids, frame_text_mask: b f l, captions of the sampled frames, or None.
    video_index: b, int64, index i of the clip, or ~i of the clip played backwards; equal for captions of one
        clip.
    valid: b, bool, false on clips that could not be read; None if every rank read all of its clips.  The row
        of an unreadable clip is a placeholder; it keeps shapes equal on all ranks, and no loss uses it.
    bad: the unreadable clips.
    tells_order: b, bool, true where the caption tells the order of events; None if nothing asks for it.
    false_text_ids, false_text_mask: b l, the caption with an exchange that makes it false, or None.
    has_false_text: b, bool, true where there is an exchange; the caption itself stands in the other rows.
    """

    text_ids: Tensor
    text_mask: Tensor
    frames: Tensor
    frame_mask: Tensor
    video_index: Tensor
    valid: Tensor | None
    frame_text_ids: Tensor | None = None
    frame_text_mask: Tensor | None = None
    bad: tuple[BadClip, ...] = field(default=())
    tells_order: Tensor | None = None
    false_text_ids: Tensor | None = None
    false_text_mask: Tensor | None = None
    has_false_text: Tensor | None = None

    def __len__(self) -> int:
        return self.text_ids.shape[0]

    def __getitem__(self, rows: slice) -> Batch:
        """Return some rows; `bad` stays complete."""
        return self.map(lambda x: x[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """Move to `device`; masks and `valid` stay on the CPU, so that reading them does not sync."""
        masks = ("text_mask", "frame_mask", "frame_text_mask", "false_text_mask", "has_false_text", "valid")
        moved = {
            f.name: x.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if f.name not in masks and isinstance(x := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def frame_captions(self) -> tuple[Tensor, Tensor]:
        """Return ids and mask of the frame captions, b f l.

        Raises:
            ValueError: the batch has none.
        """
        ids, mask = self.frame_text_ids, self.frame_text_mask
        if ids is None or mask is None:
            raise ValueError(
                "batch: expected frame captions (method.alpha or method.beta is not 0), found none"
            )
        return ids, mask

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `change` applied to every tensor."""
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(x) for name, x in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Embedding of n captions or videos, not normalised.

    pooled: n d.
    tokens: n k d, words, frames or views that a token-wise similarity compares; None without one.
    mask: n k, bool, true on real tokens; None if all are real.
    frames: n f d, a feature for each frame or for its caption, for frame-level alignment.
    frame_mask: n f, bool, true on real frames.
    false_pooled, false_tokens, false_mask: the same of a counterpart that does not match: of a video its
        reverse, of a caption one with an exchange.  None without losses that need it.
    tells_order: n, bool, true where a caption tells the order of events.
    has_false: n, bool, true where a caption has a counterpart.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    frames: Tensor | None = None
    frame_mask: Tensor | None = None
    false_pooled: Tensor | None = None
    false_tokens: Tensor | None = None
    false_mask: Tensor | None = None
    tells_order: Tensor | None = None
    has_false: Tensor | None = None

    @property
    def false(self) -> Embedding:
        """Return the counterparts that do not match."""
        assert self.false_pooled is not None, "encoded with counterparts"
        return Embedding(pooled=self.false_pooled, tokens=self.false_tokens, mask=self.false_mask)

    def with_false(self, other: Embedding) -> Embedding:
        """Return the embedding with counterparts that do not match."""
        return replace(self, false_pooled=other.pooled, false_tokens=other.tokens, false_mask=other.mask)

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Embedding:
        return self.map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> Embedding:
        """Move to `device`."""
        return self.map(lambda x: x.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Embedding:
        """Return the embedding with `change` applied to every tensor."""
        return Embedding(**{name: change(x) for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The scalar to minimise, and its unweighted terms for the log.

    grad_norm: 0-dim, global norm of the gradient of a step that has already updated the parameters, as a
        recorded one does; None if backward and update follow.
    """

    total: Tensor
    terms: dict[str, Tensor]
    grad_norm: Tensor | None = None
