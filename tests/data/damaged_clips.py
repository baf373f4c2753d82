"""Damaged copies of clips, and a comparison of what the doctor and the readers make of them.

Each copy has bytes of its header or anywhere changed, is cut off, or has a part torn out or doubled.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np

from discovla.data.config import DataConfig
from discovla.data.dali.reader import TOLERANCE_MEAN, DaliClipReader, DaliDecoder
from discovla.data.doctor import ExamineOptions, diagnose
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import DecoderName, FileDecoder, FrameRequest, SandboxedReader

HEADER = 1500  # bytes at either end, where indexes and headers are
KINDS = {"mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "mkv": "mjpeg", "ts": "libx264"}
SAMPLING = Sampling(frames=4)
LATER = 0.5  # seconds that the second visit leaves out, so that it samples other frames
SIZE = 16
TOLERANCES: dict[DecoderName, float] = {"pyav": 0, "torchcodec": 0, "dali": TOLERANCE_MEAN}
_REFUSED = "cannot be read by decoder ="  # of a file of which a decoder would give other frames

Outcome = tuple[np.ndarray | None, str]  # frames of a clip, or the reason if it gives none
Read = Callable[[Clip], Outcome]


def draw_sources(folder: Path) -> list[Path]:
    """Draw a small clip in each container."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(folder / f"source.{suffix}", codec) for suffix, codec in KINDS.items()]


def damage(content: bytes, seed: int) -> bytes:
    """Return a copy with one kind of damage, which the seed alone decides."""
    draws = random.Random(seed)
    changed = bytearray(content)
    last = len(changed) - 1
    match draws.choice(["header bits", "header bytes", "bits", "cut", "torn", "doubled"]):
        case "header bits":
            ends = [*range(min(HEADER, last)), *range(max(0, last - HEADER), last)]
            for place in draws.choices(ends, k=draws.randint(1, 40)):
                changed[place] ^= 1 << draws.randrange(8)
        case "header bytes":
            place = draws.randrange(min(HEADER, last))
            changed[place : place + 8] = draws.randbytes(8)
        case "bits":
            for place in draws.choices(range(last), k=draws.randint(1, 200)):
                changed[place] ^= 1 << draws.randrange(8)
        case "cut":
            del changed[draws.randrange(last) :]
        case "torn":
            place = draws.randrange(last)
            del changed[place : place + draws.randint(1, 4000)]
        case "doubled":
            place = draws.randrange(last)
            changed[place:place] = changed[place : place + draws.randint(1, 4000)]
    return bytes(changed)


def write_damaged(sources: Sequence[Path], folder: Path, count: int, seed: int = 0) -> list[Clip]:
    """Write damaged copies of the sources in turn and return them as clips."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [path.read_bytes() for path in sources]
    clips = []
    for number in range(count):
        source = sources[number % len(sources)]
        path = folder / f"{number:05d}{source.suffix}"
        path.write_bytes(damage(contents[number % len(sources)], seed * 1_000_003 + number))
        clips.append(Clip(id=path.name, video=path, captions=("x",), split="train"))
    return clips


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Verdicts of the doctor, files that only the decoder refuses, and everything that went wrong."""

    verdicts: dict[str, int]
    refused: int
    past_the_limit: int
    crashed: int
    wrong: list[str]


