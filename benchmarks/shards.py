"""Frames of clips from shards beside decoding the clips, and what the loader adds to either.

    python benchmarks/shards.py [--rounds 15] [--seconds 15] [--clips 4] [--kinds short-gop] [--out FILE]

Clips of 320x240 with a key frame every 250 frames and every 12 are drawn and encoded as `benchmarks/data.py`
does, and made into raw and JPEG shards of 12 frames of 224x224. Each round reads every clip once in each way,
the ways in turn, in one process and on one thread. Decoding is that of known files, which is its fastest.

The loader's overhead is its CPU time for an epoch of decoded batches by that of the reader alone for the same
clips, once with the decoder in its own process, as a run has it, and once in that of the loader. These ratios
are of two times that hardly differ, on a machine that may be shared; what the loader does itself is measured
apart, with a reader that gives frames which are ready, and set against the time of decoding.

Rows are written to benchmarks/results/cpu, one JSON a line: CPU and wall milliseconds a clip, and the median
over rounds of the ratio to decoding in the same round, with its quintiles: the machine may be shared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.data import GOPS, RATE, draw
from benchmarks.measure import machine, results_file, write_row
from discovla.data.config import DataConfig
from discovla.data.dataset import ClipDataset, ClipReader, FileClipReader, ShardClipReader, training_pairs
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.data.manifest import Clip, read_manifest, write_manifest
from discovla.data.shards.layout import ShardSettings
from discovla.data.shards.reader import Shards
from discovla.data.shards.writer import write_shards

SIZE, FRAMES, QUALITY, LIMIT = 224, 12, 90, 120.0
Call = Callable[[], object]


def cpu_seconds() -> float:
    """CPU time of this process and of those it started."""
    children = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


def measured(call: Call) -> tuple[float, float]:
    """CPU and wall milliseconds of a call."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    call()
    return 1000 * (cpu_seconds() - cpu), 1000 * (time.perf_counter() - wall)


def drawn(folder: Path, gop: int, count: int, seconds: float) -> Path:
    """A manifest of clips that differ in length."""
    clips = []
    for i in range(count):
        path = folder / f"{i}.mp4"
        draw(path, (320, 240), gop, int(seconds * RATE) + i)
        caption = f"what moves in clip {i} of all those drawn here"
        clips.append(Clip(id=str(i), video=path, captions=(caption,), split="train"))
    write_manifest(folder / "manifest.jsonl", clips)
    return folder / "manifest.jsonl"


def sharded(manifest: Path, form: Any) -> Shards:
    """The clips of a manifest as shards."""
    out = manifest.parent / form
    settings = ShardSettings(frames=FRAMES, size=SIZE, format=form, quality=QUALITY)
    write_shards(manifest, out, settings, workers=0)
    return Shards(out)


def reading_ways(manifest: Path) -> dict[str, Call]:
    """Every way to read all clips once."""
    clips = read_manifest(manifest)
    config = DataConfig(manifest=manifest, frames=FRAMES)
    readers: dict[str, ClipReader] = {"decode": FileClipReader(config, SIZE, sandbox=False)}
    for form in ("raw", "jpeg"):
        readers[form] = ShardClipReader(config, SIZE, sharded(manifest, form))
    return {
        name: lambda reader=reader: [reader.read(clip) for clip in clips] for name, reader in readers.items()
    }


class ReadyReader:
    """A `ClipReader` that decodes nothing, so that only the work of the loader is measured."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        shape = (config.frames, SIZE, SIZE, 3)
        self._frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def read(self, clip: Clip, seed: str | None = None) -> np.ndarray:
        return self._frames.copy()


def loading_ways(manifest: Path, reader: ClipReader) -> dict[str, Call]:
    """The clips by their reader alone, and by the loader around it."""
    clips = read_manifest(manifest)
    pairs = training_pairs(clips, frame_captions=False, missing="error")
    source = ClipDataset(clips=clips, pairs=pairs, reader=reader, seed=0)
    shape = BatchSpec(
        batch_size=len(clips),
        rank=0,
        world_size=1,
        seed=0,
        image_size=SIZE,
        context_length=32,
        frame_captions=False,
    )
    loader = TrainLoader(source, DataConfig(manifest=manifest, frames=FRAMES, workers=0), shape)
    return {
        "decode": lambda: [reader.read(clip) for clip in clips],
        "loader": lambda: list(loader.epoch(0)),
    }


def compared(ways: dict[str, Call], rounds: int, clips: int) -> dict[str, dict[str, float]]:
    """Milliseconds a clip of each way and its ratios to decoding, over interleaved rounds."""
    for call in ways.values():
        call()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    names = list(ways)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(measured(ways[name]))
    rows = {}
    for name, times in found.items():
        row = {"n": rounds, "cpu_ms": statistics.median(cpu for cpu, _ in times) / clips}
        row["wall_ms"] = statistics.median(wall for _, wall in times) / clips
        for kind, key in enumerate(("cpu", "wall")):
            pairs = zip(times, found["decode"], strict=True)
            ratios = sorted(theirs[kind] / ours[kind] for ours, theirs in pairs)
            for share in (20, 50, 80):
                row[f"decode_by_this_{key}_p{share}"] = ratios[int(share / 100 * (rounds - 1))]
        beside = zip(times, found["decode"], strict=True)
        row["cpu_ms_over_decode"] = statistics.median(ours[0] - theirs[0] for ours, theirs in beside) / clips
        rows[name] = row
    return rows


def own_work(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """What the loader adds to a clip with frames ready: CPU milliseconds, and their share of decoding."""
    own = found["loader, frames ready"]["loader"]["cpu_ms_over_decode"]
    return {"cpu_ms": own, "share_of_decoding": own / found["reading"]["decode"]["cpu_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each clip")
    parser.add_argument("--clips", type=int, default=4, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=GOPS, default=list(GOPS), help="default: all")
    parser.add_argument("--out", type=Path, help="default: a new file of benchmarks/results/cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = machine("cpu")
    out = arguments.out or results_file(where, "shards")
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            manifest = drawn(Path(folder), GOPS[kind], arguments.clips, arguments.seconds)
            config = DataConfig(manifest=manifest, frames=FRAMES, decode_seconds=LIMIT)
            subjects = {
                "reading": reading_ways(manifest),
                "loader": loading_ways(manifest, FileClipReader(config, SIZE, sandbox=False)),
                "loader, decoder in a process": loading_ways(manifest, FileClipReader(config, SIZE)),
                "loader, frames ready": loading_ways(manifest, ReadyReader(config)),
            }
            shape = {"clips": f"{kind} 320x240 {arguments.seconds:g} s, {FRAMES} x {SIZE}"}
            found: dict[str, dict[str, dict[str, float]]] = {}
            for subject, ways in subjects.items():
                found[subject] = compared(ways, arguments.rounds, arguments.clips)
                for name, row in found[subject].items():
                    write_row(out, {"subject": subject, "way": name} | shape | row | where)
                    print(f"{kind:<10} {subject:<30} {name:<8} {row['cpu_ms']:8.2f} ms CPU, "
                          f"decode / this {row['decode_by_this_cpu_p50']:.2f}", flush=True)  # fmt: skip
            own = own_work(found)
            write_row(out, {"subject": "loader's own work"} | shape | own | where)
            print(f"{kind:<10} loader's own work {own['cpu_ms']:.2f} ms CPU a clip, "
                  f"{100 * own['share_of_decoding']:.1f} % of decoding", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
