"""Epochs of training batches from raw shards beside epochs from the frame cache that shards replaced.

    git worktree add /tmp/cache 9aa5cf2     # the last commit with data.cache
    python benchmarks/frame_cache.py --checkout /tmp/cache [--rounds 15] [--drawn-world DIR] [--out FILE]

Two sets: the training clips of the drawn world as the quickstart reads them (`discovla draw` makes them), and
128 drawn clips of 320x240 as 12 frames of 224x224. The old code reads from its cache and this code from
shards, each in a process of its own, without data workers, on one thread. Their epochs take turns, and either
is first in every second round. Both read the same batches, which one epoch checks bit for bit.

Rows are one JSON a line. cpu_ms, wall_ms: of a sample in an epoch, the median over rounds, child processes
included. cache_by_shards_*: ratio of the two epochs of a round, above 1 where shards are faster. first_*:
seconds until the end of the first epoch, decoding included: the cache fills during it, shards are written
before it by one worker.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it starts with its own folder there

from benchmarks.data import GOPS, RATE, draw
from benchmarks.measure import ROOT, machine, results_file, write_row
from discovla.data.manifest import Clip, read_manifest, write_manifest

# Reads one epoch for each line of standard input, and writes one JSON a line. `Spec` and `read_clips` have
# other names in the checkout with the cache.
READER = """
import hashlib, json, os, resource, sys, time
import psutil, torch
from discovla.data.config import DataConfig
from discovla.data.loader import TrainLoader
spec = json.loads(sys.argv[1])
if spec["way"] == "cache":
    from discovla.data.source import LoaderShape as Spec, read_clips
else:
    from discovla.data.dataset import read_clips
    from discovla.data.loader import BatchSpec as Spec
    from discovla.data.shards.layout import ShardSettings
    from discovla.data.shards.writer import write_shards
torch.set_num_threads(1)

def cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    living = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(x.ru_utime + x.ru_stime for x in used) + sum(x.user + x.system for x in living)

def open_loader():
    fields = {"frames": spec["frames"], "augment": "light", "workers": 0}
    if spec["way"] == "cache":
        config = DataConfig(manifest=spec["manifest"], cache=spec["folder"], **fields)
    else:
        settings = ShardSettings(frames=spec["frames"], size=spec["size"])
        write_shards(spec["manifest"], spec["folder"], settings, workers=1)
        config = DataConfig(shards=spec["folder"], **fields)
    shape = Spec(batch_size=spec["batch_size"], rank=0, world_size=1, seed=0, image_size=spec["size"],
                 context_length=32, frame_captions=False)
    return TrainLoader(read_clips(config, "train"), config, shape)

loader = None
for line in sys.stdin:
    cpu, wall = cpu_seconds(), time.perf_counter()
    loader = loader or open_loader()
    digest, samples = hashlib.sha256(), 0
    for batch in loader.epoch(int(line)):
        samples += len(batch.frames)
        if line == "1\\n":
            for tensor in (batch.frames, batch.frame_mask, batch.text_ids, batch.video_index, batch.valid):
                digest.update(tensor.numpy().tobytes())
    answer = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall, "samples": samples}
    print(json.dumps(answer | {"digest": digest.hexdigest()}), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A set of clips and the batches read from it."""

    manifest: str
    frames: int
    size: int
    batch_size: int


def drawn_world(source: Path, folder: Path) -> Subject:
    """Return the training clips of the drawn world, as the quickstart reads them."""
    write_manifest(folder / "manifest.jsonl", read_manifest(source / "manifest.jsonl", split="train"))
    return Subject(manifest=str(folder / "manifest.jsonl"), frames=8, size=64, batch_size=48)


def large_frames(folder: Path, count: int = 128) -> Subject:
    """Draw clips whose frames are stored with 224 pixels a side."""
    clips = []
    for i in range(count):
        path = folder / f"{i}.mp4"
        if i < 8:
            draw(path, (320, 240), GOPS["short-gop"], 12 * RATE + i)
        else:  # a copy of a drawn clip: decoded anew, under a name of its own
            os.link(folder / f"{i % 8}.mp4", path)
        clips.append(Clip(id=str(i), video=path, captions=(f"caption of clip {i}",), split="train"))
    write_manifest(folder / "manifest.jsonl", clips)
    return Subject(manifest=str(folder / "manifest.jsonl"), frames=12, size=224, batch_size=16)


@contextmanager
def reader(way: str, subject: Subject, folder: Path, checkout: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that reads epochs with the code of a checkout."""
    spec = json.dumps({"way": way, "folder": str(folder), **asdict(subject)})
    environment = os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'kernels'}"}
    with subprocess.Popen(
        [sys.executable, "-c", READER, spec],
        cwd=checkout,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_epoch(process: subprocess.Popen[str], epoch: int) -> dict[str, Any]:
    """Read an epoch in a process and return its times."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{epoch}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def compare(subject: Subject, folder: Path, checkout: Path, rounds: int) -> dict[str, Any]:
    """Return the row of a set of clips."""
    with (
        reader("cache", subject, folder / "cache", checkout) as cache,
        reader("shards", subject, folder / "shards", ROOT) as shards,
    ):
        ways = {"cache": cache, "shards": shards}
        first = {way: read_epoch(process, 0) for way, process in ways.items()}
        checked = {way: read_epoch(process, 1) for way, process in ways.items()}
        if checked["cache"]["digest"] != checked["shards"]["digest"]:
            raise RuntimeError("the batches from shards differ from those from the cache")
        times: dict[str, list[dict[str, Any]]] = {"cache": [], "shards": []}
        for i in range(rounds):
            for way in ("cache", "shards") if i % 2 else ("shards", "cache"):
                times[way].append(read_epoch(ways[way], 2 + i))
    samples = times["cache"][0]["samples"]
    row: dict[str, Any] = {"n": rounds, "samples": samples, "same_batches": True}
    for way, epochs in times.items():
        row[f"first_{way}_cpu_s"] = first[way]["cpu"]
        row[f"first_{way}_wall_s"] = first[way]["wall"]
        for kind in ("cpu", "wall"):
            row[f"{way}_{kind}_ms"] = 1000 * statistics.median(epoch[kind] for epoch in epochs) / samples
    for kind in ("cpu", "wall"):
        ratios = sorted(a[kind] / b[kind] for a, b in zip(times["cache"], times["shards"], strict=True))
        for share in (20, 50, 80):
            row[f"cache_by_shards_{kind}_p{share}"] = ratios[int(share / 100 * (rounds - 1))]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True, help="working tree of commit 9aa5cf2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--drawn-world", type=Path, default=ROOT / "data/drawn_world", metavar="DIR")
    parser.add_argument("--out", type=Path, help="default: a new file of benchmarks/results/cpu")
    arguments = parser.parse_args()
    where = machine("cpu")
    out = arguments.out or results_file(where, "frame-cache")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("quickstart, 8 x 64", "drawn 320x240 12 s, 12 x 224"):
            own = Path(folder) / name.partition(" ")[0].strip(",")
            own.mkdir()
            world = name.startswith("quickstart")
            subject = drawn_world(arguments.drawn_world, own) if world else large_frames(own)
            row = compare(subject, own, arguments.checkout.resolve(), arguments.rounds)
            write_row(out, {"subject": "cache and shards", "clips": name} | row | where)
            print(f"{name}: cache / shards {row['cache_by_shards_cpu_p50']:.2f} of CPU in later epochs")
            print(
                f"first epoch: {row['first_cache_cpu_s']:.1f}, {row['first_shards_cpu_s']:.1f} s CPU",
                flush=True,
            )


if __name__ == "__main__":
    main()