def compare(
    clips: Sequence[Clip],
    folder: Path,
    decoder: DecoderName = "pyav",
    *,
    seconds: float = 20.0,
    black_is_wrong: bool = False,
) -> Comparison:
    """Read each clip twice by a decoder, the second time other frames, beside the doctor and plain PyAV.

    A decoder may refuse a file of which the doctor finds nothing wrong, but may not give other frames than
    PyAV gives of it when it decodes it from its start.

    Args:
        folder: for indices and the doctor's results.
        seconds: limit for a file; files that exceed it are counted and not compared.
        black_is_wrong: a black frame was not decoded, as the sources have none.
    """
    diagnosis = diagnose(
        clips,
        folder / "doctor",
        ExamineOptions(sampling=SAMPLING, seconds=seconds, index_dir=folder / "doctor's indices"),
    )
    reasons = {name: reason for name, _, reason in diagnosis.broken}
    slow = {name for name, reason in reasons.items() if reason.startswith("decoding it took longer")}
    wrong, refused = [], 0
    with ExitStack() as stack:
        read = stack.enter_context(_reader(decoder, folder / "indices", seconds))
        for number, clip in enumerate(clip for clip in clips if clip.id not in slow):
            # Plain PyAV has an index folder for each visit, so that it decodes each file from its start.
            with ExitStack() as visit:
                wanted, later_wanted = (
                    visit.enter_context(_reader("pyav", folder / f"{number}-{turn}", None))(part)
                    for turn, part in enumerate((clip, replace(clip, start=LATER)))
                )
            outcome = read(clip)
            if (outcome[0] is None) and outcome[1].startswith(_REFUSED) and decoder != "pyav":
                refused += 1
                continue
            if outcome[1] != (reasons.get(clip.id) or ""):
                wrong.append(f"{clip.id}: doctor {reasons.get(clip.id)!r}, {decoder} {outcome[1]!r}")
            if black_is_wrong and outcome[0] is not None and not outcome[0].any((1, 2, 3)).all():
                wrong.append(f"{clip.id}: a black frame by {decoder}")
            later = read(replace(clip, start=LATER))
            wrong += _differences(f"{clip.id}, first visit", outcome, wanted, decoder)
            wrong += _differences(f"{clip.id}, second visit", later, later_wanted, decoder)
    return Comparison(
        verdicts=dict(Counter(file["kind"] for file in diagnosis.files)),
        refused=refused,
        past_the_limit=len(slow),
        crashed=sum(reason.startswith("decoding it its process") for reason in reasons.values()),
        wrong=wrong,
    )


@contextmanager
def _reader(decoder: DecoderName, index_dir: Path, seconds: float | None) -> Iterator[Read]:
    """Return a function that reads a clip, in a process with a time limit unless `seconds` is None."""
    with ExitStack() as stack:
        if decoder == "dali":
            read = stack.enter_context(_dali_reader(index_dir, seconds or 300.0))
        else:
            read = stack.enter_context(_file_reader(decoder, index_dir, seconds))

        def outcome(clip: Clip) -> Outcome:
            try:
                return read(clip), ""
            except DecodeError as error:
                return None, error.reason

        yield outcome


@contextmanager
def _file_reader(
    decoder: FileDecoder, index_dir: Path, seconds: float | None
) -> Iterator[Callable[[Clip], np.ndarray]]:
    reader = SandboxedReader(seconds)
    try:
        yield lambda clip: reader(
            FrameRequest(
                path=clip.video,
                sampling=replace(SAMPLING, start=clip.start),
                image_size=SIZE,
                decoder=decoder,
                index_dir=index_dir,
            )
        )
    finally:
        reader.close()


@contextmanager
def _dali_reader(index_dir: Path, seconds: float) -> Iterator[Callable[[Clip], np.ndarray]]:
    config = DataConfig(
        manifest=Path("none"), frames=SAMPLING.frames, decode_seconds=seconds, index_dir=index_dir
    )
    planner = DaliClipReader(config, SIZE)
    decoder = DaliDecoder(planner.pipeline)

    def read(clip: Clip) -> np.ndarray:
        plan = planner.read(clip)
        frames, (reason,) = decoder.decode([plan])
        if reason is not None:
            raise DecodeError(clip.video, f"{_REFUSED} 'dali': {reason}")
        return frames[0, : len(plan)].cpu().numpy()

    try:
        yield read
    finally:
        decoder.close()
        planner.close()


def _differences(name: str, outcome: Outcome, wanted: Outcome, decoder: DecoderName) -> list[str]:
    """Return what differs from plain PyAV, unless the decoder refuses the file."""
    (frames, reason), (wanted_frames, wanted_reason) = outcome, wanted
    if reason.startswith(_REFUSED) and decoder != "pyav":
        return []
    if frames is None or wanted_frames is None:
        same = reason == wanted_reason
        return [] if same else [f"{name}: {decoder} {reason!r}, PyAV {wanted_reason!r}"]
    error = float(np.abs(frames.astype(int) - wanted_frames).mean())
    return (
        [] if error <= TOLERANCES[decoder] else [f"{name}: other frames by {decoder}, {error:.1f} levels off"]
    )


def _draw(path: Path, codec: str) -> Path:
    """Draw a moving pattern of 12 frames."""
    y, x = np.mgrid[:48, :64]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=4)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = 48, 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(12):
            waves = (np.sin((x + 5 * i) / 9) + np.sin((y - i) / 7) + 2) * 60
            picture = np.stack([waves, np.roll(waves, i, 0), 255 - waves], 2).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
