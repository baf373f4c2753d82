"""Caption the sampled frames of clips, and store captions so that an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from discovla.data.sandbox import WorkerLost, run_sandboxed
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import Damaged, Hdr, read_frames
from discovla.foreign import to_json

INSTRUCTION = "Describe this picture in one short sentence."
_SHOWN = 5  # clips named in a report


@dataclass(frozen=True, kw_only=True)
class NoCaption:
    """Reason why a picture has no caption."""

    reason: str


class Captioner(Protocol):
    """Caption pictures."""

    identity: str
    """Model, weights, prompt and all else, besides the picture, that determines a caption."""

    def __call__(self, images: Sequence[np.ndarray]) -> list[str | NoCaption]:
        """Return a caption for each picture (uint8 RGB, y x 3), or the reason why it has none."""
        ...


def as_caption(text: str) -> str | NoCaption:
    """Return a model's answer on one line."""
    return " ".join(text.split()) or NoCaption(reason="the model's answer is empty")


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Frames to caption, and limits."""

    frames: int = 12
    """Sampled per clip as in training with `sampling = "discovla"`."""
    sample_rate: float = 1.0
    """Frames a second."""
    damaged: Damaged = "refuse"
    """Treatment of clips that end early."""
    hdr: Hdr = "refuse"
    """Treatment of HDR clips."""
    side: int = 768
    """Pixels of the longer side; larger frames are reduced."""
    batch_size: int = 16
    """Pictures given to the captioner at once."""
    workers: int = 2
    """Decoding processes."""
    seconds: float = 300.0
    """Time limit for decoding one clip."""


@dataclass(frozen=True, kw_only=True)
class CaptionedClips:
    """Result of `caption_clips`."""

    texts: dict[str, tuple[str, ...]]
    """By clip id, a caption for each frame; only clips whose frames all have one."""
    bad: dict[str, str]
    """Reasons by clip id, for clips that do not decode."""
    failed: dict[str, str]
    """Reasons by clip id, for clips with a frame that has no caption."""
    frames: int
    """Different frames with a caption."""
    asked: int
    """Frames among them that were captioned now."""

    def lines(self) -> list[str]:
        """Return a summary."""
        lines = [
            f"{len(self.texts)} clips captioned: {self.asked} different frames now,"
            f" {self.frames - self.asked} were known before"
        ]
        for problem, reasons in (("give no frames", self.bad), ("lack the caption of a frame", self.failed)):
            if reasons:
                lines.append(f"{len(reasons)} clips {problem} and are left out:")
                lines += [f"  {name}: {reason}" for name, reason in list(reasons.items())[:_SHOWN]]
                lines += [f"  and {len(reasons) - _SHOWN} more"] if len(reasons) > _SHOWN else []
        return lines


class CaptionStore:
    """A JSONL file of captions by frame and frames by clip, appended to as they are made.

    There is one file per captioner; its name contains a hash of the captioner's identity.

    Args:
        folder: of the file; created if missing.
        identity: of the captioner.

    Raises:
        ValueError: the file has other content.
        OSError: the file cannot be read or written.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"captions-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.jsonl"
        self.texts: dict[str, str] = {}
        self.clips: dict[str, tuple[str, ...]] = {}
        if not self._read():
            self._append([{"model": identity}])

    def add_texts(self, texts: dict[str, str]) -> None:
        """Add captions by the hash of their frame."""
        self._append([{"frame": digest, "text": text} for digest, text in texts.items()])
        self.texts |= texts

    def add_clip(self, key: str, hashes: tuple[str, ...]) -> None:
        """Add the frame hashes of a clip; every frame must have a caption."""
        self._append([{"clip": key, "frames": hashes}])
        self.clips[key] = hashes

    def captions(self, key: str) -> tuple[str, ...] | None:
        """Return the captions of a clip's frames, or None if the clip is not stored."""
        hashes = self.clips.get(key)
        return None if hashes is None else tuple(self.texts[digest] for digest in hashes)

    def _read(self) -> bool:
        """Read the file, cutting off an incomplete last line; return False if it has no complete line."""
        if not self.path.exists():
            return False
        *lines, rest = self.path.read_text(encoding="utf-8").split("\n")
        if rest:
            os.truncate(self.path, len("".join(f"{line}\n" for line in lines).encode()))
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if "frame" in row:
                    self.texts[row["frame"]] = row["text"]
                elif "clip" in row:
                    self.clips[row["clip"]] = tuple(row["frames"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number}: expected a line that `caption` wrote; remove the file"
                ) from error
        return bool(lines)

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(to_json(row) + "\n" for row in rows))


