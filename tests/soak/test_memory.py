"""Memory of the doctor and of the loader over many odd files: it must not grow with their number.

The files are links to one small clip of each odd kind and to a few damaged ones.  The memory is the unique
set size of the process, of its workers and of the processes in which they decode.  Each of them keeps frame
indices in at most 32 MB.

    pytest -m soak tests/soak/test_memory.py                          10,000 files, in about 10 minutes
    python tests/soak/test_memory.py doctor|loader COUNT [--out FILE] any number; a row for benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it starts with its own folder there

from benchmarks.measure import machine, write_row
from discovla.data.config import DataConfig
from discovla.data.doctor import ExamineOptions, diagnose
from discovla.data.loader import BatchSpec, TrainLoader
from discovla.data.manifest import Clip
from discovla.data.sampling import Sampling
from tests.data.damaged_clips import draw_sources, write_damaged

BOUND_MB = 48.0  # frame indices of 10,000 short clips in the process that decodes, and what allocators keep
FRAMES, SIZE, BATCH = 4, 32, 20
SAMPLES = 40  # measurements of the memory in a run

Progress = Callable[[int], None]  # called with the number of files read so far


def link_clips(folder: Path, count: int) -> list[Clip]:
    """Return clips that are hard links to a few small files, whole and damaged ones in turn."""
    whole = draw_sources(folder / "sources")
    damaged = [clip.video for clip in write_damaged(whole, folder / "damaged", 2 * len(whole), seed=3)]
    sources = [*whole, *damaged]
    (folder / "clips").mkdir()
    clips = []
    for number in range(count):
        source = sources[number % len(sources)]
        path = folder / "clips" / f"{number:06d}{source.suffix}"
        os.link(source, path)
        clips.append(Clip(id=path.name, video=path, captions=("a clip",), split="train"))
    return clips


def memory_mb() -> float:
    """Return the unique set size of this process and of those below it."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes) / 1e6


def load(clips: Sequence[Clip], folder: Path, progress: Progress) -> None:
    """Read an epoch of training batches."""
    spec = BatchSpec(
        batch_size=BATCH,
        rank=0,
        world_size=1,
        seed=0,
        image_size=SIZE,
        context_length=12,
        frame_captions=False,
    )
    config = DataConfig(
        manifest=Path("none"), frames=FRAMES, workers=1, decode_seconds=60.0, index_dir=folder / "index"
    )
    for step, _ in enumerate(TrainLoader(clips, config, spec).epoch(0), start=1):
        progress(step * BATCH)


def examine(clips: Sequence[Clip], folder: Path, progress: Progress) -> None:
    """Examine all clips as `discovla doctor` does."""
    options = ExamineOptions(
        sampling=Sampling(frames=FRAMES), seconds=60.0, workers=1, index_dir=folder / "index"
    )
    diagnose(clips, folder / "doctor", options, report=lambda done, _: progress(done))


SUBJECTS = {"doctor": examine, "loader": load}


def measure(subject: str, clips: Sequence[Clip], folder: Path) -> dict[str, Any]:
    """Measure the memory in a run through all clips."""
    every = max(BATCH, len(clips) // SAMPLES)
    samples: list[tuple[int, float]] = []

    def progress(done: int) -> None:
        if done and done % every == 0:
            samples.append((done, memory_mb()))

    begin = time.perf_counter()
    SUBJECTS[subject](clips, folder, progress)
    settled = next(mb for done, mb in samples if done >= len(clips) / 5)
    most = max(mb for done, mb in samples if done > len(clips) / 5)
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


def main(words: Sequence[str] | None = None) -> None:
    """Print the memory of one subject as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("count", type=int)
    parser.add_argument("--out", type=Path, help="results file to which the row is appended")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options.subject, link_clips(Path(folder), options.count), Path(folder))
    if options.out is not None:
        write_row(options.out, row | machine("cpu"))
    print(json.dumps(row))


def measured(subject: str, count: int) -> dict[str, Any]:
    """Measure in a new interpreter: a worker forked from a large process comes to own its pages."""
    command = [sys.executable, __file__, subject, str(count)]
    output = subprocess.run(command, check=True, timeout=1800, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def test_every_link_is_a_file_of_its_own(tmp_path):
    assert len({clip.video for clip in link_clips(tmp_path, 60)}) == 60


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_memory_does_not_grow_over_hundreds_of_files(subject):
    row = measured(subject, 800)
    assert row["mb_after_a_fifth"] > 10
    assert row["growth_mb"] <= 12  # 20 KB a file


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_memory_does_not_grow_over_ten_thousand_files(subject):
    assert measured(subject, 10_000)["growth_mb"] <= BOUND_MB


if __name__ == "__main__":
    main()
