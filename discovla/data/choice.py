"""Whether DALI's graph is to make the frames of a run, measured on its first clips."""

from __future__ import annotations

import logging
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import numpy as np

from discovla.data.config import FULL_SIZE, Augment, DataConfig
from discovla.data.dali import support as dali
from discovla.data.dali.frames import DaliFrames
from discovla.data.dali.reader import DaliClipReader
from discovla.data.dataset import ShardClipReader, frame_settings, ready
from discovla.data.manifest import Clip
from discovla.data.sampling import clip_sampling
from discovla.data.shards.reader import open_shards
from discovla.data.video import torchcodec
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import TRIED, DecoderName, FrameRequest, SandboxedReader

logger = logging.getLogger(__name__)

GAIN = 1.1  # DALI's pixels are near to the others', not equal, so that it has to be worth something
_PASSES = 3  # through the clips, of which the first warms up and the fastest of the others counts
_SECONDS = 120  # after which no more clips are looked for
_SEED = "0/0/0"

Read = Callable[[Clip, bool], np.ndarray]  # of a clip, for training or not
Chosen = Literal["auto", "dali+pyav"]


class Unchosen(Exception):
    """Why DALI is left out."""


def choose_decoder(clips: Sequence[Clip], config: DataConfig, image_size: int) -> Chosen:
    """The decoder that `auto` stands for: `dali+pyav` where that gives the frames of the first clips sooner.

    Every way reads them with training's augmentation: files by as many processes as it has workers, shards by
    as many threads of this one, DALI in one batch.  DALI is left out where it would not read one of these
    clips as PyAV does: it is not there or cannot run, does not know a codec, or gives other frames, by more
    than `TOLERANCE_MEAN`.  The choice is logged in one line.

    Args:
        clips: of training, in the order of the manifest; those that give no frames are passed over.
    """
    if ready(config):
        return "auto"
    try:
        rates = _rates(clips, config, image_size)
    except (Unchosen, DecodeError, ImportError, OSError, RuntimeError) as error:
        logger.info("decoder: auto leaves out dali: %s", error)
        return "auto"
    by_dali = rates.pop("dali")
    best = max(rates, key=rates.__getitem__)
    chosen: Chosen = "dali+pyav" if by_dali >= GAIN * rates[best] else "auto"
    figures = ", ".join(f"{name} {rate:,.0f}" for name, rate in {"dali": by_dali, **rates}.items())
    said = "leaves out dali, which is not a tenth faster" if chosen == "auto" else "takes dali+pyav"
    logger.info("decoder: auto %s: %s frames a second of the first clips", said, figures)
    return chosen


def readable_here(config: DataConfig) -> DataConfig:
    """The config of a run that may be opened on another machine: `dali+pyav` is `pyav` where DALI is not."""
    lacking = dali.missing() if config.decoder == "dali+pyav" else None
    if lacking is None:
        return config
    logger.warning("data.decoder: the run had dali+pyav, here pyav reads all clips: %s", lacking)
    return config.model_copy(update={"decoder": "pyav"})


def _rates(clips: Sequence[Clip], config: DataConfig, image_size: int) -> dict[str, float]:
    """Frames a second of every way.

    Raises:
        Unchosen: DALI is none of them.
    """
    lacking = dali.missing()
    if lacking is not None:
        raise Unchosen(lacking)
    anew = config.augment in FULL_SIZE or clip_sampling(config).is_random
    if config.cache is not None and config.shards is None and not anew:
        raise Unchosen("data.cache keeps the frames of a clip, which is decoded once")
    with ExitStack() as stack:
        if config.cache is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            config = config.model_copy(update={"cache": Path(folder)})
        # The tables of the clips are made by the first to read them, and found in the cache by all others.
        ways = {name: stack.enter_context(_readers(config, image_size, name)) for name in _others(config)}
        known = _first(clips, ways["pyav"][0])
        graph = stack.enter_context(_graph(config, image_size, "none"))
        _check(known, *graph)
        some = [clip for clip, _ in known]
        rates = {name: _fastest(lambda way=way: _read(some, way)) for name, way in ways.items()}
        if config.augment in FULL_SIZE:
            graph = stack.enter_context(_graph(config, image_size, config.augment))
        if config.shards is not None:
            rates = {"pillow": rates["pyav"]}  # which decodes the JPEG of shards, whatever the decoder
        rates["dali"] = _fastest(lambda: _made(some, *graph, config.augment))
    return rates


def _others(config: DataConfig) -> list[DecoderName]:
    """What else than DALI may read the clips."""
    lacking = config.shards is not None or torchcodec.missing() is not None
    return ["pyav"] if lacking else ["pyav", "torchcodec"]


