"""Training pairs of clips and captions, and the readers of their frames: from files, from shards, by DALI."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from discovla.batch import BadClip
from discovla.data.augment import draw_light
from discovla.data.cache import FrameCache
from discovla.data.config import FULL_SIZE, Augment, DataConfig, FrameSettings, LongCaptions
from discovla.data.dali.plans import Plan
from discovla.data.dali.reader import DaliClipReader
from discovla.data.manifest import Clip, check_clips, read_manifest
from discovla.data.sampling import Sampling, clip_sampling
from discovla.data.shards.reader import Shards, open_shards
from discovla.data.tokens import Tokenizer
from discovla.data.video.errors import DecodeError, check_file
from discovla.data.video.frames import FrameRequest, SandboxedReader, check_decoder, frame_transform

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


class Dataset(Protocol):
    """Anything training can walk through.  It is sent to worker processes, so it must pickle."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> Sample:
        """The pair `index`; random parts depend on the source's seed, `epoch` and `index` alone."""
        ...


def training_pairs(
    clips: Sequence[Clip], *, frame_captions: bool, missing: Literal["error", "drop"]
) -> list[Pair]:
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


class FileClipReader:
    """Frames of clips at the size of the model, from the cache where they are there.

    It pickles, so that worker processes can have it.

    Raises:
        ValueError: the decoder is not there, or the cache cannot be written.
    """

    def __init__(self, settings: FrameSettings) -> None:
        check_decoder(settings.decoder)
        self.settings = settings
        self._cache = None if settings.cache is None else FrameCache(settings.cache)
        self._reader = SandboxedReader(settings.limit)

    def read(self, clip: Clip) -> np.ndarray:
        """The frames of a clip as testing takes them, uint8, at most f y x 3.

        Raises:
            DecodeError: the clip gives none.
        """
        sampling = clip_sampling(self.settings, clip)
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
        sampling = clip_sampling(self.settings, clip, seed)
        if augment in FULL_SIZE:
            return self._decoded(clip, sampling, augment, seed)
        frames = self._decoded(clip, sampling) if sampling.is_random else self.read(clip)
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
            FrameRequest(
                path=clip.video,
                sampling=sampling,
                image_size=chosen.image_size,
                augment=augment,
                seed=seed,
                damaged=chosen.damaged,
                decoder=chosen.decoder,
                index_dir=chosen.cache,
            )
        )


class ShardClipReader(FileClipReader):
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
        self._shards.check(clips, lambda clip: clip_sampling(self.settings, clip, seed), size=size)

    def _decoded(
        self, clip: Clip, sampling: Sampling, augment: Augment = "none", seed: str = ""
    ) -> np.ndarray:
        size = self.settings.image_size
        whole = self._shards.settings.size is None
        each = frame_transform(augment, seed, size) if whole or augment in FULL_SIZE else None
        return self._shards.frames(clip, sampling, each, damaged=self.settings.damaged)


@dataclass(frozen=True, kw_only=True)
class ClipDataset:
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


DALI = ("dali", "dali+pyav")  # decoders whose frames come from its graph


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
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


def read_clips(config: DataConfig, split: str | None) -> list[Clip]:
    """The clips of a split, or of all, in the order of the manifest: from it, or from shards.

    Raises:
        ValueError: as `read_manifest` or `Shards`.
    """
    if config.shards is not None:
        shards = open_shards(config.shards)
        return list(shards.clips) if split is None else shards.split(split)
    assert config.manifest is not None, "DataConfig refuses to have neither"
    return read_manifest(config.manifest, split=split)


def frame_origin(config: DataConfig) -> str:
    """Whose pixels a run sees: `decoded`, which raw shards give too, or what encoding them again left."""
    kind = "decoded"
    if config.shards is not None and (settings := open_shards(config.shards).settings).format == "jpeg":
        kind = f"jpeg, quality {settings.quality}"
    return f"{kind}, by {config.decoder}" if by_dali(config) else kind


def clip_dataset(clips: Sequence[Clip], config: DataConfig, shape: BatchSpec) -> ClipDataset:
    """Checked training pairs of clips."""
    frames = config.frames if shape.frame_captions else None
    check_clips(clips, frames=frames, files=config.shards is None)
    check_captions(
        clips, shape.context_length, long=config.long_captions, frame_captions=shape.frame_captions
    )
    if shape.frame_captions and config.sampling != "discovla":
        raise ValueError(
            "sampling: expected 'discovla', whose frames the frame captions tell of (method.alpha or "
            f"method.beta is not 0), found {config.sampling!r}"
        )
    _say_what_the_cache_lacks(config)
    return ClipDataset(
        clips=clips,
        pairs=training_pairs(
            clips, frame_captions=shape.frame_captions, missing=config.missing_frame_captions
        ),
        reader=clip_reader(clips, config, shape.image_size, config.augment),
        augment=config.augment,
        seed=shape.seed,
        frame_captions=shape.frame_captions,
    )


def clip_reader(
    clips: Sequence[Clip], config: DataConfig, image_size: int, augment: Augment | None
) -> ClipReader:
    """What reads the frames of clips, from their files or from shards.

    Args:
        augment: that of training; None for evaluation.

    Raises:
        ValueError: shards that hold other frames; and as `FileClipReader`.
    """
    settings = frame_settings(config, image_size)
    shards = None if config.shards is None else open_shards(config.shards)
    reader = None
    if shards is not None:
        settings = replace(settings, cache=None)
        reader = ShardClipReader(settings, shards)
        reader.check(clips, augment)
    if not by_dali(config):
        return reader or FileClipReader(settings)
    instead = (reader or FileClipReader(settings)) if config.decoder == "dali+pyav" else None
    return DaliClipReader(settings, augment or "none", threads=config.workers, shards=shards, instead=instead)


def by_dali(config: DataConfig) -> bool:
    """Whether DALI makes the frames."""
    return config.decoder in DALI and not ready(config)


def ready(config: DataConfig) -> bool:
    """Whether there is nothing to decode: raw frames of the model's size need no more than to be read."""
    settings = None if config.shards is None else open_shards(config.shards).settings
    return settings is not None and settings.format == "raw" and settings.size is not None


def _say_what_the_cache_lacks(config: DataConfig) -> None:
    """Warn where there is a cache that training cannot use."""
    if config.cache is None or config.shards is not None:
        return
    if config.decoder in DALI:
        logger.warning("cache: decoder = 'dali' keeps what is known of each file there, but no frames")
    elif config.augment in FULL_SIZE:
        logger.warning(
            "cache: augment = %r works on frames of full size, training decodes clips every time",
            config.augment,
        )
    elif Sampling(frames=config.frames, sampler=config.sampling).is_random:
        logger.warning(
            "cache: sampling = %r draws frames anew in each epoch, training decodes clips every time",
            config.sampling,
        )


def frame_settings(config: DataConfig, image_size: int) -> FrameSettings:
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
        decoder="pyav" if config.decoder in DALI else config.decoder,
        limit=config.decode_seconds,
    )
