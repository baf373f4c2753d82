"""Time the ways to the frames: decoders, shards and the loader.

    python benchmarks/data.py decoders      12 frames of a clip by each decoder, on one core
    python benchmarks/data.py shards        raw and JPEG shards beside decoding; overhead of the loader
    python benchmarks/data.py machine       frames a second of each decoder and of shards, all cores or a GPU

Clips are drawn and encoded by x264, as most clips are, with a key frame every 250 frames (long-gop) or every
12 (short-gop).  Calls that are compared take turns, and ratios are of calls of one round, because the
machine may be shared.  Rows go to benchmarks/results/, one JSON a line.

decoders: PyAV-naive converts every frame and then samples; PyAV-sequential converts the sampled ones;
OpenCV, torchcodec and decord, if installed, seek or skip.  They take the number of frames from the header,
and so assume that all of them decode.  Ours decodes a file to its end on the first visit, to index it, and
seeks by the index later.  Every decoder has one thread.

shards: "decode" reads known files by PyAV, its fastest case.  The loader is timed around three readers: one
that decodes in the process of the loader, one that decodes in a sandboxed process, as training does, and one
whose frames are ready, which leaves the work of the loader itself.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script starts with its own folder there

from benchmarks.measure import machine, results_file, write_row
from discovla.data.config import DataConfig
from discovla.data.dataset import ClipDataset, ClipReader, FileClipReader, ShardClipReader, training_pairs
from discovla.data.decoders import BenchRow, bench, bench_table
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.data.manifest import Clip, read_manifest, write_manifest
from discovla.data.sampling import Sampling, frame_indices
from discovla.data.shards.layout import Format, ShardSettings
from discovla.data.shards.reader import Shards
from discovla.data.shards.writer import write_shards
from discovla.data.video.frames import FrameRequest, SandboxedReader, read_frames, read_request
from discovla.data.video.index import FrameIndexStore
from discovla.data.video.torchcodec import missing

SIZES = {"320x240": (320, 240), "640x360": (640, 360), "1280x720": (1280, 720)}
GOPS = {"long-gop": 250, "short-gop": 12}
KINDS = [(size, gop) for size in SIZES for gop in GOPS if (size, gop) != ("1280x720", "short-gop")]
RATE, FRAMES, IMAGE_SIZE = 25, 12, 224
OTHERS = ("pyav-naive", "pyav-sequential", "opencv", "torchcodec", "decord")
# Frames a second that training needs on one H200: samples a second of the targets (batch 128, bf16) times 12
# frames. None of them is measured.
DEMAND = {"ViT-B/32": 2460 * 12, "ViT-B/16": 665 * 12, "ViT-L/14": 154 * 12}

Call = Callable[[], object]
Read = Callable[[Path], np.ndarray]
Row = dict[str, Any]


def draw(path: Path, size: tuple[int, int], gop: int, count: int) -> None:
    """Draw a textured picture that moves behind a disc, with camera noise, and encode it."""
    rng = np.random.default_rng(0)
    width, height = size
    y, x = np.mgrid[:height, :width]
    texture = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"g": str(gop), "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(count):
            frame = np.roll(texture, (2 * i, 3 * i), (0, 1)).astype(np.int16)
            disc = (y - height / 2 - 60 * np.sin(i / 9)) ** 2 + (x - width / 2 - 90 * np.cos(i / 7)) ** 2
            frame[disc < 900] = (255, i % 255, 0)
            frame += rng.integers(-6, 7, frame.shape, dtype=np.int16)
            picture = np.clip(frame, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def draw_manifest(
    folder: Path, size: tuple[int, int], gop: int, count: int, seconds: float, distinct: int = 4
) -> Path:
    """Draw clips of different lengths and write their manifest; clips beyond `distinct` are hard links."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for number in range(count):
        path = folder / f"{number}.mp4"
        if number < distinct:
            draw(path, size, gop, int(seconds * RATE) + number)
        else:
            os.link(folder / f"{number % distinct}.mp4", path)
        caption = f"what moves in clip {number} of all those drawn here"
        clips.append(Clip(id=str(number), video=path, captions=(caption,), split="train"))
    write_manifest(folder / "manifest.jsonl", clips)
    return folder / "manifest.jsonl"


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its child processes."""
    children = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


def take_turns(
    calls: dict[str, Call], rounds: int, cpu: Callable[[], float] = time.process_time
) -> dict[str, list[tuple[float, float]]]:
    """Return CPU and wall milliseconds of each call and round; each round has another order."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin, wall = cpu(), time.perf_counter()
            calls[name]()
            times[name].append((1000 * (cpu() - begin), 1000 * (time.perf_counter() - wall)))
    return times


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value at a percentage of the sorted list."""
    return sorted(values)[percent * (len(values) - 1) // 100]


def pyav_naive(path: Path) -> np.ndarray:
    """Convert every frame, then sample."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    return np.stack([frames[i] for i in frame_indices(len(frames), RATE, FRAMES)])


