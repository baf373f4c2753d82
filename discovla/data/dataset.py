"""Training pairs of clips and captions, and the readers of their frames.

The way of a clip: `read_clips` reads the manifest or shards, `clip_dataset` checks and pairs clips,
`ClipDataset.sample` returns one pair, `ClipReader.read` its frames.  `clip_reader` chooses the reader and
`discovla.data.loader` makes batches.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from discovla.batch import BadClip
from discovla.data.augment import draw_light
from discovla.data.config import FULL_SIZE, DataConfig, LongCaptions
from discovla.data.dali.pipeline import Plan
from discovla.data.dali.reader import DaliClipReader
from discovla.data.manifest import Clip, check_clips, read_manifest, split_clips
from discovla.data.order import OrderWords, read_order_words
from discovla.data.quarantine import without_quarantined
from discovla.data.sampling import clip_sampling, slice_indices
from discovla.data.shards.reader import Shards, open_shards
from discovla.data.tokens import make_tokenizer
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import (
    FileDecoder,
    FrameRequest,
    SandboxedReader,
    check_decoder,
    frame_transform,
    resize_and_crop,
)

logger = logging.getLogger(__name__)

Frames = np.ndarray | Plan  # f y x 3 uint8, or the plan by which DALI decodes them


@dataclass(frozen=True)
class Pair:
    """A training pair: index of the clip in the list, index of the caption in the clip.

    backwards: the clip is played backwards, and `caption` counts in its reversed captions.
    """

    clip: int
    caption: int
    backwards: bool = False


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A training pair with its frames.

    frames: uint8 RGB f y x 3, f at most `Dataset.frames_per_clip`, or a plan; None if the clip is bad.
    video_index: index i of the clip in the list, or ~i if it is played backwards.
    frame_captions: one caption per frame, or None.
    bad: the clip and the reason if it gives no frames, else None.
    false_text: the caption with an exchange that makes it false, or None.
    tells_order: the caption tells the order of events.
    """

    text: str
    frames: Frames | None
    video_index: int
    frame_captions: tuple[str, ...] | None = None
    bad: BadClip | None = None
    false_text: str | None = None
    tells_order: bool = False


class Dataset(Protocol):
    """Samples to train on.  Must pickle, as it is sent to worker processes."""

    @property
    def frames_per_clip(self) -> int:
        """Largest number of frames of a sample."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> Sample:
        """Return sample `index`; its random parts depend on the dataset's seed, `epoch` and `index` alone."""
        ...


class ClipReader(Protocol):
    """Reader of the frames of clips.  Must pickle, as it is sent to worker processes."""

    config: DataConfig

    def read(self, clip: Clip, seed: str | None = None) -> Frames:
        """Return the sampled frames of a clip, at the size of the model.

        Args:
            seed: seed of a training sample; None for evaluation, without augmentation.

        Raises:
            DecodeError: the clip gives no frames.
        """
        ...


class FileClipReader:
    """`ClipReader` of video files, by PyAV or torchcodec.

    Args:
        image_size: pixels of a side of the frames.
        sandbox: decode in a process of its own, with the time limit `config.decode_seconds`.

    Raises:
        ValueError: the decoder is not installed.
    """

    def __init__(self, config: DataConfig, image_size: int, *, sandbox: bool = True) -> None:
        if config.decoder == "dali":
            raise ValueError("decoder: expected 'pyav' or 'torchcodec', found 'dali', which decodes batches")
        check_decoder(config.decoder)
        self.config, self.image_size = config, image_size
        self._decoder: FileDecoder = config.decoder
        self._decode = SandboxedReader(config.decode_seconds if sandbox else None)

    def read(self, clip: Clip, seed: str | None = None) -> np.ndarray:
        """See `ClipReader`."""
        config = self.config
        augment = "none" if seed is None else config.augment
        request = FrameRequest(
            path=clip.video,
            sampling=clip_sampling(config, clip, seed),
            image_size=self.image_size,
            resize=config.resize,
            interpolation=config.interpolation,
            augment=augment,
            seed=seed or "",
            damaged=config.damaged,
            hdr=config.hdr,
            decoder=self._decoder,
            index_dir=config.index_dir,
        )
        frames = self._decode(request)
        return draw_light(seed or "")(frames) if augment == "light" else frames

    def close(self) -> None:
        """End the process that decodes."""
        self._decode.close()


