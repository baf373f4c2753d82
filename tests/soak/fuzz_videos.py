"""Damaged videos through the doctor and the loader: none may crash, hang or leave a process behind.

    python benchmarks/fuzz_videos.py --count 500 [--sources DIR] [--decoders pyav torchcodec dali]
        [--out benchmarks/results/cpu/fuzz-videos.jsonl]

Each file is a whole clip with bytes of its header or anywhere changed, cut off, or torn out.  What the doctor
says of it must be what the loader does with it, by each decoder: the same frames, or none and the reason.  A
file that gives frames is read again from LATER seconds on, which must be the frames of decoding it whole.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.measure import machine, write_row
from discovla.data.config import DataConfig
from discovla.data.dali.reader import TOLERANCE_MEAN, DaliClipReader, DaliDecoder
from discovla.data.doctor import Diagnosis, ExamineOptions, diagnose
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from discovla.data.video.errors import DecodeError
from discovla.data.video.frames import FileDecoder, FrameRequest, SandboxedReader

HEADER = 1500  # bytes at either end, where indexes and headers are
KINDS = {"mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "mkv": "mjpeg", "ts": "libx264"}
SAMPLING = Sampling(frames=4)
LATER = 0.5  # seconds that a second visit leaves out, so that it samples other frames
SIZE = 16
OTHERWISE = "cannot be read by decoder ="  # what a decoder says of a file that it would read otherwise
TOLERANCES = {"torchcodec": 0, "dali": TOLERANCE_MEAN}

Read = Callable[[Clip], np.ndarray]


def draw_sources(folder: Path) -> list[Path]:
    """A small clip in each container."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(folder / f"source.{suffix}", codec) for suffix, codec in KINDS.items()]


def mutated(content: bytes, seed: int) -> bytes:
    """A copy with one kind of damage, which the seed alone decides."""
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


def write_mutated(sources: Sequence[Path], folder: Path, count: int, seed: int = 0) -> list[Clip]:
    """Damaged copies of the sources in turn, as clips."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [path.read_bytes() for path in sources]
    clips = []
    for number in range(count):
        source = sources[number % len(sources)]
        path = folder / f"{number:05d}{source.suffix}"
        path.write_bytes(mutated(contents[number % len(sources)], seed * 1_000_003 + number))
        clips.append(Clip(id=path.name, video=path, captions=("x",), split="train"))
    return clips


@contextmanager
def read_by_file(decoder: FileDecoder, seconds: float) -> Iterator[Read]:
    """What the loader reads of a clip, in a process that is replaced where it is lost."""
    reader = SandboxedReader(seconds)
    try:
        yield lambda clip: reader(
            FrameRequest(
                path=clip.video,
                sampling=replace(SAMPLING, start=clip.start),
                image_size=SIZE,
                decoder=decoder,
            )
        )
    finally:
        reader.close()


@contextmanager
def read_by_dali(seconds: float) -> Iterator[Read]:
    """What DALI's graph makes of a clip."""
    config = DataConfig(manifest=Path("none"), frames=SAMPLING.frames, decode_seconds=seconds)
    reader = DaliClipReader(config, SIZE)
    graph = DaliDecoder(reader.pipeline)

    def read(clip: Clip) -> np.ndarray:
        plan = reader.read(clip)
        frames, (reason,) = graph.decode([plan])
        if reason is not None:
            raise DecodeError(clip.video, f"{OTHERWISE}: {reason}")
        return frames[0, : len(plan)].cpu().numpy()

    try:
        yield read
    finally:
        graph.close()
        reader.close()


