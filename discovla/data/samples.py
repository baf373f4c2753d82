"""What training walks through: pairs of a clip and one of its captions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from discovla.batch import BadClip
from discovla.data.dali.plans import Plan
from discovla.data.manifest import Clip

logger = logging.getLogger(__name__)

Frames = np.ndarray | Plan  # read, or still to be made


@dataclass(frozen=True)
class Pair:
    """One training pair: a clip by its place in the list, a caption by its place in the clip."""

    clip: int
    caption: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training pair as it is read.

    frames: uint8 RGB, f y x 3, or the plan of them.  shown: how many of them the clip has, padding follows;
    None where it has all.  frame_texts: a still caption per frame, or None.  video_index: which clip of the
    list.  bad: why the frames are placeholders, None where they are real.
    """

    text: str
    frames: Frames
    video_index: int
    shown: int | None = None
    frame_texts: tuple[str, ...] | None = None
    bad: BadClip | None = None


class Source(Protocol):
    """Anything training can walk through.  It is sent to worker processes, so it must pickle."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> Sample:
        """The pair `index`; random parts depend on the source's seed, `epoch` and `index` alone."""
        ...


def samples(clips: Sequence[Clip], *, frame_captions: bool, missing: Literal["error", "drop"]) -> list[Pair]:
    """The training pairs of clips, in the order of the dataset.

    By `caption_order` where the clips have one, otherwise clip by clip.

    Args:
        frame_captions: whether every pair needs frame captions.
        missing: what to do with a pair that needs them and has none; a drop is logged with its number.

    Raises:
        ValueError: frame captions are missing, or only some of the clips have an order.
    """
    pairs = _ordered(clips)
    if not frame_captions:
        return pairs
    kept = [pair for pair in pairs if frame_texts(clips[pair.clip], pair.caption) is not None]
    dropped = len(pairs) - len(kept)
    if dropped and missing == "error":
        first = next(p for p in pairs if frame_texts(clips[p.clip], p.caption) is None)
        clip = clips[first.clip]
        raise ValueError(
            f"frame captions: {dropped} of {len(pairs)} captions have none, the first of clip {clip.id!r}: "
            f"{clip.captions[first.caption]!r}; missing_frame_captions = 'drop' leaves them out"
        )
    if dropped:
        logger.warning("%d of %d captions have no frame captions and are left out", dropped, len(pairs))
    if not kept:
        raise ValueError(f"frame captions: none of {len(pairs)} captions has any")
    return kept


def frame_texts(clip: Clip, caption: int) -> tuple[str, ...] | None:
    """The frame captions of one caption of a clip."""
    return None if clip.frame_captions is None else clip.frame_captions[caption]


def _ordered(clips: Sequence[Clip]) -> list[Pair]:
    """All pairs in the order of the dataset."""
    pairs = [Pair(i, j) for i, clip in enumerate(clips) for j in range(len(clip.captions))]
    ordered = sum(clip.caption_order is not None for clip in clips)
    if not ordered:
        return pairs
    if ordered < len(clips):
        raise ValueError(f"caption_order: expected all {len(clips)} clips to have one, found {ordered}")
    return sorted(pairs, key=lambda pair: (clips[pair.clip].caption_order or ())[pair.caption])
