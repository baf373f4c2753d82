"""Plans of clips for DALI's graph, from their files or from shards."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discovla.data.augment import crop_box
from discovla.data.config import FULL_SIZE, Augment, FrameSettings
from discovla.data.dali.augment import drawn_steps
from discovla.data.dali.plans import Plan, no_plan
from discovla.data.dali.support import Content, DaliSettings, FullSize, missing, unfit
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling, clip_sampling
from discovla.data.sandbox import Sandbox, WorkerLost
from discovla.data.shards.reader import Shards
from discovla.data.video.errors import DecodeError, check_file
from discovla.data.video.frames import sampled_indices, warn_once
from discovla.data.video.index import FrameIndex, FrameIndexStore
from discovla.data.video.pyav import index_video
from discovla.data.video.resize import resize_geometry


class Otherwise(DecodeError):
    """A file that DALI would read otherwise than PyAV."""


def leave_to_pyav(path: Path, reason: str) -> None:
    """Say that a clip is not read by DALI, once in a process."""
    warn_once(str(path), f"decoder: 'dali+pyav' leaves it to pyav: {reason}")


class DaliClipReader:
    """What `FileClipReader` is, for clips whose frames are made a batch at a time: it plans them.

    Which frames of a file to take is known once they have been counted, by PyAV, in a process that is
    replaced where it does not survive it; the cache keeps that.  A file that DALI would read otherwise than
    PyAV is refused by name, or left to another reader.

    It pickles, so that worker processes can have it.

    Args:
        augment: that of training; `none` for evaluation.
        threads: of the graph.
        shards: where frames come from, in place of the clips' files.
        instead: what reads the clips that DALI does not.

    Raises:
        ValueError: DALI is not there, or the cache cannot be written.
    """

    def __init__(
        self,
        settings: FrameSettings,
        augment: Augment,
        *,
        threads: int = 1,
        shards: Shards | None = None,
        instead: Any | None = None,
    ) -> None:
        lacking = missing()
        if lacking is not None:
            raise ValueError(f"decoder: {lacking}")
        self.settings, self.shards, self.instead = settings, shards, instead
        self.graph = _graph_settings(settings, augment, threads, shards)
        self._tables = FrameIndexStore(settings.cache)
        self._counter = None if settings.limit is None else Sandbox(index_video, limit=settings.limit)

    def sample(self, clip: Clip, augment: Augment | None = None, seed: str = "") -> tuple[Plan, int]:
        """The plan of a clip's frames, as `FileClipReader.sample`, and how many frames it has.

        Raises:
            DecodeError: the clip gives none, or DALI cannot read it.
        """
        sampling = clip_sampling(self.settings, clip, None if augment is None else seed)
        try:
            plan, size = self._of_shards(clip, sampling) if self.shards else self._of_file(clip, sampling)
        except Otherwise as error:
            if self.instead is None:
                raise
            leave_to_pyav(clip.video, error.reason)
            frames, shown = self.instead.sample(clip, augment, seed)
            return replace(self.blank(), id=clip.id, path=clip.video, made=frames), shown
        if augment == "light":
            plan = replace(plan, light=seed)
        if self.instead is not None:
            plan = replace(plan, asked=(clip, augment, seed))
        if not self.graph.sized:
            plan = self._cut(plan, size, seed)
        return plan, len(plan.places)

    def blank(self) -> Plan:
        """What stands in the row of a clip that gives no frames; the row is marked not valid."""
        return no_plan(self.settings.frames)

    def close(self) -> None:
        """End the process that counts frames."""
        if self._counter is not None:
            self._counter.close()

    def _of_file(self, clip: Clip, sampling: Sampling) -> tuple[Plan, tuple[int, int]]:
        """Frames of a file, and their width and height."""
        path = clip.video
        check_file(path)
        table = self._table(path)
        indices = sampled_indices(path, table, sampling, self.settings.damaged)
        reason = unfit(table, cuda=self.graph.device is not None)
        if reason is not None:
            raise Otherwise(path, f"cannot be read by decoder = 'dali': {reason}")
        chosen, places = np.unique(indices, return_inverse=True)
        return self._plan(clip, chosen, places), table.size

    def _of_shards(self, clip: Clip, sampling: Sampling) -> tuple[Plan, tuple[int, int]]:
        """Frames in shards, and their width and height."""
        assert self.shards is not None
        kept = self.shards.stored_frames(clip, sampling, damaged=self.settings.damaged)
        plan = self._plan(clip, np.arange(len(kept.content)), kept.places)
        return replace(plan, content=kept.content), kept.size

    def _plan(self, clip: Clip, indices: np.ndarray, places: np.ndarray) -> Plan:
        return Plan(
            id=clip.id,
            path=clip.video,
            room=self.settings.frames,
            indices=indices.astype(np.int32),
            places=places.astype(np.int64),
        )

    def _cut(self, plan: Plan, size: tuple[int, int], seed: str) -> Plan:
        """A plan with how frames of this width and height become the model's."""
        side = self.settings.image_size
        if self.graph.augment == "resized_crop":
            left, top, right, bottom = crop_box(random.Random(seed), *size)
            return replace(plan, cut=(top, left), part=(bottom - top, right - left), size=(side, side))
        (width, height), (left, top) = resize_geometry(*size, side)
        steps = drawn_steps(seed, size) if self.graph.augment == "randaugment" else ()
        return replace(plan, cut=(top, left), part=(side, side), size=(height, width), steps=steps)

    def _table(self, path: Path) -> FrameIndex:
        """The table of a file, counted where it is not known, with what the frames sampled look like."""
        table = self._tables.get(path)
        if table is None:
            try:
                table = index_video(path) if self._counter is None else self._counter(path)
            except WorkerLost as error:
                raise DecodeError(path, f"not decoded: {error}") from error
            self._tables.put(path, table)
        return table


def _graph_settings(
    settings: FrameSettings, augment: Augment, threads: int, shards: Shards | None
) -> DaliSettings:
    """The graph that makes the frames planned."""
    content: Content = "video"
    if shards is not None:
        content = "raw" if shards.settings.format == "raw" else "jpeg"
    full: FullSize = "none"
    if augment in FULL_SIZE:
        full = "randaugment" if augment == "randaugment" else "resized_crop"
    return DaliSettings(
        content=content,
        frames=settings.frames,
        image_size=settings.image_size,
        sized=shards is not None and shards.settings.size == settings.image_size,
        augment=full,
        device=torch.cuda.current_device() if torch.cuda.is_available() else None,
        threads=max(1, threads),
        limit=settings.limit or 300.0,
    )
