"""The drawn world: H.264 clips of shapes with captions, made from a seed.

A clip has two actors with one event each, and distractors that its captions do not mention.  Training clips
have three captions, each with a still caption for every sampled frame, and three that are true of the clip
played backwards; clips of the other splits have one.
The split `siblings` has groups of four clips with the same actors, which differ only in events and places.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import av
import numpy as np

from discovla import terminal
from discovla.data.manifest import Clip, write_manifest
from discovla.data.sampling import frame_indices
from discovla.data.sandbox import WorkerLost, run_sandboxed
from discovla.drawn_world.scenes import FRAMES, RATE, Scene, backwards, clip_rng, film, make_scene
from discovla.drawn_world.wording import Statement, frame_caption, phrase, tell
from discovla.files import remove_unfinished, replacing, write_file

logger = logging.getLogger(__name__)

CAPTIONS = 3  # of a training clip
SAMPLED = 8  # frames with frame captions: those sampled at one a second

_WORLD = 2  # version; raise it with every change to frames or captions
_SAME_VIDEOS = (1,)  # older versions whose video files are those of this one; their manifest is replaced
_PARAMETERS, _MANIFEST = "world.json", "manifest.jsonl"
_CHUNK = 20  # clips a process draws at once
_CHUNK_SECONDS = 600.0  # that it may take
# With several threads the bytes would depend on the machine; fastdecode and no B-frames decode fastest.
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
    """Number of clips in each split."""

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

    Existing clips are kept: a complete world stays unchanged, an interrupted one is completed.

    Args:
        out: folder for manifest.jsonl, videos/ and world.json (the parameters).
        seed: of all clips; a clip depends on (seed, split, index) alone.
        sizes: number of clips in each split; None for the defaults.
        workers: drawing processes, at least 1.

    Returns:
        Path of the manifest.

    Raises:
        ValueError: the folder contains a world with other parameters, or a manifest without world.json.
        OSError: a file cannot be written.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    out, sizes = Path(out), sizes or WorldSizes()
    manifest = out / _MANIFEST
    current = _check_parameters(out, {"world": _WORLD, "seed": seed, "sizes": asdict(sizes)})
    chunks = [
        _Chunk(out, seed, split, range(start, min(start + _CHUNK, count)))
        for split, count in asdict(sizes).items()
        for start in range(0, count, _CHUNK)
    ]
    videos = [out / _video(chunk.split, index) for chunk in chunks for index in chunk.indices]
    missing = sum(not path.is_file() for path in videos)
    if current and manifest.is_file() and not missing:
        logger.info("%s: all %d clips exist", out, len(videos))
        return manifest
    logger.info("%s: drawing %d of %d clips", out, missing, len(videos))
    (out / "videos").mkdir(exist_ok=True)
    remove_unfinished(out / "videos")
    clips: dict[_Chunk, list[Clip]] = {}
    with terminal.progress("drawing", len(videos), "clips") as bar:
        for chunk, drawn in _drawn_chunks(chunks, workers):
            clips[chunk] = drawn
            bar.advance(len(drawn))
    write_manifest(manifest, [clip for chunk in chunks for clip in clips[chunk]])
    _write_parameters(out, {"world": _WORLD, "seed": seed, "sizes": asdict(sizes)})
    return manifest


def first_caption(seed: int, split: str, index: int) -> tuple[Scene, Statement, str]:
    """Return the scene of a clip, and its first caption in the manifest as a statement and as text."""
    scene = make_scene(seed, split, index)
    rng = clip_rng(seed, split, index, "captions")
    statement = tell(scene, rng)
    return scene, statement, phrase(statement, rng)


def encode(frames: np.ndarray) -> bytes:
    """Encode frames as an MP4 file with H.264.

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


def _check_parameters(out: Path, parameters: dict[str, Any]) -> bool:
    """Write the parameters to a new folder; refuse a folder with other parameters.

    Returns:
        False if the folder is of an older version with the same videos, whose manifest must be replaced.
    """
    path = out / _PARAMETERS
    if path.is_file():
        try:
            existing = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: expected the parameters of a drawn world as JSON, {error}") from error
        if any(existing == {**parameters, "world": version} for version in _SAME_VIDEOS):
            return False
        if existing != parameters:
            raise ValueError(
                f"{path}: expected the world {parameters}, found {existing}; choose another folder"
            )
        return True
    if (out / _MANIFEST).exists():
        raise ValueError(
            f"{out / _MANIFEST}: expected {_PARAMETERS} beside it, found none; not a drawn world"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_parameters(out, parameters)
    return True


def _write_parameters(out: Path, parameters: dict[str, Any]) -> None:
    """Write world.json."""
    write_file(out / _PARAMETERS, json.dumps(parameters, indent=2) + "\n")


@dataclass(frozen=True)
class _Chunk:
    """Clips of a split to draw into a folder, by their indices."""

    out: Path
    seed: int
    split: str
    indices: range


def _drawn_chunks(chunks: Sequence[_Chunk], workers: int) -> Iterator[tuple[_Chunk, list[Clip]]]:
    """Draw chunks in several processes and yield them as they are done; in this process if `workers` is 1.

    Raises:
        OSError: a process was killed, or took longer than `_CHUNK_SECONDS` for a chunk.
    """
    if workers == 1:
        yield from ((chunk, _draw_chunk(chunk)) for chunk in chunks)
        return
    with closing(run_sandboxed(_draw_chunk, chunks, workers=workers, limit=_CHUNK_SECONDS)) as results:
        for result in results:
            if isinstance(result.error, WorkerLost):
                raise OSError(f"{result.item.out}: a drawing process is lost: {result.error}")
            if result.error is not None:
                raise result.error
            assert result.value is not None
            yield result.item, result.value


def _draw_chunk(chunk: _Chunk) -> list[Clip]:
    """Draw the missing clips of a chunk, and return the manifest entries of all."""
    return [_draw(chunk.out, chunk.seed, chunk.split, index) for index in chunk.indices]


def _draw(out: Path, seed: int, split: str, index: int) -> Clip:
    """Draw one clip, unless its file exists, and return its manifest entry."""
    video = out / _video(split, index)
    scene = make_scene(seed, split, index)
    if not video.is_file():
        with replacing(video) as file:
            file.write(encode(film(scene, seed, split, index)))
    rng = clip_rng(seed, split, index, "captions")
    count = CAPTIONS if split == "train" else 1
    captions = tuple(phrase(tell(scene, rng), rng) for _ in range(count))
    stills = backward = None
    if split == "train":
        rng_back, scene_back = clip_rng(seed, split, index, "reversed"), backwards(scene)
        backward = tuple(phrase(tell(scene_back, rng_back), rng_back) for _ in range(count))
        times = [i / FRAMES for i in frame_indices(FRAMES, RATE, SAMPLED)]
        stills = tuple(tuple(frame_caption(scene, time, rng) for time in times) for _ in captions)
    return Clip(
        id=video.stem,
        video=video,
        captions=captions,
        split=split,
        frame_captions=stills,
        reversed_captions=backward,
    )


def _video(split: str, index: int) -> Path:
    """Return the path of a clip's file in the folder of its world."""
    return Path("videos") / f"{split}_{index:05d}.mp4"