def pyav_sequential(path: Path) -> np.ndarray:
    """Decode every frame and convert the sampled ones; the count is the header's."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        sampled = set(frame_indices(stream.frames, RATE, FRAMES))
        decoded = enumerate(container.decode(stream))
        return np.stack([frame.to_ndarray(format="rgb24") for i, frame in decoded if i in sampled])


def opencv(path: Path) -> np.ndarray:
    """Grab every frame up to the last sampled one with OpenCV, and convert the sampled ones."""
    cv2 = importlib.import_module("cv2")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    sampled = frame_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), RATE, FRAMES)
    frames = []
    for index in range(sampled[-1] + 1):
        capture.grab()
        if index in sampled:
            frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(frames)


def torchcodec(path: Path) -> np.ndarray:
    """Read by torchcodec as in its documentation."""
    decoders = importlib.import_module("torchcodec.decoders")
    decoder = decoders.VideoDecoder(str(path), dimension_order="NHWC")
    return decoder.get_frames_at(frame_indices(len(decoder), RATE, FRAMES)).data.numpy()


def decord(path: Path) -> np.ndarray:
    """Read by decord as in its documentation, on one thread."""
    reader = importlib.import_module("decord").VideoReader(str(path), num_threads=1)
    return reader.get_batch(frame_indices(len(reader), RATE, FRAMES)).asnumpy()


def decoders() -> dict[str, Read]:
    """Return all decoders that are installed."""
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


def check_frames(path: Path, readers: dict[str, Read]) -> None:
    """Compare the frames of all decoders; OpenCV converts colours by its own tables."""
    truth = pyav_naive(path).astype(int)
    for name, read in readers.items():
        for _ in range(2):  # our second visit uses the index
            error = int(np.abs(read(path).astype(int) - truth).max())
            allowed = 15 if name == "opencv" else 0
            assert error <= allowed, f"{name}: frames of {path.name} differ by {error} levels"


def decoder_rows(clip: str, times: dict[str, list[tuple[float, float]]]) -> list[Row]:
    """Return a row for each decoder; ratios are of CPU time, to the fastest decoder that is not ours."""
    medians = {name: statistics.median(cpu for cpu, _ in each) for name, each in times.items()}
    fastest = min((name for name in times if name in OTHERS), key=medians.__getitem__)
    rows = []
    for name, each in times.items():
        ratios = [x[0] / base[0] for x, base in zip(each, times[fastest], strict=True)]
        row = {"name": "decode 12 frames", "clip": clip, "reader": name, "n": len(each)}
        row |= {"ms_wall_p50": round(statistics.median(wall for _, wall in each), 2)}
        row |= {"ms_cpu_p50": round(medians[name], 2), "fastest_other": fastest}
        rows.append(row | {f"ratio_p{p}": round(percentile(ratios, p), 3) for p in (20, 50, 80)})
    return rows


def sandbox_row(path: Path, rounds: int) -> Row:
    """Compare reading in a sandboxed process with reading in this one, at the size of the model."""
    request = FrameRequest(path=path, sampling=Sampling(frames=FRAMES), image_size=IMAGE_SIZE)
    reader = SandboxedReader(60.0)
    calls: dict[str, Call] = {"sandbox": lambda: reader(request), "here": lambda: read_request(request)}
    take_turns(calls, 1)
    times = take_turns(calls, rounds)
    reader.close()
    sandbox, here = ([wall for _, wall in times[name]] for name in ("sandbox", "here"))
    return {
        "name": "read in another process",
        "clip": path.stem,
        "n": rounds,
        "ms_wall_p50": round(statistics.median(sandbox), 2),
        "ms_wall_here_p50": round(statistics.median(here), 2),
        "ratio_p50": round(statistics.median(a / b for a, b in zip(sandbox, here, strict=True)), 3),
        "ratio_of_fastest": round(min(sandbox) / min(here), 3),
    }


def measure_decoders(options: argparse.Namespace) -> None:
    """Time every decoder on clips of several sizes, on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    where = machine("cpu") | {"av": av.__version__, "cores": os.cpu_count()}
    out = options.out or results_file(where, "data")
    readers = decoders()
    with tempfile.TemporaryDirectory() as folder:
        for size, gop in (kind for kind in KINDS if kind[0] in options.sizes):
            path = Path(folder) / f"{size}-{gop}.mp4"
            draw(path, SIZES[size], GOPS[gop], int(options.seconds * RATE))
            check_frames(path, readers)
            calls: dict[str, Call] = {
                name: lambda read=read, path=path: read(path) for name, read in readers.items()
            }
            rows = decoder_rows(path.stem, take_turns(calls, options.rounds))
            for row in [*rows, sandbox_row(path, options.rounds)]:
                write_row(out, row | where)
                print(*(f"{key}={value}" for key, value in row.items()), flush=True)


