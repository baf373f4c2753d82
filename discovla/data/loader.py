"""Batches for training and evaluation, read by worker processes."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from discovla.batch import Batch
from discovla.data.config import DataConfig
from discovla.data.dali.reader import DaliClipReader, DaliDecoder
from discovla.data.dataset import (
    ClipDataset,
    ClipReader,
    Dataset,
    Pair,
    Sample,
    clip_dataset,
    clip_reader,
    decodes_by_dali,
)
from discovla.data.manifest import Clip, check_clips
from discovla.data.tokens import CaptionTokenizer, make_tokenizer
from discovla.data.transfer import (
    PREFETCH,
    WAIT_SECONDS,
    ReadAhead,
    batch_seconds,
    check_shared_memory,
    report_failed_transfers,
    wait_for_batches,
)
from discovla.data.video.errors import DecodeError


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Shape and order of the batches of one rank.

    batch_size: training pairs of a batch, over all ranks.
    seed: seed of the order and of the augmentation.
    image_size: pixels of a side of the frames.
    context_length: tokens of a caption.
    frame_captions: batches have one caption per frame.
    order: batches tell which captions tell order, and have their exchanges.
    """

    batch_size: int
    rank: int
    world_size: int
    seed: int
    image_size: int
    context_length: int
    frame_captions: bool
    order: bool = False

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: expected 0 .. {self.world_size - 1}, found {self.rank}")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size: expected a multiple of the {self.world_size} processes, found {self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class VideoBatch:
    """Frames for evaluation: b f y x 3 uint8, their mask b f bool, and the indices of the clips, b int64."""

    frames: Tensor
    frame_mask: Tensor
    clip_index: Tensor

    def __len__(self) -> int:
        return self.frames.shape[0]


