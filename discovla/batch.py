"""Records that travel between floors: what a loader yields, what towers make of it, what a loss returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BadClip:
    """A clip that could not be read, and why."""

    id: str
    video: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a training batch.

    text_ids: b l, int64, padded with 0.  text_mask: b l, bool, true on real tokens.
    frames: b f y x c, uint8 RGB (float b f c y x is taken as already normalised).  frame_mask: b f, bool.
    frame_text_ids, frame_text_mask: b f l, the still captions of the sampled frames, or None.
    video_index: b, int64, which clip of the manifest; equal for captions of one clip.
    valid: b, bool; None where every clip of every rank could be read.  False marks one that could not: its
        row is a placeholder that keeps every rank's shape the same and that no loss sees.
    bad: those clips.
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

    def __len__(self) -> int:
        return self.text_ids.shape[0]

    def __getitem__(self, rows: slice) -> Batch:
        """Some of its rows; `bad` stays whole."""
        return self.map(lambda x: x[rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The same batch on `device`, but for masks, which are looked at where no GPU is waited for."""
        kept = {name: getattr(self, name) for name in ("text_mask", "frame_mask", "frame_text_mask")}
        return replace(self.map(lambda x: x.to(device, non_blocking=non_blocking)), **kept)

    def frame_captions(self) -> tuple[Tensor, Tensor]:
        """Ids and mask of the still captions, b f l.

        Raises:
            ValueError: there are none.
        """
        ids, mask = self.frame_text_ids, self.frame_text_mask
        if ids is None or mask is None:
            raise ValueError(
                "batch: expected frame captions (method.alpha or method.beta is not 0), found none"
            )
        return ids, mask

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `change` applied to each tensor it has."""
        given = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(x) for name, x in given.items()})


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What one tower makes of n inputs.  Nothing in it is normalised.

    pooled: n d.
    tokens: n k d, the parts (words, frames, views) that a token-wise similarity compares, if one does.
    mask: n k, bool, true on real tokens; None where every token is real.
    frames: n f d, one feature per frame: of the frame itself or of its caption; for frame-level alignment.
    frame_mask: n f, bool, true on real frames.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    frames: Tensor | None = None
    frame_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Embedding:
        return self.map(lambda x: x[rows])

    def to(self, device: torch.device | str) -> Embedding:
        """The same embedding on `device`."""
        return self.map(lambda x: x.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Embedding:
        """The embedding with `change` applied to each tensor it has."""
        return Embedding(**{name: change(x) for name, x in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it has, by name."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The scalar to minimise and the terms it is made of, unweighted, for the log."""

    total: Tensor
    terms: dict[str, Tensor]