class ShardClipReader:
    """`ClipReader` of shards.

    Args:
        image_size: pixels of a side of the frames.
    """

    def __init__(self, config: DataConfig, image_size: int, shards: Shards) -> None:
        self.config, self.image_size, self._shards = config, image_size, shards

    def read(self, clip: Clip, seed: str | None = None) -> np.ndarray:
        """See `ClipReader`."""
        augment = "none" if seed is None else self.config.augment
        transform = None
        if self._shards.settings.size is None or augment in FULL_SIZE:
            options = self.config.resize, self.config.interpolation
            transform = frame_transform(augment, seed or "", self.image_size, *options)
        sampling = clip_sampling(self.config, clip, seed)
        frames = self._shards.frames(clip, sampling, transform, damaged=self.config.damaged)
        return draw_light(seed or "")(frames) if augment == "light" else frames


class ArrayClipReader:
    """`ClipReader` of frames that are in memory, by the id of the clip; other clips are read from files.

    Args:
        arrays: f y x 3 uint8, one or more frames of any size.  More than `config.frames` are thinned out
            evenly.
        files: reader of clips without an array.
        image_size: pixels of a side of the frames.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], files: ClipReader, image_size: int) -> None:
        self.config, self._arrays, self._files, self._size = files.config, arrays, files, image_size

    def read(self, clip: Clip, seed: str | None = None) -> Frames:
        """See `ClipReader`."""
        if clip.id not in self._arrays:
            return self._files.read(clip, seed)
        frames = self._arrays[clip.id]
        kept = slice_indices(list(range(len(frames))), self.config.frames, "even")
        options = self._size, self.config.resize, self.config.interpolation
        return np.stack([resize_and_crop(Image.fromarray(frames[i]), *options) for i in kept])


def clip_reader(clips: Sequence[Clip], config: DataConfig, image_size: int, *, training: bool) -> ClipReader:
    """Return the reader that the config names.

    Args:
        clips: clips to read; shards are checked to hold their frames.
        training: read training samples, with `config.augment`.

    Raises:
        ValueError: the shards hold other frames, or the decoder is not installed.
    """
    shards = None if config.shards is None else open_shards(config.shards)
    if shards is not None:
        _check_shards(shards, clips, config, image_size, training=training)
    _check_resize(shards, config)
    if decodes_by_dali(config):
        return DaliClipReader(config, image_size, shards)
    return (
        FileClipReader(config, image_size) if shards is None else ShardClipReader(config, image_size, shards)
    )


def _check_shards(
    shards: Shards, clips: Sequence[Clip], config: DataConfig, image_size: int, *, training: bool
) -> None:
    """Refuse shards that do not hold the frames of the clips."""
    if config.damaged == "use" and shards.settings.damaged != "use":
        raise ValueError(
            f"damaged: expected 'refuse', with which the shards {shards.root} were written, found 'use'"
        )
    size = None if training and config.augment in FULL_SIZE else image_size
    seed = "" if training else None
    shards.check(clips, lambda clip: clip_sampling(config, clip, seed), size=size)


def _check_resize(shards: Shards | None, config: DataConfig) -> None:
    """Refuse a resize that DALI, or the writer of shards of the model's size, does not do."""
    if (config.resize, config.interpolation) == ("shortest", "bicubic"):
        return
    wanted = f"data.resize = {config.resize!r} with data.interpolation = {config.interpolation!r}"
    if decodes_by_dali(config):
        raise ValueError(f"decoder: expected 'pyav' or 'torchcodec' for {wanted}, found 'dali'")
    if shards is not None and shards.settings.size is not None:
        raise ValueError(f"shards: expected whole frames (--size full) for {wanted}, found {shards.root}")


