"""Frames a second of every way to the frames, beside what each model takes: `benchmarks/gpu.py --suite data`.

H.264 clips of the sizes and kinds of `benchmarks/data.py` are drawn, and made into raw and JPEG shards of 12
frames of 224x224. Each way reads them all: PyAV and torchcodec in a process a core, DALI's graph
(on the GPU where there is one), shards in one process. It runs without a GPU too, and is then about DALI's
graph on the CPU, which does not read H.264.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.data import GOPS, KINDS, RATE, SIZES, draw
from benchmarks.measure import write_row
from discovla.data.config import DataConfig
from discovla.data.decoders import BenchRow, bench, bench_table
from discovla.data.manifest import Clip, read_manifest, write_manifest
from discovla.data.shards.layout import Format, ShardSettings
from discovla.data.shards.writer import write_shards

DRAWN = 4  # clips of a kind; the others are links to them
FRAMES, IMAGE_SIZE = 12, 224
# Frames a second on one H200: the samples a second that the performance plan aims at (batch 128, bf16) times
# the 12 frames of each. Targets, none of them measured.
DEMAND = {"ViT-B/32": 2460 * 12, "ViT-B/16": 665 * 12, "ViT-L/14": 154 * 12}

Kind = tuple[str, str]  # size and distance of key frames, by their names


def linked_clips(folder: Path, kind: Kind, count: int, seconds: float) -> Path:
    """A manifest of `count` clips of which few differ."""
    folder.mkdir(parents=True)
    for number in range(min(DRAWN, count)):
        draw(folder / f"{number}.mp4", SIZES[kind[0]], GOPS[kind[1]], int(seconds * RATE) + number)
    clips = []
    for number in range(count):
        path = folder / f"{number}.mp4"
        if number >= DRAWN:
            os.link(folder / f"{number % DRAWN}.mp4", path)
        clips.append(Clip(id=str(number), video=path, captions=("what moves",), split="train"))
    write_manifest(folder / "manifest.jsonl", clips)
    return folder / "manifest.jsonl"


def measure_data(
    out: Path,
    where: dict[str, Any],
    *,
    kinds: Sequence[Kind] = KINDS,
    clips: int = 128,
    seconds: float = 15.0,
    workers: int | None = None,
) -> list[BenchRow]:
    """Measure, print the table of each kind of clip, and write a row of each way.

    Args:
        out, where: as of `write_row`.
        kinds: of clips.  clips, seconds: of each, and how long they are.
        workers: processes and threads; None takes all cores.
    """
    workers = workers or len(os.sched_getaffinity(0))
    found = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as name:
            manifest = linked_clips(Path(name) / "clips", kind, clips, seconds)
            rows = _ways(manifest, Path(name), workers)
        size, gop = kind
        print(f"{gop} {size}, {seconds:g} s, {clips} clips", bench_table(rows), "", sep="\n", flush=True)
        for row in rows:
            shares = {model: row.rate / demand for model, demand in DEMAND.items()}
            told = {"name": "frames a second", "clips": gop, "size": size, "way": row.name, "rate": row.rate}
            write_row(out, told | {"demand_met": shares, "workers": workers} | asdict(row) | where)
        found += rows
    return found


def _ways(manifest: Path, folder: Path, workers: int) -> list[BenchRow]:
    """The clips in every way, from files and from both kinds of shards."""
    forms: tuple[Format, ...] = ("raw", "jpeg")
    for form in forms:
        kept = ShardSettings(frames=FRAMES, size=IMAGE_SIZE, format=form)
        write_shards(manifest, folder / form, kept, workers=workers)
    config = DataConfig(manifest=manifest, frames=FRAMES, workers=workers)
    shards = [str(folder / form) for form in forms]
    return list(bench(read_manifest(manifest), config, IMAGE_SIZE, shards=shards))