@contextmanager
def _readers(config: DataConfig, image_size: int, decoder: DecoderName) -> Iterator[list[Read]]:
    """As many readers of clips as there are workers, in processes of their own where they decode files."""
    settings = frame_settings(config, image_size)
    if config.shards is not None:
        shards = ShardClipReader(settings, open_shards(config.shards))
        copies = [pickle.loads(pickle.dumps(shards)) for _ in range(max(1, config.workers))]
        augment = (None, config.augment)
        yield [partial(_of_shards, each, augment) for each in copies]
        return

    def asked(clip: Clip, training: bool) -> FrameRequest:
        return FrameRequest(
            path=clip.video,
            sampling=clip_sampling(settings, clip, _SEED if training else None),
            image_size=image_size,
            augment=config.augment if training else "none",
            seed=_SEED,
            damaged=settings.damaged,
            decoder=decoder,
            cache=config.cache,
        )

    with ExitStack() as stack:
        found: list[Read] = []
        for _ in range(max(1, config.workers)):
            reader = SandboxedReader(settings.limit)
            stack.callback(reader.close)
            found.append(lambda clip, training, reader=reader: reader(asked(clip, training)))
        yield found


def _of_shards(
    reader: ShardClipReader, augment: tuple[Augment | None, Augment], clip: Clip, training: bool
) -> np.ndarray:
    """Frames of a clip without their padding, augmented by the one or the other."""
    frames, shown = reader.sample(clip, augment[training], _SEED)
    return frames[:shown]


@contextmanager
def _graph(
    config: DataConfig, image_size: int, augment: Augment
) -> Iterator[tuple[DaliClipReader, DaliFrames]]:
    """What plans and makes frames by DALI."""
    shards = None if config.shards is None else open_shards(config.shards)
    settings = frame_settings(config, image_size)
    reader = DaliClipReader(settings, augment, threads=config.workers, shards=shards)
    graph = DaliFrames(reader.graph)
    try:
        yield reader, graph
    finally:
        graph.close()
        reader.close()


def _first(clips: Sequence[Clip], read: Read) -> list[tuple[Clip, np.ndarray]]:
    """The first clips that give frames, with them."""
    known, until = [], time.monotonic() + _SECONDS
    for clip in clips[: 4 * TRIED]:
        if time.monotonic() > until:  # the other processes wait, and training has a limit for each clip
            break
        try:
            known.append((clip, read(clip, False)))
        except DecodeError:
            continue  # which training names
        if len(known) == TRIED:
            return known
    if not known:
        raise Unchosen(f"none of the first {4 * TRIED} clips gives frames within {_SECONDS} seconds")
    return known


def _check(known: Sequence[tuple[Clip, np.ndarray]], reader: DaliClipReader, graph: DaliFrames) -> None:
    """See that DALI gives the frames that are known.

    Raises:
        Unchosen: it does not.
    """
    try:
        plans = [reader.sample(clip)[0] for clip, _ in known]
    except DecodeError as error:
        raise Unchosen(str(error)) from error
    frames, reasons = graph.read(plans)
    for (clip, wanted), found, reason in zip(known, frames.cpu().numpy(), reasons, strict=True):
        if reason is not None:
            raise Unchosen(f"{clip.video}: {reason}")
        off = np.abs(found[: len(wanted)].astype(np.int16) - wanted).mean((1, 2, 3)).max()
        if off > dali.TOLERANCE_MEAN:
            raise Unchosen(f"{clip.video}: it gives other frames, {off:.1f} levels off those of pyav")


def _fastest(once: Callable[[], int]) -> float:
    """Frames a second of something that gives a number of them each time."""
    rates = []
    for _ in range(_PASSES):
        begin = time.perf_counter()
        frames = once()
        rates.append(frames / (time.perf_counter() - begin))
    return max(rates[1:])


def _read(clips: Sequence[Clip], readers: Sequence[Read]) -> int:
    """Read clips by several readers at once; how many frames they gave."""
    free: SimpleQueue[Read] = SimpleQueue()
    for reader in readers:
        free.put(reader)

    def one(clip: Clip) -> int:
        reader = free.get()
        try:
            return len(reader(clip, True))
        except DecodeError:  # torchcodec may not read what others do
            return 0
        finally:
            free.put(reader)

    with ThreadPoolExecutor(len(readers)) as pool:
        return sum(pool.map(one, clips))


def _made(clips: Sequence[Clip], reader: DaliClipReader, graph: DaliFrames, augment: Augment) -> int:
    """Plan clips and make their frames; how many there are."""
    planned = [reader.sample(clip, augment, _SEED) for clip in clips]
    reasons = graph.read([plan for plan, _ in planned])[1]
    return sum(shown for (_, shown), reason in zip(planned, reasons, strict=True) if reason is None)
