"""Memory of a loader and of the doctor over many odd files: it may not grow with their number.

    python benchmarks/loader_memory.py [--count 10000] [--out FILE]

The files are links to one small clip of each odd kind and to a few broken ones; each is a file of its own to
those that read it, and decoded whole. The memory is what the processes have to themselves (USS): the one that
trains or asks, its workers, and theirs that decode. Tables of files are kept, for at most 32 MB a process.

A row for each is written to benchmarks/results/cpu: MB after a fifth of the files, the most after that, and
the growth between. It exits with 1 where that is more than the bound.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.measure import machine, results_file, write_row
from discovla.data.config import DataConfig
from discovla.data.doctor import ExamineOptions, diagnose
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from tests.soak.fuzz_videos import draw_sources, write_mutated

BOUND_MB = 48.0  # the tables of 10,000 short clips, in the process that decodes, and what allocators keep
FRAMES, SIZE, BATCH = 4, 32, 20
SAMPLES = 40  # of the memory, over a run


def link_clips(folder: Path, count: int) -> list[Clip]:
    """Clips that are links to a few small files, whole and broken ones in turn."""
    whole = draw_sources(folder / "sources")
    broken = [clip.video for clip in write_mutated(whole, folder / "broken", 2 * len(whole), seed=3)]
    sources = [*whole, *broken]
    (folder / "clips").mkdir()
    clips = []
    for number in range(count):
        source = sources[number % len(sources)]
        path = folder / "clips" / f"{number:06d}{source.suffix}"
        os.link(source, path)
        clips.append(Clip(id=path.name, video=path, captions=("a clip",), split="train"))
    return clips


def memory_mb() -> float:
    """What this process and those below it have to themselves."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes) / 1e6


def through_loader(clips: Sequence[Clip]) -> Iterator[int]:
    """Clips read so far, in an epoch of training batches."""
    shape = BatchSpec(
        batch_size=BATCH,
        rank=0,
        world_size=1,
        seed=0,
        image_size=SIZE,
        context_length=12,
        frame_captions=False,
    )
    config = DataConfig(manifest=Path("none"), frames=FRAMES, workers=1, decode_seconds=60.0)
    loader = TrainLoader(clips, config, shape)
    for step, _ in enumerate(loader.epoch(0), start=1):
        yield step * BATCH


def through_doctor(clips: Sequence[Clip], told: Callable[[int, int], None]) -> None:
    """Examine all clips."""
    with tempfile.TemporaryDirectory() as out:
        diagnose(
            clips, out, ExamineOptions(sampling=Sampling(frames=FRAMES), seconds=60.0, workers=1), report=told
        )


def watch(subject: str, clips: Sequence[Clip]) -> dict[str, Any]:
    """The memory over a run through all clips."""
    every = max(BATCH, len(clips) // SAMPLES)
    found: list[tuple[int, float]] = []

    def told(done: int, _: int) -> None:
        if done and done % every == 0:
            found.append((done, memory_mb()))

    begin = time.perf_counter()
    if subject == "doctor":
        through_doctor(clips, told)
    else:
        for done in through_loader(clips):
            told(done, len(clips))
    settled = next(mb for done, mb in found if done >= len(clips) / 5)
    most = max(mb for done, mb in found if done > len(clips) / 5)
    return {
        "name": "memory over odd files",
        "subject": subject,
        "files": len(clips),
        "mb_after_a_fifth": round(settled, 1),
        "mb_most_after": round(most, 1),
        "growth_mb": round(most - settled, 1),
        "bound_mb": BOUND_MB,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> int:
    """Run both and keep a row of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="default: a new file of benchmarks/results/cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    where = machine("cpu")
    out = arguments.out or results_file(where, "data-memory")
    grown = False
    for subject in ("doctor", "loader"):
        with tempfile.TemporaryDirectory() as folder:
            row = watch(subject, link_clips(Path(folder), arguments.count))
        write_row(out, row | where)
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        grown |= row["growth_mb"] > BOUND_MB
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
