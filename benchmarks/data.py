"""Decode 12 sampled frames of a clip by each decoder, in turn in one process.

    python benchmarks/data.py [--rounds 21] [--seconds 15] [--sizes 320x240 640x360 1280x720] [--out FILE]

Clips of 320x240, as MSR-VTT has, and of 640x360 with a key frame every 250 frames and every 12, and of
1280x720 with one every 250, are drawn, encoded by x264 as most clips are, and read whole in size. PyAV-naive
converts every frame and then chooses; PyAV-sequential converts those chosen; OpenCV, torchcodec and decord,
where they are installed, seek or skip. They all take the number of frames from the header, and so assume that
all of them decode. Ours decodes a file to its end on the first visit, to index it, and seeks by the index
after that. Every decoder has one thread, and the process runs on one core.

Rounds are interleaved, and a figure is compared with another of its own round: the machine may be shared.
Rows are written to benchmarks/results/cpu, one JSON a line: milliseconds of wall and of CPU time, and the
median over rounds of each decoder's CPU time by that of the fastest of the other people's.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.measure import machine, results_file, write_row
from discovla.data.sampling import Sampling, frame_indices
from discovla.data.video.frames import FrameRequest, SandboxedReader, read_frames, read_request
from discovla.data.video.index import FrameIndexStore
from discovla.data.video.torchcodec import missing

SIZES = {"320x240": (320, 240), "640x360": (640, 360), "1280x720": (1280, 720)}
GOPS = {"long-gop": 250, "short-gop": 12}
KINDS = [(size, gop) for size in SIZES for gop in GOPS if (size, gop) != ("1280x720", "short-gop")]
RATE, FRAMES = 25, 12
OTHERS = ("pyav-naive", "pyav-sequential", "opencv", "torchcodec", "decord")

Read = Callable[[Path], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Call:
    """Milliseconds of one reading."""

    wall: float
    cpu: float


def draw(path: Path, size: tuple[int, int], gop: int, count: int) -> None:
    """A textured picture that moves behind a disc, with the noise of a camera."""
    draws = np.random.default_rng(0)
    width, height = size
    y, x = np.mgrid[:height, :width]
    texture = draws.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": str(gop), "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(count):
            frame = np.roll(texture, (2 * i, 3 * i), (0, 1)).astype(np.int16)
            disc = (y - height / 2 - 60 * np.sin(i / 9)) ** 2 + (x - width / 2 - 90 * np.cos(i / 7)) ** 2
            frame[disc < 900] = (255, i % 255, 0)
            frame += draws.integers(-6, 7, frame.shape, dtype=np.int16)
            picture = np.clip(frame, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def pyav_naive(path: Path) -> np.ndarray:
    """Every frame to an array, then those chosen."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return np.stack([frames[i] for i in frame_indices(len(frames), RATE, FRAMES)])


