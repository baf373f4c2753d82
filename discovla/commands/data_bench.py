"""`discovla data-bench`: frames a second of each way to the frames, on one's own files."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from discovla.data.data_bench import BenchSettings, bench, table
from discovla.data.manifest import read_manifest


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "measure how many frames a second each decoder gives on the clips of a manifest"
    parser = commands.add_parser("data-bench", help=text, description=text)
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    number = "read N clips, evenly spaced in the manifest, default: %(default)s"
    parser.add_argument("--clips", type=int, default=32, metavar="N", help=number)
    parser.add_argument("--num-frames", type=int, default=12, metavar="N", help="default: %(default)s")
    size = "pixels of a side of the frames, default: %(default)s"
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help=size)
    workers = "processes that decode, default: %(default)s"
    parser.add_argument("--workers", type=int, default=2, metavar="N", help=workers)
    shards = "shards made from the manifest, to be read as well; may be given more than once"
    parser.add_argument("--shards", metavar="DIR", action="append", help=shards)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, one JSON a line")
    parser.set_defaults(run=_data_bench)


def _data_bench(arguments: argparse.Namespace) -> None:
    for name in ("clips", "num_frames", "image_size", "workers"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: expected at least 1, got {getattr(arguments, name)}")
    clips = read_manifest(arguments.manifest)
    step = max(1, len(clips) // arguments.clips)
    settings = BenchSettings(
        frames=arguments.num_frames, image_size=arguments.image_size, workers=arguments.workers
    )
    rows = list(bench(clips[::step][: arguments.clips], settings, shards=arguments.shards or ()))
    print(table(rows))
    if arguments.json is not None:
        lines = [json.dumps(asdict(row) | {"rate": row.rate}) for row in rows]
        arguments.json.write_text("\n".join(lines) + "\n", encoding="utf-8")