def caption_clips(
    clips: Sequence[Clip],
    captioner: Captioner,
    store: CaptionStore,
    settings: CaptionSettings,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CaptionedClips:
    """Caption every sampled frame of clips, each different frame once.

    Clips in the store are not opened.  The others are decoded in sandboxed processes; a clip that does not
    decode, crashes its process or exceeds its time is reported and left out.

    Args:
        captioner: called with `batch_size` pictures at once.
        store: of captions made now and by earlier runs.
        progress: called with the number of clips done and of all clips.

    Raises:
        ValueError: the first batch gets no caption at all, or the captioner raises it.
    """
    batches = _Batches(captioner=captioner, store=store, batch_size=settings.batch_size)
    keys: dict[str, str] = {}
    pending: dict[_ClipFrames, list[str]] = {}  # ids of clips that are the same part of the same file
    for clip in clips:
        sampling = Sampling(
            frames=settings.frames, sample_rate=settings.sample_rate, start=clip.start, end=clip.end
        )
        request = _ClipFrames(clip.video, sampling, settings.side, settings.damaged, settings.hdr)
        keys[clip.id] = request.key()
        if store.captions(keys[clip.id]) is None:
            pending.setdefault(request, []).append(clip.id)
    bad: dict[str, str] = {}
    done = len(clips) - sum(map(len, pending.values()))
    progress(done, len(clips))
    for result in run_sandboxed(read_clip, pending, workers=settings.workers, limit=settings.seconds):
        names = pending[result.item]
        if result.value is None:
            bad |= dict.fromkeys(names, _reason(result.error))
        else:
            batches.add(keys[names[0]], names, result.value)
        done += len(names)
        progress(done, len(clips))
    batches.finish()
    captions = {clip.id: store.captions(keys[clip.id]) for clip in clips}
    frames = {digest for key in keys.values() for digest in store.clips.get(key, ())}
    return CaptionedClips(
        texts={name: texts for name, texts in captions.items() if texts is not None},
        bad=bad,
        failed=batches.failed,
        frames=len(frames | batches.asked),
        asked=len(batches.asked),
    )


def with_captions(
    clips: Iterable[Clip], texts: dict[str, tuple[str, ...]], *, keep: bool = True
) -> list[Clip]:
    """Give the frame captions of a clip to each of its captions.

    Args:
        texts: by clip id; other clips are unchanged.
        keep: keep frame captions that a clip already has.
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


@dataclass(frozen=True)
class _ClipFrames:
    """Frames to decode from one file, at most `side` pixels wide and high."""

    path: Path
    sampling: Sampling
    side: int
    damaged: Damaged
    hdr: Hdr

    def key(self) -> str:
        """Return a hash of the request and of the file's size and modification time."""
        try:
            stat = self.path.stat()
            version = (stat.st_size, stat.st_mtime_ns)
        except OSError:
            version = None
        return hashlib.sha256(repr((self, version)).encode(errors="surrogateescape")).hexdigest()[:32]


@dataclass(frozen=True)
class _Pictures:
    """Decoded frames of a clip: the hash of each frame, and the different pictures (uint8 RGB, y x 3)."""

    hashes: tuple[str, ...]
    images: dict[str, np.ndarray]


def read_clip(request: _ClipFrames) -> _Pictures:
    """Decode, reduce and hash the frames of a clip; runs in a sandboxed process.

    Raises:
        DecodeError: the clip gives no frames.
    """

    def reduced(image: Image.Image) -> np.ndarray:
        scale = request.side / max(image.size)
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.asarray(image)

    decoded = read_frames(request.path, request.sampling, reduced, damaged=request.damaged, hdr=request.hdr)
    hashes = {index: frame_hash(decoded.images[index]) for index in set(decoded.indices)}
    return _Pictures(
        hashes=tuple(hashes[index] for index in decoded.indices),
        images={digest: decoded.images[index] for index, digest in hashes.items()},
    )


def frame_hash(image: np.ndarray) -> str:
    """Return a hash of a picture's size and pixels."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()[:32]


@dataclass(kw_only=True)
class _Batches:
    """Collect pictures into batches, caption them, and store clips whose pictures all have captions."""

    captioner: Captioner
    store: CaptionStore
    batch_size: int
    failed: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    queue: dict[str, np.ndarray] = field(default_factory=dict)
    waiting: dict[str, tuple[list[str], tuple[str, ...]]] = field(default_factory=dict)
    """By clip key, the clip ids and frame hashes of clips not yet complete."""
    without: dict[str, str] = field(default_factory=dict)
    """By frame hash, why the captioner gave no caption."""

    def add(self, key: str, names: list[str], pictures: _Pictures) -> None:
        """Queue the pictures of a clip that have no caption yet, and caption full batches."""
        self.waiting[key] = (names, pictures.hashes)
        known = self.store.texts.keys() | self.without.keys()
        self.queue |= {digest: image for digest, image in pictures.images.items() if digest not in known}
        while len(self.queue) >= self.batch_size:
            self._caption_batch()
        self._store_complete()

    def finish(self) -> None:
        """Caption the rest of the queue."""
        while self.queue:
            self._caption_batch()
        self._store_complete()

    def _caption_batch(self) -> None:
        """Caption the next batch of the queue."""
        digests = list(self.queue)[: self.batch_size]
        answers = self.captioner([self.queue.pop(digest) for digest in digests])
        texts = {}
        for digest, answer in zip(digests, answers, strict=True):
            if isinstance(answer, NoCaption):
                self.without[digest] = answer.reason
            else:
                texts[digest] = answer
        self.store.add_texts(texts)
        self.asked |= texts.keys()
        if not texts and not self.store.texts:
            raise ValueError(f"the first {len(digests)} frames got no caption: {self.without[digests[0]]}")

    def _store_complete(self) -> None:
        """Store the clips whose frames all have captions, and mark those with a frame that has none."""
        for key, (names, hashes) in list(self.waiting.items()):
            reasons = [self.without[digest] for digest in hashes if digest in self.without]
            if reasons:
                self.failed |= dict.fromkeys(names, reasons[0])
            elif all(digest in self.store.texts for digest in hashes):
                self.store.add_clip(key, hashes)
            else:
                continue
            del self.waiting[key]


def _reason(error: Exception | None) -> str:
    """Return why a clip gives no frames."""
    if isinstance(error, DecodeError):
        return error.reason
    return f"decoding it {error}" if isinstance(error, WorkerLost) else f"{type(error).__name__}: {error}"