def decodes_by_dali(config: DataConfig) -> bool:
    """Return True if DALI makes the frames.  Raw shards of the model's size need no decoding."""
    if config.decoder != "dali" or config.shards is None:
        return config.decoder == "dali"
    settings = open_shards(config.shards).settings
    return settings.format != "raw" or settings.size is None


def frame_origin(config: DataConfig) -> str:
    """Return the origin of the pixels: `decoded` (from files or raw shards) or JPEG, and DALI if it decodes.

    A resumed run must have the origin with which it began.
    """
    origin = "decoded"
    if config.shards is not None and (settings := open_shards(config.shards).settings).format == "jpeg":
        origin = f"jpeg, quality {settings.quality}"
    return f"{origin}, by dali" if decodes_by_dali(config) else origin


@dataclass(frozen=True, kw_only=True)
class ClipDataset:
    """Pairs of clips and captions with their frames; a clip without frames becomes a bad sample.

    seed: seed of the augmentation and of random sampling; None for evaluation.
    frame_captions: samples have frame captions.
    order: finds exchanges in captions and whether they tell order; None leaves both out.
    """

    clips: Sequence[Clip]
    pairs: Sequence[Pair]
    reader: ClipReader
    seed: int | None = None
    frame_captions: bool = False
    order: OrderWords | None = None

    @property
    def frames_per_clip(self) -> int:
        """See `Dataset`."""
        return self.reader.config.frames

    def __len__(self) -> int:
        return len(self.pairs)

    def with_reverses(self, order: Sequence[int]) -> list[int]:
        """Move each pair that is played backwards behind that of the same clip and number, if there is one.

        So a batch has a clip and its reverse, each of which is the other's hardest negative.
        """
        pairs = self.pairs
        forwards = {(pair.clip, pair.caption) for pair in pairs if not pair.backwards}
        reverses = {(pair.clip, pair.caption): i for i, pair in enumerate(pairs) if pair.backwards}
        arranged = []
        for i in order:
            place = (pairs[i].clip, pairs[i].caption)
            if not pairs[i].backwards:
                arranged += [i, *([reverses[place]] if place in reverses else [])]
            elif place not in forwards:
                arranged.append(i)
        return arranged

    def sample(self, index: int, epoch: int) -> Sample:
        """Return pair `index`; augmentation and exchange depend on (seed, epoch, index)."""
        pair = self.pairs[index]
        clip = self.clips[pair.clip]
        frames = bad = None
        try:
            frames = self.reader.read(clip, None if self.seed is None else f"{self.seed}/{epoch}/{index}")
        except DecodeError as error:
            bad = BadClip(id=clip.id, video=str(clip.video), reason=error.reason)
        text = clip.captions[pair.caption]
        if pair.backwards:
            assert clip.reversed_captions is not None, "a pair of them"
            text = clip.reversed_captions[pair.caption]
            frames = frames[::-1] if isinstance(frames, np.ndarray) else None
        order = self.order
        return Sample(
            text=text,
            frames=frames,
            frame_captions=_frame_captions(clip, pair) if self.frame_captions else None,
            video_index=~pair.clip if pair.backwards else pair.clip,
            bad=bad,
            false_text=None if order is None else order.exchanged(text, index + epoch),
            tells_order=order is not None and order.tells_order(text),
        )