class TrainLoader:
    """Training batches of one rank.

    The order of all pairs depends on (seed, epoch) alone; a reversed pair follows its pair.  Each step takes
    the next `batch_size` pairs, and rank r its r-th contiguous part, so the batches of all ranks concatenated
    are those of a single process.  The last, smaller batch of an epoch is dropped.  Only one iterator may
    be in use at a time.

    Args:
        dataset: clips, which are checked here, or any other `Dataset`.
        reduce: take a smaller batch if there are fewer pairs than `spec.batch_size`; it is in `spec` then.

    Raises:
        ValueError: fewer pairs than a batch, or clips that cannot be used.
    """

    def __init__(
        self, dataset: Sequence[Clip] | Dataset, config: DataConfig, spec: BatchSpec, *, reduce: bool = False
    ) -> None:
        if isinstance(dataset, Sequence):
            dataset = clip_dataset(
                dataset,
                config,
                image_size=spec.image_size,
                context_length=spec.context_length,
                frame_captions=spec.frame_captions,
                seed=spec.seed,
                order=spec.order,
            )
        if reduce and len(dataset) < spec.batch_size:
            spec = replace(spec, batch_size=reduced_batch_size(len(dataset), spec.world_size))
        self.dataset, self.spec = dataset, spec
        self.steps_per_epoch = len(dataset) // spec.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size: expected at most the {len(dataset)} training pairs, found {spec.batch_size}"
            )
        tokenizer = make_tokenizer(spec.context_length, config.tokenizer)
        limit = batch_seconds(spec.batch_size // spec.world_size, config.decode_seconds)
        self._reader = _BatchReader(
            dataset, spec.image_size, tokenizer, config.workers, persistent=True, limit=limit
        )

    def order(self, epoch: int) -> list[int]:
        """Return the indices of all pairs in the order in which an epoch reads them."""
        order = epoch_order(len(self.dataset), self.spec.seed, epoch).tolist()
        return self.dataset.with_reverses(order) if isinstance(self.dataset, ClipDataset) else order

    @overload
    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]: ...

    @overload
    def epoch(
        self, epoch: int, *, start: int = 0, should_stop: Callable[[], bool]
    ) -> Iterator[Batch | None]: ...

    def epoch(
        self, epoch: int, *, start: int = 0, should_stop: Callable[[], bool] | None = None
    ) -> Iterator[Batch | None]:
        """Return the batches of an epoch from step `start` on.

        Args:
            should_stop: if it returns True while a batch is awaited, None is the last batch.

        Raises:
            ValueError: `start` lies outside the epoch.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"start: expected 0 .. {self.steps_per_epoch}, found {start}")
        order = self.order(epoch)
        size, share = self.spec.batch_size, self.spec.batch_size // self.spec.world_size
        firsts = (step * size + self.spec.rank * share for step in range(start, self.steps_per_epoch))
        steps = [[(i, epoch) for i in order[first : first + share]] for first in firsts]
        with closing(self._reader.read(steps, should_stop)) as batches:
            yield from (None if fields is None else Batch(**fields) for fields in batches)


def read_ahead(config: DataConfig, frames: int, image_size: int, clips: int, steps: int) -> ReadAhead:
    """Return the batches that workers hold while they read `steps` batches of clips; none with DALI."""
    workers = 0 if decodes_by_dali(config) else min(config.workers, steps)
    return ReadAhead(workers=workers, clips=clips, clip_bytes=frames * 3 * image_size**2, steps=steps)


def reduced_batch_size(pairs: int, world_size: int) -> int:
    """Return the largest batch of so many pairs that suits the processes, and 1, 2, 4 and 8 of them."""
    unit = math.lcm(8, world_size)
    return pairs // unit * unit or pairs // world_size * world_size or world_size


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation of `count` pairs, int64, that depends on (seed, epoch) alone."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator)


def video_batches(
    clips: Sequence[Clip],
    config: DataConfig,
    image_size: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[VideoBatch]:
    """Yield the frames of this rank's contiguous part of the clips, in order, without augmentation.

    Args:
        clips: the clips of all ranks; `clip_index` counts in this list.
        batch_size: clips of a batch; the last batch may be smaller.

    Raises:
        ValueError: a video file is missing, found before anything is read.
        DecodeError: a clip gives no frames; all such clips of the batch are named.
    """
    check_clips(clips, files=config.shards is None)
    low, high = (len(clips) * r // world_size for r in (rank, rank + 1))
    for batch, reasons in readable_batches(clips, config, image_size, batch_size, low, high):
        bad = [(clips[i], why) for i, why in zip(batch.clip_index.tolist(), reasons, strict=True) if why]
        if bad:
            named = "; ".join(f"{clip.id!r} ({clip.video}): {why}" for clip, why in bad)
            raise DecodeError(bad[0][0].video, f"{len(bad)} clips cannot be evaluated: {named}")
        yield batch


def readable_batches(
    clips: Sequence[Clip],
    config: DataConfig,
    image_size: int,
    batch_size: int,
    low: int = 0,
    high: int | None = None,
    *,
    reader: ClipReader | None = None,
) -> Iterator[tuple[VideoBatch, list[str | None]]]:
    """Yield the frames of clips `low` .. `high` - 1 in order, and for each clip why it gives none, or None.

    There is no augmentation.  A clip that gives no frames has black ones.  `reader` is that of the config by
    default.
    """
    high = len(clips) if high is None else high
    if reader is None:
        reader = clip_reader(clips, config, image_size, training=False)
    dataset = ClipDataset(clips=clips, pairs=[Pair(i, 0) for i in range(len(clips))], reader=reader)
    firsts = range(low, high, batch_size)
    steps = [[(i, 0) for i in range(first, min(first + batch_size, high))] for first in firsts]
    workers = min(config.workers, len(steps))
    if steps:
        check_shared_memory(read_ahead(config, config.frames, image_size, len(steps[0]), len(steps)))
    limit = batch_seconds(batch_size, config.decode_seconds)
    batch_reader = _BatchReader(dataset, image_size, None, workers, persistent=False, limit=limit)
    with closing(batch_reader), closing(batch_reader.read(steps)) as batches:
        for fields in batches:
            assert fields is not None, "it ends early only if asked to stop"
            reasons = iter([clip.reason for clip in fields["bad"]])
            batch = VideoBatch(
                frames=fields["frames"], frame_mask=fields["frame_mask"], clip_index=fields["video_index"]
            )
            yield batch, [None if valid else next(reasons) for valid in fields["valid"].tolist()]


def text_batches(
    texts: Sequence[str], context_length: int, batch_size: int, tokenizer: str = "clip"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and mask, b l int64 and bool, of texts in order; long texts are cut to the context.

    Args:
        tokenizer: as in `DataConfig`.
    """
    tokens = make_tokenizer(context_length, tokenizer)
    for first in range(0, len(texts), batch_size):
        yield tokens.encode(texts[first : first + batch_size])


Item = tuple[int, int]  # index of a sample, epoch


