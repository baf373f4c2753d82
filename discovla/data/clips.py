"""Clips of a manifest as a source of samples."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from discovla.batch import BadClip
from discovla.data.augment import draw_light
from discovla.data.cache import FrameCache
from discovla.data.manifest import Clip
from discovla.data.samples import Frames, Pair, Sample, frame_texts
from discovla.data.sampling import Sampler, Sampling, Slice, sampling_of
from discovla.data.shards.reader import Shards
from discovla.data.tokens import Tokenizer
from discovla.data.video.decode import Damaged, DecodeError
from discovla.data.video.decoders import DecoderName, check_decoder
from discovla.data.video.opening import check_file
from discovla.data.video.reading import Reader, Reading, resizing

logger = logging.getLogger(__name__)

Augment = Literal["none", "light", "randaugment", "resized_crop"]
FULL_SIZE = ("randaugment", "resized_crop")  # what changes frames before they are made small
LongCaptions = Literal["error", "truncate"]


@dataclass(frozen=True, kw_only=True)
class FrameSettings:
    """How clips become frames: which (see `Sampling`), how large, and what of files that break off.

    decoder: see `Decoder`.  limit: seconds that a file may take, in a process that is replaced where it does
    not survive it; None reads in this process and without limit.
    """

    frames: int
    image_size: int
    sampling: Sampler = "discovla"
    sample_rate: float = 1.0
    sampling_divisor: int = 1
    sampling_slice: Slice = "even"
    damaged: Damaged = "refuse"
    cache: Path | None = None
    decoder: DecoderName = "pyav"
    limit: float | None = None


class ClipReader(Protocol):
    """What reads the frames of clips, or plans them.  It pickles, so that worker processes can have it."""

    settings: FrameSettings

    def sample(self, clip: Clip, augment: Augment | None = None, seed: str = "") -> tuple[Frames, int]:
        """The frames of a clip with room for all that the model takes, and how many it has.

        As testing takes them, or with an `augment` and a seed as training does.

        Raises:
            DecodeError: the clip gives none.
        """
        ...

    def blank(self) -> Frames:
        """What stands in the row of a clip that gives no frames; the row is marked not valid."""
        ...


class FrameReader:
    """Frames of clips at the size of the model, from the cache where they are there.

    It pickles, so that worker processes can have it.

    Raises:
        ValueError: the decoder is not there, or the cache cannot be written.
    """

    def __init__(self, settings: FrameSettings) -> None:
        check_decoder(settings.decoder)
        self.settings = settings
        self._cache = None if settings.cache is None else FrameCache(settings.cache)
        self._reader = Reader(settings.limit)

    def read(self, clip: Clip) -> np.ndarray:
        """The frames of a clip as testing takes them, uint8, at most f y x 3.

        Raises:
            DecodeError: the clip gives none.
        """
        sampling = sampling_of(self.settings, clip)
        if self._cache is None:
            return self._decoded(clip, sampling)
        check_file(clip.video)
        key = self._cache.key(clip.video, self._spec(sampling))
        frames = self._cache.get(key)
        if frames is None:
            frames = self._decoded(clip, sampling)
            self._cache.put(key, frames)
        return frames

    def read_augmented(self, clip: Clip, augment: Augment, seed: str) -> np.ndarray:
        """The frames of a clip for training: which, and their augmentation, depend on `seed` alone.

        RandAugment and crops work on frames of full size, and a sampling that moves takes other frames for
        each seed: no cache holds them.

        Raises:
            DecodeError: the clip gives none.
        """
        sampling = sampling_of(self.settings, clip, seed)
        if augment in FULL_SIZE:
            return self._decoded(clip, sampling, augment, seed)
        frames = self._decoded(clip, sampling) if sampling.moves else self.read(clip)
        return draw_light(seed)(frames) if augment == "light" else frames

    def sample(self, clip: Clip, augment: Augment | None = None, seed: str = "") -> tuple[np.ndarray, int]:
        """As of `ClipReader`: f y x 3 uint8; what a clip lacks is black."""
        frames = self.read(clip) if augment is None else self.read_augmented(clip, augment, seed)
        return self.padded(frames), len(frames)

    def padded(self, frames: np.ndarray) -> np.ndarray:
        """Frames of a clip, f y x 3, what it lacks being black: placeholders that masks are to hide."""
        lacking = self.settings.frames - len(frames)
        return np.pad(frames, ((0, lacking), (0, 0), (0, 0), (0, 0))) if lacking else frames

    def blank(self) -> np.ndarray:
        """What stands in the row of a clip that gives no frames; the row is marked not valid."""
        size = self.settings.image_size
        return np.zeros((self.settings.frames, size, size, 3), np.uint8)

    def _spec(self, sampling: Sampling) -> tuple[object, ...]:
        """All that tells apart the frames that a cache may hold of one video."""
        chosen, span = self.settings, (sampling.start, sampling.end)
        spec = (chosen.frames, chosen.image_size, chosen.sample_rate, chosen.damaged, *span)
        if chosen.decoder != "pyav":
            spec = (*spec, chosen.decoder)
        if sampling.sampler == "discovla":
            return spec  # what kept frames are known by since before there were other samplings
        return (*spec, sampling.sampler, sampling.divisor, sampling.slice)

    def _decoded(
        self, clip: Clip, sampling: Sampling, augment: Augment = "none", seed: str = ""
    ) -> np.ndarray:
        """Frames from the file, augmented at full size where that is asked for."""
        chosen = self.settings
        return self._reader(
            Reading(
                path=clip.video,
                sampling=sampling,
                image_size=chosen.image_size,
                augment=augment,
                seed=seed,
                damaged=chosen.damaged,
                decoder=chosen.decoder,
                cache=chosen.cache,
            )
        )


class ShardFrameReader(FrameReader):
    """The same frames of clips from shards, which take the place of files and cache.

    Raises:
        ValueError: the shards hold clips that break off otherwise than `settings.damaged` wants them.
    """

    def __init__(self, settings: FrameSettings, shards: Shards) -> None:
        super().__init__(replace(settings, cache=None, decoder="pyav", limit=None))
        self._shards = shards
        if settings.damaged == "use" and shards.settings.damaged != "use":
            raise ValueError(
                f"damaged: expected 'refuse', as the shards {shards.root} were made with, found 'use'"
            )

    def check(self, clips: Iterable[Clip], augment: Augment | None) -> None:
        """Refuse shards that do not hold the frames of clips.

        Args:
            augment: that of training; None for evaluation.

        Raises:
            ValueError: as `Shards.check`.
        """
        seed = None if augment is None else ""
        size = None if augment in FULL_SIZE else self.settings.image_size
        self._shards.check(clips, lambda clip: sampling_of(self.settings, clip, seed), size=size)

    def _decoded(
        self, clip: Clip, sampling: Sampling, augment: Augment = "none", seed: str = ""
    ) -> np.ndarray:
        size = self.settings.image_size
        whole = self._shards.settings.size is None
        each = resizing(augment, seed, size) if whole or augment in FULL_SIZE else None
        return self._shards.frames(clip, sampling, each, damaged=self.settings.damaged)


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """Training pairs of clips; a clip that gives no frames becomes a blank that says why."""

    clips: Sequence[Clip]
    pairs: Sequence[Pair]
    reader: ClipReader
    augment: Augment = "none"
    seed: int = 0
    frame_captions: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, epoch: int) -> Sample:
        """The pair `index`, augmented by (seed, epoch, index)."""
        pair = self.pairs[index]
        clip = self.clips[pair.clip]
        bad = None
        try:
            frames, shown = self.reader.sample(clip, self.augment, f"{self.seed}/{epoch}/{index}")
        except DecodeError as error:
            frames, shown = self.reader.blank(), self.reader.settings.frames
            bad = BadClip(id=clip.id, video=str(clip.video), reason=error.reason)
        return Sample(
            text=clip.captions[pair.caption],
            frames=frames,
            shown=shown,
            frame_texts=frame_texts(clip, pair.caption) if self.frame_captions else None,
            video_index=pair.clip,
            bad=bad,
        )


def check_captions(
    clips: Sequence[Clip], context_length: int, *, long: LongCaptions, frame_captions: bool = False
) -> int:
    """Count captions longer than the context, before training.

    Args:
        context_length: tokens of a row, start and end included.
        long: `error` refuses them, `truncate` logs how many lose their end.
        frame_captions: whether frame captions count too.

    Returns: the number of captions that are longer.

    Raises:
        ValueError: there are some, and long = "error"; the first is named.
    """
    tokenizer = Tokenizer(context_length)
    told = [
        (clip.id, text)
        for clip in clips
        for text in dict.fromkeys(_all_texts(clip, frame_captions))
        if tokenizer.length(text) > context_length
    ]
    if not told:
        return 0
    name, text = told[0]
    message = (
        f"captions: {len(told)} longer than {context_length} tokens, the first of clip {name!r} has "
        f"{tokenizer.length(text)}: {text[:80]!r}"
    )
    if long == "error":
        raise ValueError(f"{message}; long_captions = 'truncate' cuts them")
    logger.warning("%s; they are cut", message)
    return len(told)


def _all_texts(clip: Clip, frame_captions: bool) -> list[str]:
    """The captions of a clip, with its frame captions or without."""
    texts = list(clip.captions)
    if frame_captions and clip.frame_captions is not None:
        texts += [text for still in clip.frame_captions if still is not None for text in still]
    return texts
