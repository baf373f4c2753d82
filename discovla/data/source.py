"""The clips that a config names, and what reads their frames."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from discovla.data.clips import (
    FULL_SIZE,
    Augment,
    ClipReader,
    ClipSource,
    FrameReader,
    FrameSettings,
    ShardFrameReader,
    check_captions,
)
from discovla.data.config import DataConfig
from discovla.data.dali.reader import DaliReader
from discovla.data.manifest import Clip, check_clips, read_manifest
from discovla.data.samples import samples
from discovla.data.sampling import Sampling
from discovla.data.shards.reader import open_shards

logger = logging.getLogger(__name__)

DALI = ("dali", "dali+pyav")  # decoders whose frames come from its graph


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


def pixels(config: DataConfig) -> str:
    """Whose pixels a run sees: `decoded`, which raw shards give too, or what encoding them again left."""
    kind = "decoded"
    if config.shards is not None and (settings := open_shards(config.shards).settings).format == "jpeg":
        kind = f"jpeg, quality {settings.quality}"
    return f"{kind}, by {config.decoder}" if by_dali(config) else kind


def clip_source(clips: Sequence[Clip], config: DataConfig, shape: LoaderShape) -> ClipSource:
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
    return ClipSource(
        clips=clips,
        pairs=samples(clips, frame_captions=shape.frame_captions, missing=config.missing_frame_captions),
        reader=frame_reader(clips, config, shape.image_size, config.augment),
        augment=config.augment,
        seed=shape.seed,
        frame_captions=shape.frame_captions,
    )


def frame_reader(
    clips: Sequence[Clip], config: DataConfig, image_size: int, augment: Augment | None
) -> ClipReader:
    """What reads the frames of clips, from their files or from shards.

    Args:
        augment: that of training; None for evaluation.

    Raises:
        ValueError: shards that hold other frames; and as `FrameReader`.
    """
    settings = frame_settings(config, image_size)
    shards = None if config.shards is None else open_shards(config.shards)
    reader = None
    if shards is not None:
        settings = replace(settings, cache=None)
        reader = ShardFrameReader(settings, shards)
        reader.check(clips, augment)
    if not by_dali(config):
        return reader or FrameReader(settings)
    instead = (reader or FrameReader(settings)) if config.decoder == "dali+pyav" else None
    return DaliReader(settings, augment or "none", threads=config.workers, shards=shards, instead=instead)


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
    elif Sampling(frames=config.frames, sampler=config.sampling).moves:
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
