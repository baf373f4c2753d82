"""Captions of the sampled frames of clips, kept as they are made."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from discovla.data.captions.captioners import Captioner, Failed
from discovla.data.captions.frames_to_caption import FrameRequest, HashedFrames, hashed_frames
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from discovla.data.sandbox import WorkerLost, run_sandboxed
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import Damaged

_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Which frames are captioned, and with how much at once.

    frames, sample_rate: as training samples them, which is DiscoVLA's way wherever there are frame captions.
    side: pixels of the longer side of a picture, larger ones are reduced.  batch_size: pictures that a
    captioner gets at once.  workers: processes that decode.  seconds: that a clip may take.
    """

    frames: int = 12
    sample_rate: float = 1.0
    damaged: Damaged = "refuse"
    side: int = 768
    batch_size: int = 16
    workers: int = 2
    seconds: float = 300.0


@dataclass(frozen=True, kw_only=True)
class CaptionedClips:
    """What came of it.

    texts: by clip id a caption of each of its frames; clips that are not whole are not in it.  bad: clips
    that give no frames, with reasons.  failed: clips with a frame that got no caption, with its reason.
    frames: how many different pictures of all clips have a caption; asked: how many of them were asked now.
    """

    texts: dict[str, tuple[str, ...]]
    bad: dict[str, str]
    failed: dict[str, str]
    frames: int
    asked: int

    def lines(self) -> list[str]:
        """A summary to read."""
        known = self.frames - self.asked
        lines = [
            f"{len(self.texts)} clips captioned: {self.asked} different frames now, {known} were known before"
        ]
        for what, found in (("give no frames", self.bad), ("lack the caption of a frame", self.failed)):
            if found:
                lines.append(f"{len(found)} clips {what} and are left out:")
                lines += [f"  {name}: {reason}" for name, reason in list(found.items())[:_NAMED]]
                lines += [f"  and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
        return lines


class CaptionStore:
    """Captions by frame and frames by clip in a JSONL, each line written as soon as it is known.

    One file holds what one model said to one prompt: its name has the hash of both.

    Args:
        folder: made where there is none.
        identity: of the captioner.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read or written.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"captions-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.jsonl"
        self.texts: dict[str, str] = {}
        self.clips: dict[str, tuple[str, ...]] = {}
        if not self._read():
            self._write([{"model": identity}])

    def add_texts(self, texts: dict[str, str]) -> None:
        """Keep captions by the hash of their frame."""
        self._write([{"frame": digest, "text": text} for digest, text in texts.items()])
        self.texts |= texts

    def add_clip(self, key: str, hashes: tuple[str, ...]) -> None:
        """Keep which frames a clip has, all of which have a caption."""
        self._write([{"clip": key, "frames": hashes}])
        self.clips[key] = hashes

    def of(self, key: str) -> tuple[str, ...] | None:
        """The captions of a clip's frames, or None where they are not all known."""
        hashes = self.clips.get(key)
        return None if hashes is None else tuple(self.texts[digest] for digest in hashes)

    def _read(self) -> bool:
        """Take in what is there, without a last line that was cut short; False where there is nothing."""
        if not self.path.exists():
            return False
        lines = self.path.read_text(encoding="utf-8").split("\n")
        if lines[-1]:
            os.truncate(self.path, len("".join(f"{line}\n" for line in lines[:-1]).encode()))
        for number, line in enumerate(lines[:-1], start=1):
            try:
                row = json.loads(line)
                if "frame" in row:
                    self.texts[row["frame"]] = row["text"]
                elif "clip" in row:
                    self.clips[row["clip"]] = tuple(row["frames"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number}: not what `caption` wrote; remove the file"
                ) from error
        return len(lines) > 1

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def caption_clips(
    clips: Sequence[Clip],
    captioner: Captioner,
    store: CaptionStore,
    settings: CaptionSettings,
    *,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> CaptionedClips:
    """Caption every sampled frame of clips, each different picture once.

    Clips whose captions are known are not opened.  The others are decoded in processes that are replaced
    where they hang or crash; a clip that gives no frames is named and left out.

    Args:
        captioner: gets `batch_size` pictures at once.
        store: where captions are kept, and were by an interrupted run.
        told: called with how many clips are done and how many there are.
    """
    job = _Job(captioner=captioner, store=store, settings=settings)
    requests = {clip.id: _request(clip, settings) for clip in clips}
    keys = {name: _key(request) for name, request in requests.items()}
    left = {name: request for name, request in requests.items() if store.of(keys[name]) is None}
    known = len(clips) - len(left)
    told(known, len(clips))
    named: dict[FrameRequest, list[str]] = {}
    for name, request in left.items():
        named.setdefault(request, []).append(name)  # clips that are the same part of the same file
    for outcome in run_sandboxed(hashed_frames, named, workers=settings.workers, limit=settings.seconds):
        names = named[outcome.item]
        if outcome.value is None:
            job.bad |= dict.fromkeys(names, _reason(outcome.error))
        else:
            job.take(keys[names[0]], names, outcome.value)
        known += len(names)
        told(known, len(clips))
    job.finish()
    texts = {clip.id: found for clip in clips if (found := store.of(keys[clip.id])) is not None}
    frames = {digest for clip in clips for digest in store.clips.get(keys[clip.id], ())}
    return CaptionedClips(
        texts=texts, bad=job.bad, failed=job.failed, frames=len(frames | job.asked), asked=len(job.asked)
    )


def with_captions(
    clips: Iterable[Clip], texts: dict[str, tuple[str, ...]], *, keep: bool = True
) -> list[Clip]:
    """Clips with the captions of their frames for each of their captions.

    Args:
        texts: by clip id; clips without stay as they are.
        keep: frame captions that a clip has already.
    """
    return [
        clip
        if clip.id not in texts
        else replace(
            clip,
            frame_captions=tuple(
                old if keep and old is not None else texts[clip.id]
                for old in clip.frame_captions or (None,) * len(clip.captions)
            ),
        )
        for clip in clips
    ]


@dataclass(kw_only=True)
class _Job:
    """Pictures that wait for a caption, and the clips that wait for them."""

    captioner: Captioner
    store: CaptionStore
    settings: CaptionSettings
    bad: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    queue: dict[str, np.ndarray] = field(default_factory=dict)
    waiting: dict[str, tuple[list[str], tuple[str, ...]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, names: list[str], found: HashedFrames) -> None:
        """Queue the pictures of a clip that have no caption yet, and caption full batches."""
        self.waiting[key] = (names, found.hashes)
        known = self.store.texts.keys() | self.refused.keys()
        self.queue |= {digest: image for digest, image in found.images.items() if digest not in known}
        while len(self.queue) >= self.settings.batch_size:
            self._caption()
        self._settle()

    def finish(self) -> None:
        """Caption what is left."""
        while self.queue:
            self._caption()
        self._settle()

    def _caption(self) -> None:
        """Caption one batch."""
        batch = [(digest, self.queue[digest]) for digest in list(self.queue)[: self.settings.batch_size]]
        answers = self.captioner([image for _, image in batch])
        texts = {}
        for (digest, _), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Failed):
                self.refused[digest] = answer.reason
            else:
                texts[digest] = answer
            del self.queue[digest]
        self.store.add_texts(texts)
        self.asked |= texts.keys()
        if not texts and not self.store.texts:
            raise ValueError(f"the first {len(batch)} frames got no caption: {self.refused[batch[0][0]]}")

    def _settle(self) -> None:
        """Write down the clips all of whose pictures have a caption, or that lack one for good."""
        for key, (names, hashes) in list(self.waiting.items()):
            reasons = [self.refused[digest] for digest in hashes if digest in self.refused]
            if reasons:
                self.failed |= dict.fromkeys(names, reasons[0])
            elif all(digest in self.store.texts for digest in hashes):
                self.store.add_clip(key, hashes)
            else:
                continue
            del self.waiting[key]


def _request(clip: Clip, settings: CaptionSettings) -> FrameRequest:
    """What is decoded of a clip."""
    sampling = Sampling(
        frames=settings.frames, sample_rate=settings.sample_rate, start=clip.start, end=clip.end
    )
    return FrameRequest(path=clip.video, sampling=sampling, side=settings.side, damaged=settings.damaged)


def _key(request: FrameRequest) -> str:
    """Of a clip as its file is and as it is sampled."""
    try:
        stat = request.path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
    except OSError:
        state = None
    return hashlib.sha256(repr((request, state)).encode(errors="surrogateescape")).hexdigest()[:32]


def _reason(error: Exception | None) -> str:
    """Why a clip gives no frames."""
    if isinstance(error, DecodeError):
        return error.reason
    return f"decoding it {error}" if isinstance(error, WorkerLost) else f"{type(error).__name__}: {error}"