def disagreements(
    found: Diagnosis, clips: Sequence[Clip], seconds: float, decoder: str = "pyav", *, lit: bool = False
) -> tuple[list[str], int]:
    """Clips that the loader treats otherwise than the doctor says, time limits apart.

    Another decoder than PyAV may refuse a file, which is counted, but may not give other frames of it, at its
    first visit or at its second.

    Args:
        lit: whether a black frame is one that was not decoded, as the sources have none.
    """
    reasons = {name: reason for name, _, reason in found.broken}
    slow = {name for name, reason in reasons.items() if reason.startswith("decoding it took longer")}
    told, refused = [], 0
    with ExitStack() as stack:
        readers = {"pyav": stack.enter_context(read_by_file("pyav", seconds))}
        whole = stack.enter_context(read_by_file("pyav", seconds))  # it meets each file once
        if decoder == "dali":
            readers["dali"] = stack.enter_context(read_by_dali(seconds))
        elif decoder == "torchcodec":
            readers[decoder] = stack.enter_context(read_by_file("torchcodec", seconds))
        for clip in (clip for clip in clips if clip.id not in slow):
            frames, reason = _read(readers[decoder], clip)
            if frames is not None:
                later = replace(clip, start=LATER)
                told += _other_later(later, _read(readers[decoder], later), _read(whole, later), decoder)
            if decoder != "pyav" and OTHERWISE in reason:
                refused += 1
            elif reason != (reasons.get(clip.id) or ""):
                told.append(f"{clip.id}: the doctor says {reasons.get(clip.id)!r}, the loader {reason!r}")
            elif lit and frames is not None and not frames.any((1, 2, 3)).all():
                told.append(f"{clip.id}: a black frame by {decoder}")
            elif decoder != "pyav" and frames is not None:
                wanted, _ = _read(readers["pyav"], clip)
                error = float(np.abs(frames.astype(int) - wanted).mean())
                if error > TOLERANCES[decoder]:
                    told.append(f"{clip.id}: other frames by {decoder}, mean difference {error:.1f}")
    return told, refused


def _other_later(
    clip: Clip, found: tuple[np.ndarray | None, str], wanted: tuple[np.ndarray | None, str], decoder: str
) -> list[str]:
    """What is wrong with a second visit, beside the frames of a file decoded whole."""
    if OTHERWISE in found[1] and wanted[1] == "":
        return []  # it was whole for the first sampling alone
    if found[0] is None or wanted[0] is None:
        same = found[1] == wanted[1]
        return (
            [] if same else [f"{clip.id}: from {LATER} s on {decoder} says {found[1]!r}, not {wanted[1]!r}"]
        )
    error = float(np.abs(found[0].astype(int) - wanted[0]).mean())
    if error <= TOLERANCES.get(decoder, 0):
        return []
    return [f"{clip.id}: from {LATER} s on other frames by {decoder}, mean difference {error:.1f}"]


def _read(read: Read, clip: Clip) -> tuple[np.ndarray | None, str]:
    """The frames of a clip, or why there are none."""
    try:
        frames = read(clip)
    except DecodeError as error:
        return None, error.reason
    if frames.shape != (SAMPLING.frames, SIZE, SIZE, 3):
        return None, f"shape {frames.shape}"
    return frames, ""


def main() -> None:
    """Run, print and keep one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="that a file may take")
    parser.add_argument("--sources", type=Path, help="whole clips to damage; default: small ones, drawn")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--decoders", nargs="+", choices=["pyav", *TOLERANCES], default=["pyav"])
    parser.add_argument("--out", type=Path, help="JSONL to append the row to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = sorted(p for p in (arguments.sources or folder).rglob("*") if p.is_file())
        sources = [p for p in given if p.stat().st_size > HEADER] or draw_sources(folder / "sources")
        clips = write_mutated(sources, folder / "clips", arguments.count, arguments.seed)
        begin = time.perf_counter()
        options = ExamineOptions(sampling=SAMPLING, seconds=arguments.seconds, workers=arguments.workers)
        found = diagnose(clips, folder / "doctor", options)
        spent = time.perf_counter() - begin
        row = {
            "files": len(clips),
            "seed": arguments.seed,
            "sources": "given" if arguments.sources else "drawn",
            "verdicts": Counter(file["kind"] for file in found.files),
            "past_the_limit": sum(reason.startswith("decoding it took") for _, _, reason in found.broken),
            "crashed": sum(reason.startswith("decoding it its process") for _, _, reason in found.broken),
            **{f"by {name}": _judged(found, clips, arguments, name) for name in arguments.decoders},
            "doctor_seconds": round(spent, 1),
            "largest_process_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        }
    print(json.dumps(row, indent=1))
    if arguments.out:
        write_row(arguments.out, row | machine("cpu"))


def _judged(
    found: Diagnosis, clips: Sequence[Clip], arguments: argparse.Namespace, decoder: str
) -> dict[str, Any]:
    told, refused = disagreements(found, clips, arguments.seconds, decoder, lit=arguments.sources is None)
    return {"disagreements": told, "refused by it alone": refused}


def _draw(path: Path, codec: str) -> Path:
    """A moving pattern of 12 frames."""
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


if __name__ == "__main__":
    main()
