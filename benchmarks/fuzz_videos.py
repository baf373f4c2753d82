"""Damaged videos through the doctor and the loader: none may crash, hang or leave a process behind.

    python benchmarks/fuzz_videos.py --count 500 [--sources DIR] [--out results/cpu/fuzz-videos.jsonl]

Each file is a whole clip with bytes of its header or anywhere changed, cut off, or torn out.  What the doctor
says of it must be what the loader does with it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from discovla.data.decode import DecodeError
from discovla.data.doctor import Checks, Diagnosis, diagnose
from discovla.data.manifest import Clip
from discovla.data.reading import Reader, Reading
from discovla.data.sampling import Sampling

HEADER = 1500  # bytes at either end, where indexes and headers are
KINDS = {"mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "mkv": "mjpeg", "ts": "libx264"}
SAMPLING = Sampling(frames=4)


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


def disagreements(found: Diagnosis, clips: Sequence[Clip], seconds: float) -> list[str]:
    """Clips of which the loader does something other than the doctor says, time limits apart."""
    reasons = {name: reason for name, _, reason in found.broken}
    slow = {name for name, reason in reasons.items() if reason.startswith("decoding it took longer")}
    told = []
    reader = Reader(seconds)
    for clip in (clip for clip in clips if clip.id not in slow):
        try:
            frames = reader(Reading(path=clip.video, sampling=SAMPLING, image_size=16))
            reason = None if frames.shape == (SAMPLING.frames, 16, 16, 3) else f"shape {frames.shape}"
        except DecodeError as error:
            reason = error.reason
        if reason != reasons.get(clip.id):
            told.append(f"{clip.id}: the doctor says {reasons.get(clip.id)!r}, the loader {reason!r}")
    reader.close()
    return told


def main() -> None:
    """Run, print and keep one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="that a file may take")
    parser.add_argument("--sources", type=Path, help="whole clips to damage; default: small ones, drawn")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSONL to append the row to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = sorted(p for p in (arguments.sources or folder).rglob("*") if p.is_file())
        sources = [p for p in given if p.stat().st_size > HEADER] or draw_sources(folder / "sources")
        clips = write_mutated(sources, folder / "clips", arguments.count, arguments.seed)
        begin = time.perf_counter()
        checks = Checks(sampling=SAMPLING, seconds=arguments.seconds, workers=arguments.workers)
        found = diagnose(clips, folder / "doctor", checks)
        spent = time.perf_counter() - begin
        row = {
            "files": len(clips),
            "seed": arguments.seed,
            "sources": "given" if arguments.sources else "drawn",
            "verdicts": Counter(file["kind"] for file in found.files),
            "past_the_limit": sum(reason.startswith("decoding it took") for _, _, reason in found.broken),
            "crashed": sum(reason.startswith("decoding it its process") for _, _, reason in found.broken),
            "disagreements": disagreements(found, clips, arguments.seconds),
            "doctor_seconds": round(spent, 1),
            "largest_process_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        }
    print(json.dumps(row, indent=1))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


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
