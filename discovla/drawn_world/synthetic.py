"""The drawn world: H.264 clips of shapes with captions, made from a seed.

A clip has two actors with one event each, and things nobody speaks of.  Training clips have three captions
and to each a still caption for every sampled frame; clips of the other splits have one caption.  The gallery
of `siblings` holds groups of four clips with the same two actors, which only events and places tell apart.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from discovla.data.manifest import Clip, write_manifest
from discovla.data.sampling import frame_indices
from discovla.drawn_world.scenes import FRAMES, RATE, Scene, clip_rng, film, make_scene
from discovla.drawn_world.wording import Statement, frame_caption, phrase, tell

logger = logging.getLogger(__name__)

CAPTIONS = 3  # of a training clip
SAMPLED = 8  # frames that frame captions speak of: those sampled at one a second

_WORLD = 1  # to be raised with every change to what is drawn or said
_PARAMETERS, _MANIFEST = "world.json", "manifest.jsonl"
_CHUNK = 20  # clips a process draws before it reports
# One thread, or the bytes would depend on the machine; few reference frames and no B-frames decode quickest.
_ENCODER = {
    "crf": "26",
    "preset": "veryfast",
    "tune": "fastdecode",
    "g": str(FRAMES),
    "bf": "0",
    "threads": "1",
}


@dataclass(frozen=True, kw_only=True)
class WorldSizes:
    """Clips in each split."""

    train: int = 3000
    val: int = 300
    test: int = 500
    siblings: int = 500

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(f"{field.name}: expected at least 0 clips, got {getattr(self, field.name)}")


def draw_world(out: Path, *, seed: int = 0, sizes: WorldSizes | None = None, workers: int = 2) -> Path:
    """Draw the clips of a world and write their manifest.

    What is there already is kept: a finished world is left as it is, an interrupted one is gone on with.

    Args:
        out: folder for manifest.jsonl, videos/ and world.json, the parameters.
        seed: of all clips; a clip depends on (seed, split, index) alone.
        sizes: clips in each split; None for the usual number.
        workers: processes that draw, at least 1.

    Returns:
        The manifest's path.

    Raises:
        ValueError: the folder holds a world with other parameters, or a manifest that is no world's.
        OSError: a file cannot be written.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    out, sizes = Path(out), sizes or WorldSizes()
    manifest = out / _MANIFEST
    _claim(out, {"world": _WORLD, "seed": seed, "sizes": asdict(sizes)})
    jobs = _jobs(sizes)
    wanted = [out / _video(split, index) for split, indices in jobs for index in indices]
    missing = sum(not path.is_file() for path in wanted)
    if manifest.is_file() and not missing:
        logger.info("%s: all %d clips are there", out, len(wanted))
        return manifest
    logger.info("%s: drawing %d of %d clips", out, missing, len(wanted))
    (out / "videos").mkdir(exist_ok=True)
    clips: list[Clip] = []
    with _mapper(workers) as run, tqdm(total=len(wanted), desc="drawing", unit="clip", disable=None) as bar:
        for chunk in run(partial(_draw_chunk, out, seed), jobs):
            clips += chunk
            bar.update(len(chunk))
    write_manifest(manifest, clips)
    return manifest


def first_caption(seed: int, split: str, index: int) -> tuple[Scene, Statement, str]:
    """The first caption of a clip as the manifest has it, with the scene it is about and what it says."""
    scene = make_scene(seed, split, index)
    rng = clip_rng(seed, split, index, "captions")
    statement = tell(scene, rng)
    return scene, statement, phrase(statement, rng)


def encode(frames: np.ndarray) -> bytes:
    """Frames as an MP4 file with H.264.

    Args:
        frames: f y x 3, uint8 RGB.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options=_ENCODER)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _claim(out: Path, parameters: dict[str, Any]) -> None:
    """Make the folder ours, or refuse one that is another world's."""
    path = out / _PARAMETERS
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: expected the parameters of a drawn world as JSON, {error}") from error
        if found != parameters:
            raise ValueError(f"{path}: expected the world {parameters}, found {found}; choose another folder")
        return
    if (out / _MANIFEST).exists():
        raise ValueError(
            f"{out / _MANIFEST}: expected {_PARAMETERS} beside it, found none: no drawn world's manifest"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write(path, (json.dumps(parameters, indent=2) + "\n").encode())


def _jobs(sizes: WorldSizes) -> list[tuple[str, range]]:
    """All clips in chunks, in the manifest's order."""
    return [
        (split, range(start, min(start + _CHUNK, count)))
        for split, count in asdict(sizes).items()
        for start in range(0, count, _CHUNK)
    ]


@contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """`map` over processes, results in order; over this one where there is but one."""
    if workers == 1:
        yield map
        return
    # Not fork: the caller may hold threads, and a fork would copy their locks.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _draw_chunk(out: Path, seed: int, job: tuple[str, range]) -> list[Clip]:
    """Draw the clips of a chunk that are not there, and say what is in all of them."""
    split, indices = job
    return [_draw(out, seed, split, index) for index in indices]


def _draw(out: Path, seed: int, split: str, index: int) -> Clip:
    """One clip's file, unless it is there, and its manifest entry."""
    video = out / _video(split, index)
    scene = make_scene(seed, split, index)
    if not video.is_file():
        _write(video, encode(film(scene, seed, split, index)))
    rng = clip_rng(seed, split, index, "captions")
    count = CAPTIONS if split == "train" else 1
    captions = tuple(phrase(tell(scene, rng), rng) for _ in range(count))
    stills = None
    if split == "train":
        times = [i / FRAMES for i in frame_indices(FRAMES, RATE, SAMPLED)]
        stills = tuple(tuple(frame_caption(scene, time, rng) for time in times) for _ in captions)
    return Clip(id=video.stem, video=video, captions=captions, split=split, frame_captions=stills)


def _video(split: str, index: int) -> Path:
    """Where a clip's file lies in its world."""
    return Path("videos") / f"{split}_{index:05d}.mp4"


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