class ReadyReader:
    """A `ClipReader` that returns the same frames at once; only the work of the loader is measured."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        shape = (config.frames, IMAGE_SIZE, IMAGE_SIZE, 3)
        self._frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def read(self, clip: Clip, seed: str | None = None) -> np.ndarray:
        return self._frames.copy()


def reading_calls(manifest: Path) -> dict[str, Call]:
    """Return a call for each way to read all clips once."""
    clips = read_manifest(manifest)
    config = DataConfig(manifest=manifest, frames=FRAMES)
    readers: dict[str, ClipReader] = {"decode": FileClipReader(config, IMAGE_SIZE, sandbox=False)}
    forms: tuple[Format, ...] = ("raw", "jpeg")
    for form in forms:
        settings = ShardSettings(frames=FRAMES, size=IMAGE_SIZE, format=form, quality=90)
        write_shards(manifest, manifest.parent / form, settings, workers=0)
        readers[form] = ShardClipReader(config, IMAGE_SIZE, Shards(manifest.parent / form))
    return {
        name: lambda reader=reader: [reader.read(clip) for clip in clips] for name, reader in readers.items()
    }


def loading_calls(manifest: Path, reader: ClipReader) -> dict[str, Call]:
    """Return calls that read all clips by the reader alone, and by the loader around it."""
    clips = read_manifest(manifest)
    pairs = training_pairs(clips, frame_captions=False, missing="error")
    spec = BatchSpec(
        batch_size=len(clips),
        rank=0,
        world_size=1,
        seed=0,
        image_size=IMAGE_SIZE,
        context_length=32,
        frame_captions=False,
    )
    dataset = ClipDataset(clips=clips, pairs=pairs, reader=reader, seed=0)
    loader = TrainLoader(dataset, DataConfig(manifest=manifest, frames=FRAMES, workers=0), spec)
    return {
        "decode": lambda: [reader.read(clip) for clip in clips],
        "loader": lambda: list(loader.epoch(0)),
    }


def shard_rows(times: dict[str, list[tuple[float, float]]], clips: int) -> dict[str, Row]:
    """Return by name milliseconds a clip, and the ratios of decoding to this call."""
    rows = {}
    for name, each in times.items():
        row: Row = {"n": len(each)}
        for kind, key in enumerate(("cpu", "wall")):
            row[f"{key}_ms"] = statistics.median(x[kind] for x in each) / clips
            ratios = [d[kind] / x[kind] for x, d in zip(each, times["decode"], strict=True)]
            row |= {f"decode_by_this_{key}_p{p}": percentile(ratios, p) for p in (20, 50, 80)}
        over = [x[0] - d[0] for x, d in zip(each, times["decode"], strict=True)]
        row["cpu_ms_over_decode"] = statistics.median(over) / clips
        rows[name] = row
    return rows


def measure_shards(options: argparse.Namespace) -> None:
    """Time shards beside decoding, and the overhead of the loader, on one thread."""
    torch.set_num_threads(1)
    where = machine("cpu")
    out = options.out or results_file(where, "shards")
    for gop in options.kinds:
        with tempfile.TemporaryDirectory() as name:
            count = options.clips
            manifest = draw_manifest(Path(name), SIZES["320x240"], GOPS[gop], count, options.seconds, count)
            config = DataConfig(manifest=manifest, frames=FRAMES, decode_seconds=120.0)
            subjects = {
                "reading": reading_calls(manifest),
                "loader": loading_calls(manifest, FileClipReader(config, IMAGE_SIZE, sandbox=False)),
                "loader, decoder in a process": loading_calls(manifest, FileClipReader(config, IMAGE_SIZE)),
                "loader, frames ready": loading_calls(manifest, ReadyReader(config)),
            }
            clips = {"clips": f"{gop} 320x240 {options.seconds:g} s, {FRAMES} x {IMAGE_SIZE}"}
            rows: dict[str, dict[str, Row]] = {}
            for subject, calls in subjects.items():
                take_turns(calls, 1)
                rows[subject] = shard_rows(take_turns(calls, options.rounds, cpu_seconds), count)
                for way, row in rows[subject].items():
                    write_row(out, {"subject": subject, "way": way} | clips | row | where)
                    ratio = row["decode_by_this_cpu_p50"]
                    print(f"{gop} {subject} {way}: {row['cpu_ms']:.2f} ms CPU, decode / this {ratio:.2f}")
            own = rows["loader, frames ready"]["loader"]["cpu_ms_over_decode"]
            share = own / rows["reading"]["decode"]["cpu_ms"]
            row = {"subject": "loader's own work", "cpu_ms": own, "share_of_decoding": share}
            write_row(out, row | clips | where)
            print(f"{gop} loader's own work: {own:.2f} ms CPU a clip, {share:.1%} of decoding", flush=True)


def measure_machine(
    out: Path,
    where: Row,
    *,
    kinds: Sequence[tuple[str, str]] = KINDS,
    clips: int = 128,
    seconds: float = 15.0,
    workers: int | None = None,
) -> list[BenchRow]:
    """Measure `discovla doctor --bench` on drawn clips and their shards; print a table for each kind of clip.

    Args:
        out, where: file of results and conditions, see `write_row`.
        kinds: names of sizes and of distances of key frames.
        clips, seconds: number and length of the clips of each kind.
        workers: processes and threads; None for all cores.
    """
    workers = workers or len(os.sched_getaffinity(0))
    rows = []
    for size, gop in kinds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            manifest = draw_manifest(folder / "clips", SIZES[size], GOPS[gop], clips, seconds)
            forms: tuple[Format, ...] = ("raw", "jpeg")
            for form in forms:
                settings = ShardSettings(frames=FRAMES, size=IMAGE_SIZE, format=form)
                write_shards(manifest, folder / form, settings, workers=workers)
            config = DataConfig(manifest=manifest, frames=FRAMES, workers=workers)
            shards = [str(folder / form) for form in forms]
            measured = list(bench(read_manifest(manifest), config, IMAGE_SIZE, shards=shards))
        print(f"{gop} {size}, {seconds:g} s, {clips} clips", bench_table(measured), "", sep="\n", flush=True)
        for row in measured:
            demand = {model: row.rate / needed for model, needed in DEMAND.items()}
            common = {"name": "frames a second", "clips": gop, "size": size, "way": row.name}
            common |= {"rate": row.rate, "demand_met": demand, "workers": workers}
            write_row(out, common | asdict(row) | where)
        rows += measured
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Measure one subject."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subjects = parser.add_subparsers(dest="subject", required=True)
    one = subjects.add_parser("decoders", help="12 frames of a clip by each decoder")
    one.add_argument("--rounds", type=int, default=21)
    one.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    two = subjects.add_parser("shards", help="shards beside decoding, and the overhead of the loader")
    two.add_argument("--rounds", type=int, default=15)
    two.add_argument("--clips", type=int, default=4, help="of each kind")
    two.add_argument("--kinds", nargs="+", choices=GOPS, default=list(GOPS))
    three = subjects.add_parser("machine", help="frames a second of each decoder and of shards")
    three.add_argument("--clips", type=int, default=128, help="of each kind")
    three.add_argument("--workers", type=int, help="processes and threads; default: all cores")
    for subject in (one, two, three):
        subject.add_argument("--seconds", type=float, default=15.0, help="length of a clip")
        subject.add_argument("--out", type=Path, help="default: a new file of benchmarks/results")
    options = parser.parse_args(words)
    match options.subject:
        case "decoders":
            measure_decoders(options)
        case "shards":
            measure_shards(options)
        case "machine":
            where = machine("cuda" if torch.cuda.is_available() else "cpu")
            out = options.out or results_file(where, "data-machine")
            sizes = {"clips": options.clips, "seconds": options.seconds}
            measure_machine(out, where, **sizes, workers=options.workers)


if __name__ == "__main__":
    main()