def clip_dataset(
    clips: Sequence[Clip],
    config: DataConfig,
    *,
    image_size: int,
    context_length: int,
    frame_captions: bool,
    seed: int,
    order: bool = False,
) -> ClipDataset:
    """Check clips and return their training pairs.

    Raises:
        ValueError: a clip, a caption or the shards cannot be used.
    """
    check_clips(clips, frames=config.frames if frame_captions else None, files=config.shards is None)
    check_captions(
        clips,
        context_length,
        long=config.long_captions,
        frame_captions=frame_captions,
        tokenizer=config.tokenizer,
    )
    if frame_captions and config.sampling != "discovla":
        raise ValueError(
            "sampling: expected 'discovla', whose frames the frame captions describe (method.alpha or "
            f"method.beta is not 0), found {config.sampling!r}"
        )
    pairs = training_pairs(clips, frame_captions=frame_captions, missing=config.missing_frame_captions)
    if config.reversed_pairs:
        pairs += _reversed_pairs(clips, config, frame_captions=frame_captions)
    return ClipDataset(
        clips=clips,
        pairs=pairs,
        reader=clip_reader(clips, config, image_size, training=True),
        seed=seed,
        frame_captions=frame_captions,
        order=_order_words(config) if order else None,
    )


def _order_words(config: DataConfig) -> OrderWords:
    words = read_order_words(config.order_words)
    return replace(words, places_only=config.exchanges == "places")


def _reversed_pairs(clips: Sequence[Clip], config: DataConfig, *, frame_captions: bool) -> list[Pair]:
    """Return a pair for each caption that is true of a clip played backwards.

    Raises:
        ValueError: no clip has such captions, or DALI decodes, whose plans play forwards.
    """
    if decodes_by_dali(config):
        raise ValueError("reversed_pairs: expected another decoder than 'dali', which plays clips forwards")
    pairs = [
        Pair(i, j, backwards=True)
        for i, clip in enumerate(clips)
        for j in range(len(clip.reversed_captions or ()))
    ]
    if frame_captions:
        pairs = [pair for pair in pairs if _frame_captions(clips[pair.clip], pair) is not None]
    if not pairs:
        raise ValueError(
            f"reversed_pairs: expected training clips with reversed_captions, found {len(clips)} without; "
            "`discovla draw` and `discovla shard` write them for a drawn world"
        )
    return pairs


def training_pairs(
    clips: Sequence[Clip], *, frame_captions: bool, missing: Literal["error", "drop"]
) -> list[Pair]:
    """Return the training pairs of clips by their `caption_order`, or clip by clip if they have none.

    Args:
        frame_captions: every pair needs frame captions.
        missing: `drop` leaves out pairs without frame captions and logs their number, `error` refuses them.

    Raises:
        ValueError: frame captions are missing, or only some of the clips have an order.
    """
    pairs = _ordered_pairs(clips)
    if not frame_captions:
        return pairs
    captioned = [pair for pair in pairs if _frame_captions(clips[pair.clip], pair) is not None]
    missing_count = len(pairs) - len(captioned)
    if missing_count and missing == "error":
        first = next(pair for pair in pairs if _frame_captions(clips[pair.clip], pair) is None)
        clip = clips[first.clip]
        raise ValueError(
            f"frame captions: expected one list for each of {len(pairs)} captions, found {missing_count} "
            f"captions without, the first of clip {clip.id!r}: {clip.captions[first.caption]!r}; "
            "missing_frame_captions = 'drop' leaves them out"
        )
    if missing_count:
        logger.warning("%d of %d captions have no frame captions and are left out", missing_count, len(pairs))
    if not captioned:
        raise ValueError(f"frame captions: none of {len(pairs)} captions has any")
    return captioned


def _frame_captions(clip: Clip, pair: Pair) -> tuple[str, ...] | None:
    """Return the captions of a pair's frames in the order in which they are played, or None.

    A clip played backwards takes those of any caption of the clip, because they describe the same frames.
    """
    lists = clip.frame_captions
    if lists is None:
        return None
    texts = lists[pair.caption % len(lists)] if pair.backwards else lists[pair.caption]
    return texts[::-1] if pair.backwards and texts is not None else texts