class _BatchReader:
    """Fields of batches, read by worker processes and decoded by DALI if the dataset has plans for it.

    Args:
        tokenizer: None for evaluation, which reads no texts.
        persistent: keep the workers for the next `read`.
        limit: seconds that a batch may take.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_size: int,
        tokenizer: CaptionTokenizer | None,
        workers: int,
        *,
        persistent: bool,
        limit: float,
    ) -> None:
        self._limit = limit
        reader = dataset.reader if isinstance(dataset, ClipDataset) else None
        self._dali = DaliDecoder(reader.pipeline) if isinstance(reader, DaliClipReader) else None
        self._steps = _Steps()
        forks = workers > 0 and multiprocessing.get_start_method() == "forkserver"
        self._loader = torch.utils.data.DataLoader(
            _Items(dataset),
            batch_sampler=self._steps,
            collate_fn=_Collate(
                frames_per_clip=dataset.frames_per_clip,
                image_size=image_size,
                plans=self._dali is not None,
                tokenizer=tokenizer,
                order=isinstance(dataset, ClipDataset) and dataset.order is not None,
            ),
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            timeout=WAIT_SECONDS if workers else 0,
            persistent_workers=persistent and workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_init_worker,
            # "forkserver" is the default from Python 3.14 on, but its server dies of a launcher's SIGTERM.
            multiprocessing_context="fork" if forks else None,
            # Own generator: if drawn from the global one, the workers' seeds would shift a resumed run.
            generator=torch.Generator().manual_seed(0),
        )

    def read(
        self, steps: list[list[Item]], should_stop: Callable[[], bool] | None = None
    ) -> Generator[dict[str, Any] | None, None, None]:
        """Yield the fields of one batch per step; None as the last if asked to stop while one is awaited."""
        self._steps.items = steps
        if self._dali is None:
            yield from wait_for_batches(self._loader, self._limit, should_stop)
        else:  # a stop is obeyed once the batch is there
            batches = wait_for_batches(self._loader, self._limit, None)
            yield from self._dali.decode_batches(fields for fields in batches if fields is not None)

    def close(self) -> None:
        """End the process in which DALI runs."""
        if self._dali is not None:
            self._dali.close()


@dataclass(frozen=True)
class _Items(torch.utils.data.Dataset[Sample]):
    """A dataset indexed by (index, epoch): the epoch travels with the index, so workers hold no state."""

    dataset: Dataset

    def __getitem__(self, item: Item) -> Sample:
        return self.dataset.sample(*item)


class _Steps:
    """Batch sampler whose items are replaced for each epoch, while the workers live on."""

    items: Sequence[list[Item]] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[list[Item]]:
        return iter(self.items)


@dataclass(frozen=True, kw_only=True)
class _Collate:
    """Collate samples to the fields of a `Batch`: a dict, because torch pins the tensors of dicts only.

    frames_per_clip: clips with fewer frames are padded with black frames, which the mask hides.
    plans: frames are plans, which `DaliDecoder` replaces.
    order: samples tell of the order in their captions.
    """

    frames_per_clip: int
    image_size: int
    plans: bool
    tokenizer: CaptionTokenizer | None
    order: bool

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        frames = tuple(sample.frames for sample in samples) if self.plans else self._padded(samples)
        # A bad clip has no masked frame: its row is skipped as a whole.
        lengths = [self.frames_per_clip if s.frames is None else len(s.frames) for s in samples]
        fields: dict[str, Any] = {
            "frames": frames,
            "frame_mask": torch.arange(self.frames_per_clip) < torch.tensor(lengths)[:, None],  # b f
            "video_index": torch.tensor([sample.video_index for sample in samples]),
            "valid": torch.tensor([sample.bad is None for sample in samples]),
            "bad": tuple(sample.bad for sample in samples if sample.bad is not None),
        }
        if self.tokenizer is None:
            return fields
        fields["text_ids"], fields["text_mask"] = self.tokenizer.encode([s.text for s in samples])  # b l
        if self.order:
            false = [s.text if s.false_text is None else s.false_text for s in samples]
            fields["false_text_ids"], fields["false_text_mask"] = self.tokenizer.encode(false)  # b l
            fields["has_false_text"] = torch.tensor([s.false_text is not None for s in samples])
            fields["tells_order"] = torch.tensor([s.tells_order for s in samples])
        captions = [s.frame_captions for s in samples if s.frame_captions is not None]
        if captions:
            ids, mask = self.tokenizer.encode([text for texts in captions for text in texts])
            shape = (len(samples), self.frames_per_clip, self.tokenizer.context_length)
            fields["frame_text_ids"], fields["frame_text_mask"] = ids.view(shape), mask.view(shape)  # b f l
        return fields

    def _padded(self, samples: list[Sample]) -> Tensor:
        """Return the frames of all samples, b f y x c uint8, or their features, b f d float32."""
        arrays = [s.frames if isinstance(s.frames, np.ndarray) else None for s in samples]
        return pad_frames(arrays, self.frames_per_clip, self.image_size)


def pad_frames(arrays: Sequence[np.ndarray | None], frames: int, size: int) -> Tensor:
    """Return clips with black frames after their own, b f y x 3 uint8, or features with zeros, b f d.

    Args:
        arrays: frames n y x 3 or features n d of each clip, n at most `frames`; None for a bad clip.
        size: y and x if all clips are bad.
    """
    shape = next((a.shape[1:] for a in arrays if a is not None), (size, size, 3))
    dtype = next((a.dtype for a in arrays if a is not None), np.dtype(np.uint8))
    padded = np.zeros((len(arrays), frames, *shape), dtype)
    for row, array in zip(padded, arrays, strict=True):
        if array is not None:
            row[: len(array)] = array
    return torch.from_numpy(padded)


def _init_worker(_: int) -> None:
    """Make a worker process report failed transfers, and end by SIGTERM of its parent only.

    Launchers send SIGTERM to all processes of a job; the training process ends its workers when it is done.
    """
    report_failed_transfers()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_parent_signal, name="signals", daemon=True).start()


def _await_parent_signal() -> None:
    """End this process when its parent sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
