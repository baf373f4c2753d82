"""All training frames of a small set in memory, where batches are gathered."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from discovla.batch import BadClip
from discovla.data.augment import apply_table, light_table
from discovla.data.dataset import ClipDataset, frame_texts
from discovla.data.tokens import Tokenizer

logger = logging.getLogger(__name__)

Place = Literal["cpu", "cuda"]


class Resident:
    """The frames of all clips and the tokens of all texts of a source, and its batches.

    A batch is the one that reading its clips gives.  In the memory of a GPU its frames are already where they
    are used; in that of the host they are pinned where there is a GPU.

    Args:
        source: its frames are those that testing takes, its augmentation `none` or `light`.
        read: its clips in any order, in batches as the loader collates them, each clip once.
        place: whose memory.

    Raises:
        ValueError: there is no GPU, or not enough memory for the frames.
    """

    def __init__(
        self, source: ClipDataset, read: Iterable[dict[str, Any]], place: Place, tokenizer: Tokenizer
    ) -> None:
        reader = source.reader.settings
        count, size = len(source.clips), reader.image_size
        shape = (count, reader.frames, size, size, 3)
        check_memory(int(np.prod(shape)), place)
        self._source, self._place = source, place
        self._pinned = place == "cpu" and torch.cuda.is_available()
        self._frames = torch.empty(
            shape, dtype=torch.uint8, device=place, pin_memory=self._pinned
        )  # v f y x c
        self._shown = torch.zeros(count, dtype=torch.int64)
        self._sums = torch.zeros(count, dtype=torch.int64)
        self._bad: dict[int, BadClip] = {}
        for fields in read:
            self._take(fields)
        logger.info("%d clips in memory, %.1f GB", count, self._frames.nbytes / 1e9)
        self._texts = _Texts(source, tokenizer)

    def batch(self, pairs: Sequence[int], epoch: int) -> dict[str, Any]:
        """The fields of a `Batch` of these pairs of the source."""
        source = self._source
        clips = torch.tensor([source.pairs[i].clip for i in pairs])
        frames = self._gathered(clips)
        bad = [self._bad.get(clip) for clip in clips.tolist()]
        if source.augment == "light":
            for row, (index, why) in enumerate(zip(pairs, bad, strict=True)):
                if why is None:
                    self._lighten(frames[row], int(clips[row]), f"{source.seed}/{epoch}/{index}")
        return {
            "frames": frames,
            "frame_mask": torch.arange(frames.shape[1]) < self._shown[clips][:, None],  # b f
            "video_index": clips,
            "valid": torch.tensor([why is None for why in bad]),
            "bad": tuple(why for why in bad if why is not None),
            **self._texts.of(pairs),
        }

    def _take(self, fields: dict[str, Any]) -> None:
        """Keep a batch of clips."""
        rows, frames = fields["video_index"], fields["frames"]
        if not fields["valid"].all():
            failed = rows[~fields["valid"]].tolist()
            self._bad |= dict(zip(failed, fields["bad"], strict=True))
        self._frames[rows.to(self._place)] = frames.to(self._place)
        self._shown[rows] = fields["frame_mask"].sum(1)
        self._sums[rows] = frames.flatten(1).sum(1).cpu()  # what a clip lacks is black and adds nothing

    def _gathered(self, clips: Tensor) -> Tensor:
        """The frames of clips, b f y x c, where the next step finds them soonest."""
        shape = (len(clips), *self._frames.shape[1:])
        out = torch.empty(shape, dtype=torch.uint8, device=self._place, pin_memory=self._pinned)
        return torch.index_select(self._frames, 0, clips.to(self._place), out=out)

    def _lighten(self, frames: Tensor, clip: int, seed: str) -> None:
        """`draw_light` on the frames of a clip, f y x c, where they are."""
        shown = frames[: int(self._shown[clip])]
        apply_table(shown, light_table(seed, int(self._sums[clip]) / shown.numel()))


class _Texts:
    """Tokens of all pairs of a source, each different text once."""

    def __init__(self, source: ClipDataset, tokenizer: Tokenizer) -> None:
        numbers: dict[str, int] = {}

        def number(text: str) -> int:
            return numbers.setdefault(text, len(numbers))

        texts = [source.clips[pair.clip].captions[pair.caption] for pair in source.pairs]
        self._captions = torch.tensor([number(text) for text in texts])
        self._stills = None
        if source.frame_captions:
            told = [frame_texts(source.clips[pair.clip], pair.caption) or () for pair in source.pairs]
            self._stills = torch.tensor([[number(text) for text in row] for row in told])  # n f
        ids, mask = tokenizer.encode(list(numbers))
        self._ids, self._lengths = ids.int(), mask.sum(1)

    def of(self, pairs: Sequence[int]) -> dict[str, Tensor]:
        """Ids and masks of the texts of pairs."""
        rows = torch.tensor(list(pairs))
        ids, mask = self._encoded(self._captions[rows])  # b l
        fields = {"text_ids": ids, "text_mask": mask}
        if self._stills is not None:
            ids, mask = self._encoded(self._stills[rows])  # b f l
            fields |= {"frame_text_ids": ids, "frame_text_mask": mask}
        return fields

    def _encoded(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Ids, int64, and mask, ... l, of texts by their numbers."""
        mask = torch.arange(self._ids.shape[1]) < self._lengths[numbers][..., None]
        return self._ids[numbers].long(), mask


def check_memory(size: int, place: Place) -> None:
    """Refuse what does not fit.

    Raises:
        ValueError: there is no GPU, or less memory than `size` bytes.
    """
    if place == "cuda" and not torch.cuda.is_available():
        raise ValueError("resident: expected a GPU for 'cuda', found none")
    free = torch.cuda.mem_get_info()[0] if place == "cuda" else _free_memory()
    if size > free:
        need, found = (f"{number / 1e9:.1f} GB" for number in (size, free))
        raise ValueError(f"resident: expected memory for {need} of frames, found {found} ({place!r})")


def _free_memory() -> int:
    """Bytes of the host's memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"].split()[0]) * 1024
