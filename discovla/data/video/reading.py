"""Reading the frames of a clip with a time limit, in a process that can be replaced."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from discovla.data.cache import FrameCache
from discovla.data.sampling import Sampling
from discovla.data.video.decode import Damaged, DecodeError
from discovla.data.video.decoders import Decoder, DecoderName
from discovla.data.video.pixels import fit
from discovla.data.video.tables import FrameTables
from discovla.data.watched import Lost, Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is to be read: which frames of which file, how large, by which decoder.

    augment: `randaugment` or `resized_crop`, drawn by `seed` and applied at full size; anything else is not.
    cache: folder in which the tables of files are kept, for all processes.
    """

    path: Path
    sampling: Sampling
    image_size: int
    augment: str = "none"
    seed: str = ""
    damaged: Damaged = "refuse"
    decoder: DecoderName = "pyav"
    cache: Path | None = None


def read_frames(reading: Reading) -> np.ndarray:
    """The frames of a file at the size of the model, uint8 f y x 3.

    Raises:
        DecodeError: as `Decoder.read`.
        ValueError: the decoder is not there.
    """
    decoder = _decoder(reading.decoder, reading.cache)
    each = resizing(reading.augment, reading.seed, reading.image_size)
    return decoder.read(reading.path, reading.sampling, each, damaged=reading.damaged).frames


def resizing(augment: str, seed: str, size: int) -> Callable[[Image.Image], np.ndarray]:
    """What makes a frame of full size one of the model's: as a `Reading` of the same augment and seed."""
    change = _augmentation(augment, seed, size)
    return lambda image: fit(image if change is None else change(image), size)


class Reader:
    """`read_frames` in a process of its own, which is replaced where it does not survive a file.

    It pickles and survives a fork, so that each worker of a loader has a process of its own.

    Args:
        limit: seconds that a file may take; None reads in this process and without limit.
    """

    def __init__(self, limit: float | None) -> None:
        self._worker = None if limit is None else Worker(read_frames, limit=limit)

    def __call__(self, reading: Reading) -> np.ndarray:
        """The frames of a file.

        Raises:
            DecodeError: as `read_frames`, or the file took longer than the limit or crashed its process.
        """
        if self._worker is None:
            return read_frames(reading)
        try:
            return self._worker(reading)
        except Lost as error:
            raise DecodeError(reading.path, f"not decoded: {error}") from error

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()


@lru_cache(maxsize=4)
def _decoder(name: DecoderName, cache: Path | None) -> Decoder:
    """The decoder of this process, which remembers the files it met."""
    if name != "pyav" and "torch" not in sys.modules:
        import torch  # on all cores unless told otherwise, in each of many processes

        torch.set_num_threads(1)
    try:
        kept = None if cache is None else FrameCache(cache, ".table")
    except ValueError as error:  # a disk that filled up since the cache was made; the run goes on without
        logger.warning("%s: each process counts the frames of each file", error)
        kept = None
    return Decoder(name, FrameTables(kept))


def _augmentation(augment: str, seed: str, size: int) -> Callable[[Image.Image], Image.Image] | None:
    """What changes the frames at full size."""
    if augment not in ("randaugment", "resized_crop"):
        return None
    # Imported where they are needed: they bring torch, which a process that only decodes does without.
    from discovla.data.augment import draw_randaugment, draw_resized_crop

    return draw_randaugment(seed) if augment == "randaugment" else draw_resized_crop(seed, size)