def _ordered_pairs(clips: Sequence[Clip]) -> list[Pair]:
    """Return all pairs in the order of the dataset."""
    pairs = [Pair(i, j) for i, clip in enumerate(clips) for j in range(len(clip.captions))]
    ordered = sum(clip.caption_order is not None for clip in clips)
    if not ordered:
        return pairs
    if ordered < len(clips):
        raise ValueError(f"caption_order: expected all {len(clips)} clips to have one, found {ordered}")
    return sorted(pairs, key=lambda pair: (clips[pair.clip].caption_order or ())[pair.caption])


def read_clips(config: DataConfig, split: str | None) -> list[Clip]:
    """Return the clips of a split, or of all splits if None, in the order of the manifest.

    Raises:
        ValueError: the manifest or the shards cannot be read, or have no clip of the split.
    """
    if config.shards is not None:
        shards = open_shards(config.shards)
        return list(shards.clips) if split is None else shards.split(split)
    assert config.manifest is not None, "DataConfig requires a manifest or shards"
    return read_manifest(config.manifest, split=split)


def read_splits(config: DataConfig) -> dict[str, list[Clip]]:
    """Return the clips of the splits `train`, `val` and `test`; those for evaluation are checked.

    `train` is missing with stills, `val` if the config names no split for it.  `test` has the clips of
    `val_split` if the config names no split for it, or if there are none of the split of the default name.
    Clips in quarantine are removed from `train`.

    Raises:
        ValueError: training and evaluation have the same split, or a split, clip or caption cannot be used.
    """
    clips = read_clips(config, None)
    test_split = config.test_split
    if test_split and config.val_split and "test_split" not in config.model_fields_set:
        test_split = test_split if any(clip.split == test_split for clip in clips) else None
    names = {"train": config.train_split, "val": config.val_split, "test": test_split or config.val_split}
    if not names["test"]:
        raise ValueError("data.test_split: expected a split to evaluate, found none, nor data.val_split")
    if config.stills is not None:
        del names["train"]
    elif config.train_split in (names["val"], names["test"]):
        raise ValueError(
            "data: expected other splits to select and test on than to train on, "
            f"found {list(names.values())}"
        )
    source = config.manifest if config.shards is None else config.shards
    splits = {use: split_clips(clips, name, str(source)) for use, name in names.items() if name}
    if config.quarantine is not None and "train" in splits:
        splits["train"] = without_quarantined(splits["train"], config.quarantine)
    for use in ("val", "test"):
        if use in splits:
            check_clips(splits[use], files=config.shards is None)
            check_captions(
                splits[use], config.context_length, long=config.long_captions, tokenizer=config.tokenizer
            )
    return splits


def check_captions(
    clips: Sequence[Clip],
    context_length: int,
    *,
    long: LongCaptions,
    frame_captions: bool = False,
    tokenizer: str = "clip",
) -> int:
    """Return the number of captions longer than the context.

    Args:
        context_length: tokens of a caption, start and end included.
        long: `error` refuses long captions, `truncate` logs how many will be cut.
        frame_captions: check frame captions too.
        tokenizer: as in `DataConfig`.

    Raises:
        ValueError: captions are longer and long = "error"; the first is named.
    """
    tokens = make_tokenizer(context_length, tokenizer)
    long_captions = [
        (clip.id, text)
        for clip in clips
        for text in dict.fromkeys(_all_texts(clip, frame_captions))
        if tokens.length(text) > context_length
    ]
    if not long_captions:
        return 0
    clip_id, text = long_captions[0]
    message = (
        f"captions: expected at most {context_length} tokens, found {len(long_captions)} longer captions, "
        f"the first of clip {clip_id!r} with {tokens.length(text)}: {text[:80]!r}"
    )
    if long == "error":
        raise ValueError(f"{message}; long_captions = 'truncate' cuts them")
    logger.warning("%s; they are cut", message)
    return len(long_captions)


def _all_texts(clip: Clip, frame_captions: bool) -> list[str]:
    """Return the captions of a clip, and its frame captions if asked for."""
    texts = list(clip.captions)
    if frame_captions and clip.frame_captions is not None:
        texts += [text for captions in clip.frame_captions if captions is not None for text in captions]
    return texts
