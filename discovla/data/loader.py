"""Batches for training and evaluation, read by worker processes."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from discovla.batch import BadClip, Batch
from discovla.data.config import DataConfig
from discovla.data.dali.frames import DaliFrames
from discovla.data.dali.plans import Plan
from discovla.data.dali.reader import DaliClipReader
from discovla.data.dataset import (
    BatchSpec,
    ClipDataset,
    ClipReader,
    Dataset,
    Frames,
    Sample,
    clip_dataset,
    clip_reader,
)
from discovla.data.manifest import Clip, check_clips
from discovla.data.resident import Resident
from discovla.data.tokens import Tokenizer
from discovla.data.video.errors import DecodeError

logger = logging.getLogger(__name__)

_FILL = 16  # clips read at once into memory


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
        source: clips, which are checked before anything is read, or any other `Dataset`.
        config: what is read and how.  Frames that are to be resident are read here.
        shape: what the batches look like.

    Raises:
        ValueError: a batch that does not divide, fewer pairs than a batch, clips that cannot be used, or
            frames that do not fit in memory.
    """

    def __init__(self, source: Sequence[Clip] | Dataset, config: DataConfig, shape: BatchSpec) -> None:
        if shape.world_size < 1 or not 0 <= shape.rank < shape.world_size:
            raise ValueError(f"rank: expected 0 .. world_size - 1, got {shape.rank} of {shape.world_size}")
        if shape.batch_size < 1 or shape.batch_size % shape.world_size:
            raise ValueError(
                f"batch_size: expected a multiple of the {shape.world_size} processes, got {shape.batch_size}"
            )
        if isinstance(source, Sequence):
            source = clip_dataset(source, config, shape)
        self.source = source
        self.shape = shape
        self.steps_per_epoch = len(source) // shape.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size: expected at most the {len(source)} training pairs, got {shape.batch_size}"
            )
        tokenizer = Tokenizer(shape.context_length)
        self._steps = _Steps()
        self._loader = _loader(_Items(source), self._steps, _Collate(tokenizer), config.workers)
        self._graph = _graph(source.reader) if isinstance(source, ClipDataset) else None
        self._resident = None
        if config.resident != "none" and isinstance(source, ClipDataset):
            read = _finished(_all_clips(source, config.workers), self._graph)
            self._resident = Resident(source, read, config.resident, tokenizer)

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
        if self._resident is None:
            with closing(_finished(self._loader, self._graph)) as finished:
                yield from (Batch(**fields) for fields in finished)
            return
        for row in self._steps.rows:
            yield Batch(**self._resident.batch([index for index, _ in row], epoch))


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
    check_clips(clips, files=config.shards is None)
    reader = clip_reader(clips, config, image_size, None)
    low, high = (len(clips) * r // world_size for r in (rank, rank + 1))
    firsts = range(low, high, batch_size)
    steps = _Steps([[(i, 0) for i in range(first, min(first + batch_size, high))] for first in firsts])
    source = _VideoSource(clips=clips, reader=reader)
    workers = min(config.workers, len(steps))
    graph = _graph(reader)
    loader = _loader(_Items(source), steps, _Collate(None), workers, persistent=False)
    for fields in _finished(loader, graph):
        bad: tuple[BadClip, ...] = fields["bad"]
        if bad:
            named = "; ".join(f"{clip.id!r} ({clip.video}): {clip.reason}" for clip in bad)
            raise DecodeError(bad[0].video, f"{len(bad)} clips cannot be evaluated: {named}")
        yield VideoBatch(
            frames=fields["frames"], frame_mask=fields["frame_mask"], clip_index=fields["video_index"]
        )
    if graph is not None:
        graph.close()


def text_batches(
    texts: Sequence[str], context_length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and mask, b l int64 and bool, of texts in order, cut to the context; the last may be less."""
    tokenizer = Tokenizer(context_length)
    for first in range(0, len(texts), batch_size):
        yield tokenizer.encode(texts[first : first + batch_size])


@dataclass(frozen=True, kw_only=True)
class _VideoSource:
    """Each clip once, without a text."""

    clips: Sequence[Clip]
    reader: ClipReader

    def __len__(self) -> int:
        return len(self.clips)

    def sample(self, index: int, epoch: int) -> Sample:
        clip = self.clips[index]
        try:
            frames, shown = self.reader.sample(clip)
            return Sample(text="", frames=frames, video_index=index, shown=shown)
        except DecodeError as error:
            bad = BadClip(id=clip.id, video=str(clip.video), reason=error.reason)
            return Sample(text="", frames=self.reader.blank(), video_index=index, bad=bad)


def _graph(reader: ClipReader) -> DaliFrames | None:
    """What makes the frames that a reader plans; None where it reads them itself."""
    return DaliFrames(reader.graph, reader.instead) if isinstance(reader, DaliClipReader) else None


def _finished(
    batches: Iterable[dict[str, Any]], graph: DaliFrames | None
) -> Generator[dict[str, Any], None, None]:
    """Batches with their frames made, where they are planned."""
    yield from batches if graph is None else graph.finished(batches)


def _all_clips(source: ClipDataset, workers: int) -> Iterable[dict[str, Any]]:
    """Every clip of a source once, a few at a time, as collated for evaluation."""
    count = len(source.clips)
    steps = _Steps([[(i, 0) for i in range(k, min(k + _FILL, count))] for k in range(0, count, _FILL)])
    videos = _VideoSource(clips=source.clips, reader=source.reader)
    return _loader(_Items(videos), steps, _Collate(None), min(workers, len(steps)), persistent=False)


@dataclass(frozen=True)
class _Items(data.Dataset[Sample]):
    """A source as torch's loader asks for it: the epoch travels with the index, workers hold no state."""

    source: Dataset

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
        frames = _together([row.frames for row in rows])
        f = frames[0].room if isinstance(frames, tuple) else frames.shape[1]
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
            shape = (len(rows), f, self.tokenizer.context_length)
            fields["frame_text_ids"], fields["frame_text_mask"] = ids.view(shape), mask.view(shape)  # b f l
        return fields


def _together(frames: Sequence[Frames]) -> Tensor | tuple[Plan, ...]:
    """Frames of clips, b f y x c, or the plans of them."""
    plans = tuple(each for each in frames if isinstance(each, Plan))
    return plans or torch.from_numpy(np.stack([each for each in frames if not isinstance(each, Plan)]))


def _loader(
    items: _Items, steps: _Steps, collate: _Collate, workers: int, *, persistent: bool = True
) -> Iterable[dict[str, Any]]:
    """torch's loader over given steps, in order, with pinned memory where there is a GPU."""
    forks = workers > 0 and multiprocessing.get_start_method() == "forkserver"
    return data.DataLoader(
        items,
        batch_sampler=steps,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_spared_signals,
        # the server that would fork them, Python's choice from 3.14 on, dies of a launcher's SIGTERM
        multiprocessing_context="fork" if forks else None,
        # Its own generator: drawn from the global one, the workers' seeds would shift a resumed run.
        generator=torch.Generator().manual_seed(0),
    )


def _spared_signals(_: int) -> None:
    """Let a process that reads obey the one that started it alone.

    Launchers send SIGTERM to all processes of a job; that which trains has its readers end once it is done.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, name="signals", daemon=True).start()


def _obey_parent() -> None:
    """End this process where the one that started it asks for it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