def pyav_sequential(path: Path) -> np.ndarray:
    """Every frame decoded, those chosen to arrays; the header's count is believed."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(frame_indices(stream.frames, RATE, FRAMES))
        decoded = enumerate(container.decode(stream))
        return np.stack([frame.to_ndarray(format="rgb24") for i, frame in decoded if i in wanted])


def torchcodec(path: Path) -> np.ndarray:
    """torchcodec as its documentation shows it."""
    decoders = importlib.import_module("torchcodec.decoders")
    decoder = decoders.VideoDecoder(str(path), dimension_order="NHWC")
    return decoder.get_frames_at(frame_indices(len(decoder), RATE, FRAMES)).data.numpy()


def opencv(path: Path) -> np.ndarray:
    """OpenCV: grab every frame up to the last, convert those chosen."""
    cv2 = importlib.import_module("cv2")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    wanted = frame_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), RATE, FRAMES)
    frames = []
    for index in range(wanted[-1] + 1):
        capture.grab()
        if index in wanted:
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(frames)


def decord(path: Path) -> np.ndarray:
    """decord as its documentation shows it, on one thread."""
    reader = importlib.import_module("decord").VideoReader(str(path), num_threads=1)
    return reader.get_batch(frame_indices(len(reader), RATE, FRAMES)).asnumpy()


def readers() -> dict[str, Read]:
    """Return all readers that are installed."""
    sampling = Sampling(frames=FRAMES)
    store = FrameIndexStore()
    installed: dict[str, Read] = {"pyav-naive": pyav_naive, "pyav-sequential": pyav_sequential}
    ours: dict[str, Read] = {
        "ours, first visit": lambda path: read_frames(path, sampling).frames,
        "ours, pyav": lambda path: read_frames(path, sampling, store=store).frames,
    }
    if importlib.util.find_spec("cv2") is not None:
        installed["opencv"] = opencv
    if missing() is None:
        installed["torchcodec"] = torchcodec
        ours["ours, torchcodec"] = lambda path: (
            read_frames(path, sampling, decoder="torchcodec", store=store).frames
        )
    if importlib.util.find_spec("decord") is not None:
        installed["decord"] = decord
    return installed | ours


def timed(read: Read, path: Path) -> Call:
    """One reading."""
    wall, cpu = time.perf_counter(), time.process_time()
    read(path)
    return Call(wall=1e3 * (time.perf_counter() - wall), cpu=1e3 * (time.process_time() - cpu))


def compare(path: Path, readers: dict[str, Read], rounds: int) -> dict[str, list[Call]]:
    """Calls of each reader, each round in another order, after the frames are seen to be the same."""
    wanted = pyav_naive(path)
    for name, read in readers.items():
        for _ in range(2):  # the second visit of ours is that of a known file
            frames = read(path)
            # OpenCV converts colours by tables of its own
            error = int(np.abs(frames.astype(int) - wanted).max()) if name == "opencv" else 0
            same = error < 16 if name == "opencv" else np.array_equal(frames, wanted)
            assert same, f"{name}: other frames of {path.name}, {error} levels off"
    found: dict[str, list[Call]] = {name: [] for name in readers}
    names = list(readers)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(timed(readers[name], path))
    return found


def rows(clip: str, calls: dict[str, list[Call]]) -> list[dict[str, Any]]:
    """A row a reader, its ratio being to the fastest of the others by its median."""
    medians = {name: statistics.median(call.cpu for call in each) for name, each in calls.items()}
    fastest = min((name for name in calls if name in OTHERS), key=medians.__getitem__)
    written = []
    for name, each in calls.items():
        ratios = sorted(a.cpu / b.cpu for a, b in zip(each, calls[fastest], strict=True))
        row = {"name": "decode 12 frames", "clip": clip, "reader": name, "n": len(each)}
        row |= {"ms_wall_p50": round(statistics.median(call.wall for call in each), 2)}
        row |= {"ms_cpu_p50": round(medians[name], 2), "fastest_other": fastest}
        row |= {f"ratio_p{p}": round(ratios[p * (len(ratios) - 1) // 100], 3) for p in (20, 50, 80)}
        written.append(row)
    return written


def process_row(path: Path, rounds: int) -> dict[str, Any]:
    """What it costs to read in a process that can be replaced, at the size of the model."""
    reading = FrameRequest(path=path, sampling=Sampling(frames=FRAMES), image_size=224)
    reader = SandboxedReader(60.0)
    pairs = []
    for turn in range(rounds + 1):
        both = {}
        for name, read in sorted({"here": read_request, "there": reader}.items(), reverse=turn % 2 > 0):
            begin = time.perf_counter()
            read(reading)
            both[name] = 1e3 * (time.perf_counter() - begin)
        pairs.append((both["there"], both["here"]))
    reader.close()
    ratios = sorted(there / here for there, here in pairs[1:])
    return {
        "name": "read in another process",
        "clip": path.stem,
        "n": rounds,
        "ms_wall_p50": round(statistics.median(there for there, _ in pairs[1:]), 2),
        "ms_wall_here_p50": round(statistics.median(here for _, here in pairs[1:]), 2),
        "ratio_p50": round(statistics.median(ratios), 3),
        "ratio_of_fastest": round(min(there for there, _ in pairs) / min(here for _, here in pairs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="12 sampled frames of a clip by each decoder")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=int, default=15, help="of each clip")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu/<date>-<commit>-data.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    where = machine("cpu") | {"av": av.__version__, "cores": os.cpu_count()}
    out = options.out or results_file(where, "data")
    found_readers = readers()
    with tempfile.TemporaryDirectory() as folder:
        for size, gop in (kind for kind in KINDS if kind[0] in options.sizes):
            path = Path(folder) / f"{size}-{gop}.mp4"
            draw(path, SIZES[size], GOPS[gop], options.seconds * RATE)
            found = rows(path.stem, compare(path, found_readers, options.rounds))
            for row in [*found, process_row(path, options.rounds)]:
                write_row(out, row | where)
                print(*(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
