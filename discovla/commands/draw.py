"""`discovla draw`: draw the clips of the drawn world."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, fields
from pathlib import Path

from discovla.drawn_world.synthetic import WorldSizes, draw_world


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "draw the clips of the drawn world and write their manifest; existing clips are kept"
    parser = commands.add_parser("draw", help=text, description=text)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="N", help="default: all cores, %(default)s"
    )
    for split, count in asdict(WorldSizes()).items():
        number = f"clips in the split `{split}`; default: %(default)s"
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=number)
    parser.set_defaults(run=_draw)


def _draw(arguments: argparse.Namespace) -> None:
    sizes = WorldSizes(**{field.name: getattr(arguments, field.name) for field in fields(WorldSizes)})
    manifest = draw_world(arguments.out, seed=arguments.seed, sizes=sizes, workers=arguments.workers)
    print(
        f"{manifest} is ready: train from the videos (data.manifest={manifest}) or from shards of them"
        f" (discovla shard {manifest} {arguments.out / 'shards'})"
    )
