"""Batches for training and evaluation, read by worker processes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from discovla.batch import BadClip, Batch
from discovla.data.clips import (
    FULL_SIZE,
    Augment,
    ClipSource,
    FrameReader,
    FrameSettings,
    LongCaptions,
    check_captions,
)
from discovla.data.decode import Damaged, DecodeError
from discovla.data.decoders import DecoderName
from discovla.data.manifest import Clip, check_clips
from discovla.data.samples import Sample, Source, samples
from discovla.data.sampling import Sampler, Sampling, Slice
from discovla.data.tokens import Tokenizer

logger = logging.getLogger(__name__)


class StillsConfig(BaseModel):
    """Drawn stills to train on: `count` in an epoch, with one thing each in the first `easy_epochs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(ge=1)
    easy_epochs: int = Field(default=0, ge=0)


class DataConfig(BaseModel):
    """What is read and how.

    manifest: JSONL of the clips.  train_split, val_split, test_split: which of its clips are for what; no
    val_split, no selection.  frames: how many the model sees.  sampling, sample_rate, sampling_divisor,
    sampling_slice: which of a clip, see `Sampling`; frames that a short clip lacks are masked placeholders.
    context_length: tokens of a caption.
    augment: `randaugment` is DiscoVLA's, `resized_crop` T2VParser's, `light` a cheap one.
    long_captions: what is done with a caption longer than the context; missing_frame_captions: with one that
    has no frame captions where the method needs them; damaged: with a clip that breaks off.
    bad_clip_share: largest share of clips found bad in training before it stops.
    cache: folder for decoded frames; it serves everything but training with an augmentation that works on
    frames of full size, or with a sampling that draws frames anew.
    decoder: who decodes, see `Decoder`; `auto` measures on the first clips.  decode_seconds: how long a clip
    may take before it counts as bad and its process is replaced.
    workers: processes that read, 0 reads in the training process.  stills: train on stills drawn in memory
    instead of the clips of the train_split.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    manifest: Path
    train_split: str = "train"
    val_split: str | None = "val"
    test_split: str = "test"
    frames: int = Field(default=12, ge=1)
    sampling: Sampler = "discovla"
    sample_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    sampling_divisor: int = Field(default=1, ge=1)
    sampling_slice: Slice = "even"
    context_length: int = Field(default=32, ge=2)
    augment: Augment = "none"
    long_captions: LongCaptions = "error"
    missing_frame_captions: Literal["error", "drop"] = "error"
    damaged: Damaged = "refuse"
    bad_clip_share: float = Field(default=0.01, ge=0, le=1)
    cache: Path | None = None
    decoder: DecoderName = "pyav"
    decode_seconds: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    workers: int = Field(default=2, ge=0)
    stills: StillsConfig | None = None

    @field_validator("sample_rate")
    @classmethod
    def _a_rate_that_the_sampling_knows(cls, value: float, info: ValidationInfo) -> float:
        sampling = info.data.get("sampling")
        if sampling == "t2vparser" and value != 1:
            raise ValueError("expected 1.0: sampling = 't2vparser' takes frames of segments, at no rate")
        if sampling == "clip4clip" and value != int(value):
            raise ValueError("expected a whole number of frames a second with sampling = 'clip4clip'")
        return value

    @field_validator("sampling_divisor", "sampling_slice")
    @classmethod
    def _an_option_of_the_sampling(cls, value: int | str, info: ValidationInfo) -> int | str:
        owner = {"sampling_divisor": "clip2video", "sampling_slice": "clip4clip"}[str(info.field_name)]
        if value not in (1, "even") and info.data.get("sampling", owner) != owner:
            raise ValueError(f"expected none without sampling = {owner!r}, whose option it is")
        return value


@dataclass(frozen=True, kw_only=True)
class LoaderShape:
    """What the batches of one rank look like.

    batch_size: pairs of the whole batch, over all ranks.  image_size: pixels of a side.  frame_captions:
    whether each pair brings a still caption per frame.
    """

    batch_size: int
    rank: int
    world_size: int
    seed: int
    image_size: int
    context_length: int
    frame_captions: bool


@dataclass(frozen=True, kw_only=True)
class VideoBatch:
    """Frames for evaluation: b f y x 3 uint8, their mask b f bool, and b int64, which clips of the list."""

    frames: Tensor
    frame_mask: Tensor
    clip_index: Tensor

    def __len__(self) -> int:
        return self.frames.shape[0]


class TrainLoader:
    """Training batches of one rank.

    The order of all pairs depends on (seed, epoch) alone; every step takes the next `batch_size` of them and
    rank r of w the r-th contiguous part, so the batches of all ranks set side by side are those of one
    process.  The last, smaller batch is left out.  One iterator may be in use at a time.

    Args:
        source: clips, which are checked before anything is read, or any other `Source`.
        config: what is read and how.
        shape: what the batches look like.

    Raises:
        ValueError: a batch that does not divide, fewer pairs than a batch, or clips that cannot be used.
    """

    def __init__(self, source: Sequence[Clip] | Source, config: DataConfig, shape: LoaderShape) -> None:
        if shape.world_size < 1 or not 0 <= shape.rank < shape.world_size:
            raise ValueError(f"rank: expected 0 .. world_size - 1, got {shape.rank} of {shape.world_size}")
        if shape.batch_size < 1 or shape.batch_size % shape.world_size:
            raise ValueError(
                f"batch_size: expected a multiple of the {shape.world_size} processes, got {shape.batch_size}"
            )
        if isinstance(source, Sequence):
            source = _clip_source(source, config, shape)
        self.source = source
        self.shape = shape
        self.steps_per_epoch = len(source) // shape.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size: expected at most the {len(source)} training pairs, got {shape.batch_size}"
            )
        self._steps = _Steps()
        collate = _Collate(Tokenizer(shape.context_length))
        self._loader = _loader(_Items(source), self._steps, collate, config.workers)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from its step `start` on.

        Raises:
            ValueError: `start` lies outside the epoch.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"start: expected 0 .. {self.steps_per_epoch}, got {start}")
        order = epoch_order(len(self.source), self.shape.seed, epoch).tolist()
        share = self.shape.batch_size // self.shape.world_size
        size, skipped = self.shape.batch_size, self.shape.rank * share
        firsts = (step * size + skipped for step in range(start, self.steps_per_epoch))
        self._steps.rows = [[(i, epoch) for i in order[first : first + share]] for first in firsts]
        for fields in self._loader:
            yield Batch(**fields)


def epoch_order(number: int, seed: int, epoch: int) -> Tensor:
    """The order of `number` pairs in an epoch, int64: a permutation that depends on (seed, epoch) alone."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(number, generator=generator)


def video_batches(
    clips: Sequence[Clip],
    config: DataConfig,
    image_size: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[VideoBatch]:
    """Frames of this rank's contiguous part of the clips, in order, without augmentation.

    Args:
        clips: all of them; `clip_index` counts in this list.
        batch_size: clips of a batch; the last may be smaller.

    Raises:
        ValueError: clips whose files are not there, before anything is read.
        DecodeError: clips that give no frames; all of the batch are named.
    """
    check_clips(clips)
    reader = FrameReader(_frame_settings(config, image_size))
    low, high = (len(clips) * r // world_size for r in (rank, rank + 1))
    firsts = range(low, high, batch_size)
    steps = _Steps([[(i, 0) for i in range(first, min(first + batch_size, high))] for first in firsts])
    source = _VideoSource(clips=clips, reader=reader)
    workers = min(config.workers, len(steps))
    for fields in _loader(_Items(source), steps, _Collate(None), workers, persistent=False):
        bad: tuple[BadClip, ...] = fields["bad"]
        if bad:
            named = "; ".join(f"{clip.id!r} ({clip.video}): {clip.reason}" for clip in bad)
            raise DecodeError(bad[0].video, f"{len(bad)} clips cannot be evaluated: {named}")
        yield VideoBatch(
            frames=fields["frames"], frame_mask=fields["frame_mask"], clip_index=fields["video_index"]
        )


def text_batches(
    texts: Sequence[str], context_length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and mask, b l int64 and bool, of texts in order, cut to the context; the last may be less."""
    tokenizer = Tokenizer(context_length)
    for first in range(0, len(texts), batch_size):
        yield tokenizer.encode(texts[first : first + batch_size])


def _clip_source(clips: Sequence[Clip], config: DataConfig, shape: LoaderShape) -> ClipSource:
    """Checked training pairs of clips."""
    check_clips(clips, frames=config.frames if shape.frame_captions else None)
    check_captions(
        clips, shape.context_length, long=config.long_captions, frame_captions=shape.frame_captions
    )
    if shape.frame_captions and config.sampling != "discovla":
        raise ValueError(
            "sampling: expected 'discovla', whose frames the frame captions tell of (method.alpha or "
            f"method.beta is not 0), found {config.sampling!r}"
        )
    _say_what_the_cache_lacks(config)
    return ClipSource(
        clips=clips,
        pairs=samples(clips, frame_captions=shape.frame_captions, missing=config.missing_frame_captions),
        reader=FrameReader(_frame_settings(config, shape.image_size)),
        augment=config.augment,
        seed=shape.seed,
        frame_captions=shape.frame_captions,
    )


def _say_what_the_cache_lacks(config: DataConfig) -> None:
    """Warn where there is a cache that training cannot use."""
    if config.cache is None:
        return
    if config.augment in FULL_SIZE:
        logger.warning(
            "cache: augment = %r works on frames of full size, training decodes clips every time",
            config.augment,
        )
    elif Sampling(frames=config.frames, sampler=config.sampling).moves:
        logger.warning(
            "cache: sampling = %r draws frames anew in each epoch, training decodes clips every time",
            config.sampling,
        )


def _frame_settings(config: DataConfig, image_size: int) -> FrameSettings:
    """The part of the configuration that decides a clip's frames."""
    return FrameSettings(
        frames=config.frames,
        image_size=image_size,
        sampling=config.sampling,
        sample_rate=config.sample_rate,
        sampling_divisor=config.sampling_divisor,
        sampling_slice=config.sampling_slice,
        damaged=config.damaged,
        cache=config.cache,
        decoder=config.decoder,
        limit=config.decode_seconds,
    )


@dataclass(frozen=True, kw_only=True)
class _VideoSource:
    """Each clip once, without a text."""

    clips: Sequence[Clip]
    reader: FrameReader

    def __len__(self) -> int:
        return len(self.clips)

    def sample(self, index: int, epoch: int) -> Sample:
        clip = self.clips[index]
        try:
            frames = self.reader.read(clip)
            return Sample(text="", frames=self.reader.padded(frames), video_index=index, shown=len(frames))
        except DecodeError as error:
            bad = BadClip(id=clip.id, video=str(clip.video), reason=error.reason)
            return Sample(text="", frames=self.reader.blank(), video_index=index, bad=bad)


@dataclass(frozen=True)
class _Items(Dataset[Sample]):
    """A source as torch's loader asks for it: the epoch travels with the index, workers hold no state."""

    source: Source

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        index, epoch = item
        return self.source.sample(index, epoch)


class _Steps:
    """The items of each step to come; set anew for each epoch, under workers that live on."""

    def __init__(self, rows: list[list[tuple[int, int]]] | None = None) -> None:
        self.rows = rows or []

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.rows)


@dataclass(frozen=True)
class _Collate:
    """Samples to the fields of a `Batch`, a dict because torch pins the tensors of dicts only."""

    tokenizer: Tokenizer | None

    def __call__(self, rows: list[Sample]) -> dict[str, Any]:
        frames = torch.from_numpy(np.stack([row.frames for row in rows]))  # b f y x c
        f = frames.shape[1]
        shown = torch.tensor([f if row.shown is None else row.shown for row in rows])
        fields: dict[str, Any] = {
            "frames": frames,
            "frame_mask": torch.arange(f) < shown[:, None],  # b f
            "video_index": torch.tensor([row.video_index for row in rows]),
            "valid": torch.tensor([row.bad is None for row in rows]),
            "bad": tuple(row.bad for row in rows if row.bad is not None),
        }
        if self.tokenizer is None:
            return fields
        fields["text_ids"], fields["text_mask"] = self.tokenizer.encode([row.text for row in rows])  # b l
        stills = [row.frame_texts for row in rows if row.frame_texts is not None]
        if stills:
            ids, mask = self.tokenizer.encode([text for texts in stills for text in texts])
            shape = (len(rows), frames.shape[1], self.tokenizer.context_length)
            fields["frame_text_ids"], fields["frame_text_mask"] = ids.view(shape), mask.view(shape)  # b f l
        return fields


def _loader(
    items: _Items, steps: _Steps, collate: _Collate, workers: int, *, persistent: bool = True
) -> Iterable[dict[str, Any]]:
    """torch's loader over given steps, in order, with pinned memory where there is a GPU."""
    return DataLoader(
        items,
        batch_sampler=steps,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: drawn from the global one, the workers' seeds would shift a resumed run.
        generator=torch.Generator().manual_seed(0),
    )
