"""One sampler, several decoders: the same frames of a file, whoever decodes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from discovla.data.sampling import Sampling
from discovla.data.video.decode import Damaged, Decoded, DecodeError, described, sampled, scan
from discovla.data.video.opening import check_file
from discovla.data.video.seeking import Astray, read_entering
from discovla.data.video.tables import FrameTable, FrameTables
from discovla.data.video.torchcodec_frames import Unfit, missing, read_torchcodec, unfit

logger = logging.getLogger(__name__)

DecoderName = Literal["pyav", "torchcodec", "auto"]  # those that read one file after another
Each = Callable[[Image.Image], np.ndarray]
Images = dict[int, np.ndarray]

TRIED = 8  # files on which `auto` measures


def check_decoder(name: DecoderName) -> None:
    """Refuse a decoder that is not there.

    Raises:
        ValueError: what it lacks.
    """
    lacking = missing() if name == "torchcodec" else None
    if lacking is not None:
        raise ValueError(f"decoder: {lacking}")


class Decoder:
    """Reads sampled frames of files, and remembers the table of each file it has decoded to its end.

    Which frames a sampling takes depends on how many decode, and only decoding tells: the first time a file
    is read it is decoded whole, by PyAV for every decoder.  From then on its table is known, and only what is
    needed for the frames wanted is decoded.

    Args:
        name: `pyav`; `torchcodec`, which refuses the files it does not read exactly; `auto`, the faster of
            the two on the first files, those that torchcodec does not read exactly going to PyAV.
        tables: where tables are kept.

    Raises:
        ValueError: the decoder asked for is not there.
    """

    def __init__(self, name: DecoderName = "pyav", tables: FrameTables | None = None) -> None:
        self.name = name
        self.tables = FrameTables() if tables is None else tables
        self.chosen: DecoderName | None = None if name == "auto" else name
        self._seconds: dict[DecoderName, list[float]] = {"pyav": [], "torchcodec": []}
        check_decoder(name)
        lacking = missing() if name == "auto" else None
        if lacking is not None:
            logger.info("decoder: auto takes pyav: %s", lacking)
            self.chosen = "pyav"

    def read(self, path: Path, sampling: Sampling, each: Each, *, damaged: Damaged = "refuse") -> Decoded:
        """The sampled frames of a file, as `decode_each`.

        Raises:
            DecodeError: as `decode_each`, or the decoder asked for cannot read the file exactly.
        """
        check_file(path)
        images: dict[int, np.ndarray] = {}
        table = self.tables.get(path)
        if table is None:
            images, table = scan(path, sampling, each, None, prints=True)
            self.tables.put(path, table)
        indices = sampled(path, table, sampling, damaged)
        if self.chosen is None:
            images = self._tried(path, table, sampling, indices, each)
        elif self.chosen == "torchcodec" or not images.keys() >= set(indices):
            images = self._images(path, table, sampling, indices, each)
        return described(images, indices, table)

    def _images(
        self, path: Path, table: FrameTable, sampling: Sampling, indices: list[int], each: Each
    ) -> Images:
        """The frames by the decoder chosen."""
        if self.chosen == "torchcodec":
            try:
                return read_torchcodec(path, table, indices, each)
            except Unfit as error:
                if self.name != "auto":
                    raise DecodeError(path, f"cannot be read by decoder = 'torchcodec': {error}") from error
                say_once(str(path), f"decoder: auto leaves it to pyav: {error}")
        return self._by_pyav(path, table, sampling, indices, each)

    def _by_pyav(
        self, path: Path, table: FrameTable, sampling: Sampling, indices: list[int], each: Each
    ) -> Images:
        """The frames by PyAV, from key frames where the file can be entered there."""
        if table.ordered:
            try:
                return read_entering(path, table, indices, each)
            except Astray as error:
                say_once(str(path), f"decoded whole each time: entered at a key frame, {error}")
                self.tables.put(path, replace(table, sequential=True))
        images, again = scan(path, sampling, each, table.count)
        if not images.keys() >= set(indices):
            raise DecodeError(path, f"decoded twice, it gave other frames, the second time {again.count}")
        return images

    def _tried(
        self, path: Path, table: FrameTable, sampling: Sampling, indices: list[int], each: Each
    ) -> Images:
        """The frames by both decoders in turn, with their times, until there are enough to choose."""
        if unfit(table) is not None:
            return self._by_pyav(path, table, sampling, indices, each)
        images: Images = {}
        turn = len(self._seconds["pyav"]) % 2
        names: list[DecoderName] = ["pyav", "torchcodec"]
        for name in (names[turn], names[1 - turn]):
            self.chosen = name
            begin = time.perf_counter()
            images = self._images(path, table, sampling, indices, each)
            self._seconds[name].append(time.perf_counter() - begin)
        self.chosen = None
        if len(self._seconds["pyav"]) == TRIED:
            spent = {name: sum(seconds) for name, seconds in self._seconds.items()}
            self.chosen = min(names, key=spent.__getitem__)
            figures = ", ".join(f"{name} {seconds / TRIED:.3f} s" for name, seconds in spent.items())
            logger.info("decoder: auto takes %s: %s a clip, over %d clips", self.chosen, figures, TRIED)
        return images


@lru_cache(maxsize=256)
def say_once(path: str, what: str) -> None:
    """Say something of a file, once in a process."""
    logger.warning("%s: %s", path, what)
